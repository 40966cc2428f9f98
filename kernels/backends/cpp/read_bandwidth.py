"""How fast this machine's memory can be read, by a C++ loop that does nothing else.

Usage:
    measure_bandwidth(device)            # bytes/s
    reader = Reader(device, render_read(threads=2, streams=4))
    reader(buffer)                       # reads a tensor once
"""

import ctypes
import statistics
import time
import weakref
from collections.abc import Sequence

import torch

from flashtune.kernels.backends.cpp.compiler import load_library
from flashtune.kernels.backends.cpp.huge_pages import advise
from flashtune.kernels.plans.parts.simd import simd_levels
from flashtune.templates.render import Value, render
from flashtune.tuning_db.device import Device

LEAST_BYTES = 64 * 2**20  # that a measurement goes over
PASSES = 15
STREAMS = (1, 4)
READ_TEMPLATE = "cpp/read.cpp.j2"
READ_PIECE = 2**16  # bytes that a thread reads at a time


class Reader:
    """Reads tensors with a number of threads. One call at a time."""

    def __init__(self, device: Device, source: str) -> None:
        """Raises FlashtuneError without a compiler."""
        library = load_library(source, device.arch, simd_levels(device.arch)[-1])
        library.flashtune_open.restype = ctypes.c_void_p
        library.flashtune_close.argtypes = (ctypes.c_void_p,)
        library.flashtune_read.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._read, self._handle = library.flashtune_read, library.flashtune_open()
        weakref.finalize(self, library.flashtune_close, self._handle)

    def __call__(self, tensor: torch.Tensor) -> int:
        """Read all whole pieces of the tensor; returns how many bytes that were."""
        size = tensor.numel() * tensor.element_size() // READ_PIECE * READ_PIECE
        self._read(self._handle, tensor.data_ptr(), size)
        return size


def read_sources(device: Device) -> list[str]:
    """What is timed to find a device's bandwidth: readers of one thread, and of one a core."""
    return [
        render_read(threads, streams)
        for threads in sorted({1, device.sm_count})
        for streams in STREAMS
    ]


def render_read(threads: int, streams: int) -> str:
    """The source of a library that reads memory with that many threads, to time it."""
    values: dict[str, Value] = {"threads": threads, "streams": streams, "piece_bytes": READ_PIECE}
    return render(READ_TEMPLATE, values)


def measure_bandwidth(device: Device, sources: Sequence[str] = ()) -> float:
    """Bytes/s read from memory by the best of `read_sources`, a median.

    sources: those, where they were rendered elsewhere. Raises FlashtuneError without a compiler.
    """
    buffer = torch.empty(max(3 * device.l2_bytes, LEAST_BYTES), dtype=torch.uint8)
    advise(buffer)
    buffer.fill_(1)
    return max(_rate(Reader(device, each), buffer) for each in sources or read_sources(device))


def _rate(reader: Reader, buffer: torch.Tensor) -> float:
    reader(buffer)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        size = reader(buffer)
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds)
