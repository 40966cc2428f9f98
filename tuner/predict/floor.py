"""The byte floor: the time to read a step's fewest bytes at the memory's full bandwidth.

Usage:
    floor_us(problem, device)     # microseconds, None if the bandwidth is not known
"""

from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


def floor_us(problem: Problem, device: Device) -> float | None:
    """Microseconds that the fewest bytes take at the device's bandwidth; None if not known."""
    if not device.memory_bandwidth:
        return None
    return 1e6 * problem.minimum_bytes / device.memory_bandwidth
