"""What is read through NVIDIA's management library: power, clocks, and the energy counter.

Usage:
    board = Board.of(0)                  # FlashtuneError where the library or the board won't say
    board.conditions()                   # {"power limit": "700 W", …}, what can be read
    board.joules()                       # since the driver was loaded

It is called through ctypes, as the driver is: three numbers are not worth a dependency. On a
Jetson this library reports none of them.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from flashtune.tuning_db.errors import FlashtuneError

# Of the library's header
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_MILLI = 1e-3


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise FlashtuneError(
            f"NVIDIA's management library (NVML) cannot be loaded: {error}"
        ) from error
    _check(library.nvmlInit_v2())
    return library


def _check(error: int) -> None:
    if error:
        raise FlashtuneError(f"NVIDIA's management library (NVML) returned error {error}")


class Board:
    """A GPU, found by its UUID: the library numbers GPUs in another order than CUDA."""

    def __init__(self, handle: ctypes.c_void_p, library: Any) -> None:
        """Take a handle that the library gave."""
        self._handle, self._library = handle, library

    @classmethod
    def of(cls, index: int) -> "Board":
        """The board of torch's GPU with this index; raises FlashtuneError."""
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        library, handle = _library(), ctypes.c_void_p()
        _check(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)))
        return cls(handle, library)

    def joules(self) -> float:
        """The joules consumed since the driver was loaded; raises FlashtuneError if not known."""
        value = ctypes.c_ulonglong()
        error = self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(value)
        )
        _check(error)
        return value.value * _MILLI

    def conditions(self) -> dict[str, str]:
        """Its power limit and highest clocks, as far as they can be read."""
        asked: dict[str, tuple[Callable[..., int], tuple[int, ...], float, str]] = {
            "power limit": (
                self._library.nvmlDeviceGetEnforcedPowerLimit, (), _MILLI, "W",
            ),
            "highest clock": (self._library.nvmlDeviceGetMaxClockInfo, (_SM_CLOCK,), 1.0, "MHz"),
            "highest memory clock": (
                self._library.nvmlDeviceGetMaxClockInfo, (_MEMORY_CLOCK,), 1.0, "MHz",
            ),
            "set clock": (
                self._library.nvmlDeviceGetApplicationsClock, (_SM_CLOCK,), 1.0, "MHz",
            ),
        }  # fmt: skip
        found = {}
        for name, (function, which, scale, unit) in asked.items():
            value = ctypes.c_uint()
            if function(self._handle, *which, ctypes.byref(value)) == 0:
                found[name] = f"{value.value * scale:.0f} {unit}"
        return found
