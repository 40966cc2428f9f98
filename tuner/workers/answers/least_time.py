"""The least time that a step could take on a device, however it is done and wherever its data lie.

Usage:
    least_us(problem, device)     # microseconds; a measured time below that is none

A bound to tell what was not done from what was done fast, and far below what any kernel reaches.
Whatever the plan, all centroids and `n_probes` clusters are read, or all rows, and what comes out
is written. Of the bounds on how fast, the largest counts:

- every byte goes through a register of a multiprocessor or core, and none of today's loads more
  than 128 bytes a clock: the L1 cache of sm_80 to sm_121; two loads of 64 bytes on x86, less on
  Arm. Clocks may be twice what is published; 8 GHz where nothing is.
- of devices whose bandwidth is published: what does not fit the last cache comes from memory, and
  that is not four times as fast as published. The bandwidth of other devices was measured here,
  perhaps in a bad moment, and their caches may be several.
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
    """Microseconds that every step of a problem takes at least."""
    rows = problem.n_clusters * problem.cluster_bytes
    probed = problem.centroid_bytes + problem.n_probes * problem.cluster_bytes
    moved = min(rows, probed) + problem.written_bytes
    clock_hz = FASTER_CLOCK * device.clock_hz if device.clock_hz else UNKNOWN_CLOCK_HZ
    seconds = moved / (max(device.sm_count, 1) * BYTES_A_CLOCK * clock_hz)
    if device.memory_bandwidth and target_of(device).registered:
        beyond = max(0, moved - device.l2_bytes)
        seconds = max(seconds, beyond / (FASTER_MEMORY * device.memory_bandwidth))
    return max(LEAST_CALL_US, 1e6 * seconds)
