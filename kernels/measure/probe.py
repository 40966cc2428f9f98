"""A device's figures from a second of measuring, each the slope of a straight line.

Usage:
    figures = probe(gauge)        # tuning_db/probe.py's Figures

A gauge times `count` operations, each dependent on the one before. Fixed costs, such as starting a
graph and reading the clock, are the same for few and for many, so they cancel in the difference.
"""

import statistics
from collections.abc import Callable
from typing import Protocol

from flashtune.tuning_db.probe import Figures

REPEATS = 7  # of each time, of which the median counts
LAUNCHES = (50, 200)
LOADS = (500, 2500)
BARRIERS = (20, 120)
READS = (1, 3)


class Gauge(Protocol):
    """Times operations on a device, in µs; None if it does not have one."""

    def read_us(self, count: int) -> float | None:
        """Read `read_bytes` from memory, so many times one after another."""

    @property
    def read_bytes(self) -> int:
        """Bytes of one read, more than any cache holds."""

    def launch_us(self, count: int) -> float | None:
        """So many empty kernels of a graph, each after the end of the one before."""

    def overlapped_us(self, count: int) -> float | None:
        """The same by programmatic dependent launch."""

    def load_us(self, count: int) -> float | None:
        """So many loads from memory, each of the address that the one before gave."""

    def barrier_us(self, count: int) -> float | None:
        """So many barriers of one program a multiprocessor."""


def probe(gauge: Gauge) -> Figures:
    """The figures of a device."""
    read_us = _slope(gauge.read_us, READS)
    return Figures(
        bandwidth=None if read_us is None else 1e6 * gauge.read_bytes / read_us,
        launch_us=_slope(gauge.launch_us, LAUNCHES),
        overlapped_us=_slope(gauge.overlapped_us, LAUNCHES),
        load_us=_slope(gauge.load_us, LOADS),
        barrier_us=_slope(gauge.barrier_us, BARRIERS),
    )


def _slope(time_us: Callable[[int], float | None], counts: tuple[int, int]) -> float | None:
    """µs per further operation; None if the device has none, or noise hides it."""
    few, many = counts
    medians = []
    for count in (few, many):
        samples = [time_us(count) for _ in range(REPEATS)]
        known = [each for each in samples if each is not None]
        if len(known) < REPEATS:
            return None
        medians.append(statistics.median(known))
    slope = (medians[1] - medians[0]) / (many - few)
    return slope if slope > 0 else None
