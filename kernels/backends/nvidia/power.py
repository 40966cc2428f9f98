"""What an NVIDIA GPU's speed depends on besides its kind, and the energy that it takes.

Usage:
    conditions(0)                # {"power mode": "MAXN_SUPER", …}; empty where nothing can be read
    with energy_counter(0) as joules:
        joules()                 # so far; only differences mean anything

A discrete GPU is asked through NVML, a Jetson through the files of its system.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashtune.kernels.backends.nvidia import jetson
from flashtune.kernels.backends.nvidia.nvml import Board
from flashtune.tuning_db.errors import FlashtuneError

Joules = Callable[[], float]


def conditions(index: int) -> dict[str, str]:
    """Power mode or limit, and highest clocks, each by its name; empty where none can be read."""
    if jetson.jetson():
        return jetson.conditions()
    try:
        return Board.of(index).conditions()
    except (FlashtuneError, AttributeError):  # no library, or one that is too old
        return {}


@contextmanager
def energy_counter(index: int) -> Iterator[Joules]:
    """A function that gives the joules consumed so far; raises FlashtuneError without one."""
    if jetson.jetson():
        with jetson.energy_counter() as joules:
            yield joules
        return
    board = Board.of(index)
    board.joules()  # raises at once if there is no counter
    yield board.joules
