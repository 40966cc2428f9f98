"""A lower bound of a step's time on a device, for any plan and wherever its data is.

Usage:
    least_us(problem, device)     # microseconds; a measured time below is not valid

The bound tells work that was not done from work done fast; it is far below what any kernel
reaches. Any plan reads all centroids and `n_probes` clusters, or all rows, and writes its result.
The largest of these bounds counts:

- every byte goes through a register of a multiprocessor or core, and none of today's loads more
  than 128 bytes per clock: the L1 cache of sm_80 to sm_121; two loads of 64 bytes on x86, less on
  Arm. Clocks may be twice the published ones; 8 GHz if none is published.
- for devices with a published bandwidth: data that does not fit the last cache comes from memory,
  which is less than four times as fast as published. The bandwidth of other devices was measured
  here, perhaps at a bad moment, and they may have several caches.
- a launch, or a call, takes longer than 50 ns.
"""

from flashtune.kernels.backends.target import target_of
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

LEAST_CALL_US = 0.05
BYTES_A_CLOCK = 128
UNKNOWN_CLOCK_HZ = 8e9
FASTER_CLOCK = 2.0  # than published
FASTER_MEMORY = 4.0


def least_us(problem: Problem, device: Device) -> float:
    """The least time of any step of a problem, in microseconds."""
    rows = problem.n_clusters * problem.cluster_bytes
    probed = problem.centroid_bytes + problem.n_probes * problem.cluster_bytes
    moved = min(rows, probed) + problem.written_bytes
    clock_hz = FASTER_CLOCK * device.clock_hz if device.clock_hz else UNKNOWN_CLOCK_HZ
    seconds = moved / (max(device.sm_count, 1) * BYTES_A_CLOCK * clock_hz)
    if device.memory_bandwidth and target_of(device).registered:
        beyond = max(0, moved - device.l2_bytes)
        seconds = max(seconds, beyond / (FASTER_MEMORY * device.memory_bandwidth))
    return max(LEAST_CALL_US, 1e6 * seconds)
