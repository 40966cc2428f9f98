"""A probe of an NVIDIA GPU: tiny kernels in graphs, and what its speed depends on.

Usage:
    with closing(Gauge(device, torch.device("cuda", 0), lanes=32)) as gauge:
        probe(gauge)                     # kernels/measure/probe.py

Kernels come from templates as all others do; a graph of them is timed by the device's own events,
so that the host's part of a launch does not count.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashtune.kernels.backends.gpu import Run
from flashtune.kernels.backends.nvidia.driver import Cell, recorded
from flashtune.kernels.backends.nvidia.step import index_of
from flashtune.kernels.backends.triton.backend import LoadedKernel, compile_kernel, load_source
from flashtune.kernels.measure.memory import free_bytes
from flashtune.templates.render import render
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError

TEMPLATE = "triton/probe.py.j2"
TILE = 8192  # int32 numbers that a program reads
LINE = 32  # int32 numbers of a cache line: places lie on lines of their own
WARPS = {"read": 8}  # of the others one
READ_BYTES = 2**27
CACHES, LEAST_CACHES = (
    16,
    4,
)  # sizes of the L2 cache that a read covers, and the least where memory is short
FREE_SHARE = 4  # a probe takes at most this fraction (1 / N) of the free memory
PDL_FROM = 90  # compute capability of programmatic dependent launch

SIGNATURES = {
    "read": {"source_ptr": "*i32", "sums_ptr": "*i32"},
    "nothing": {"state_ptr": "*i32"},
    "overlapped": {"state_ptr": "*i32"},
    "chase": {"places_ptr": "*i32", "place_ptr": "*i32", "count": "i32"},
    "meet": {"state_ptr": "*i32", "count": "i32"},
}


def probe_source(device: Device) -> str:
    """The generated source of a device's probe."""
    values = {"programs": device.sm_count, "tile": TILE, "pdl": device.capability >= PDL_FROM}
    return render(TEMPLATE, values)


def compile_probe(device: Device, lanes: int) -> dict[str, Any]:
    """Triton's compiled kernels by name; no GPU is needed. Raises what Triton raises."""
    module = load_source(probe_source(device))
    return {
        name: compile_kernel(
            getattr(module, name),
            signature,
            device.capability,
            lanes,
            num_warps=WARPS.get(name, 1),
            launch_pdl=name == "overlapped",
            launch_cooperative_grid=name == "meet",
        )
        for name, signature in SIGNATURES.items()
        if hasattr(module, name)
    }


class Gauge:
    """Times a probe's kernels on a GPU. Raises FlashtuneError where memory is too short."""

    def __init__(self, device: Device, where: torch.device, lanes: int) -> None:
        """Compile, load, and make the tensors that they go over."""
        self._device, self._index = device, index_of(where)
        room = free_bytes(where) // FREE_SHARE
        least = LEAST_CACHES * device.l2_bytes
        size = min(max(CACHES * device.l2_bytes, READ_BYTES), room)
        if size < least:
            raise FlashtuneError(
                f"a probe reads {least / 2**20:.0f} MiB, but may only use {room / 2**20:.0f} MiB"
            )
        self._kernels = {
            name: LoadedKernel.load(each, self._index)
            for name, each in compile_probe(device, lanes).items()
        }
        tiles = max(1, size // (4 * TILE))
        source = torch.zeros(tiles * TILE, dtype=torch.int32, device=where)
        self._tensors = {
            "source_ptr": source,
            "sums_ptr": torch.empty(tiles, dtype=torch.int32, device=where),
            "places_ptr": source,
            "place_ptr": torch.zeros(1, dtype=torch.int32, device=where),
            "state_ptr": torch.zeros(1, dtype=torch.int32, device=where),
        }
        lines = torch.randperm(source.numel() // LINE, device=where).int() * LINE
        source[lines.long()] = lines.roll(-1)  # one circle through all lines
        self._graphs: dict[tuple[str, int], Run] = {}

    @property
    def read_bytes(self) -> int:
        """Bytes of one read."""
        source = self._tensors["source_ptr"]
        return source.numel() * source.element_size()

    def read_us(self, count: int) -> float | None:
        """Microseconds for reading all of them `count` times."""
        tiles = self._tensors["sums_ptr"].numel()
        return self._time_us("read", count, lambda: [self._run("read", tiles)] * count)

    def launch_us(self, count: int) -> float | None:
        """Microseconds for `count` empty kernels, each after the one before."""
        return self._time_us("nothing", count, lambda: [self._run("nothing", 1)] * count)

    def overlapped_us(self, count: int) -> float | None:
        """The same with programmatic dependent launch; None before sm_90."""
        if "overlapped" not in self._kernels:
            return None
        return self._time_us("overlapped", count, lambda: [self._run("overlapped", 1)] * count)

    def load_us(self, count: int) -> float | None:
        """Microseconds for `count` loads, each from the address that the one before gave."""
        return self._time_us("chase", count, lambda: [self._run("chase", 1, count)])

    def barrier_us(self, count: int) -> float | None:
        """Microseconds for `count` barriers, with one program per multiprocessor."""
        programs = self._device.sm_count
        return self._time_us("meet", count, lambda: [self._run("meet", programs, count)])

    def close(self) -> None:
        """Free its memory, and unload its kernels."""
        self._graphs.clear()
        self._tensors.clear()
        for kernel in self._kernels.values():
            kernel.binary.unload()

    def _run(self, kernel: str, programs: int, count: int = 0) -> Run:
        """What launches a kernel."""
        cells: list[Cell] = []
        for name in SIGNATURES[kernel]:
            known = self._tensors.get(name)
            number = ctypes.c_int32(count)
            cells.append(number if known is None else ctypes.c_uint64(known.data_ptr()))
        return self._kernels[kernel].at(programs)(cells)

    def _time_us(self, kernel: str, count: int, runs: Callable[[], Sequence[Run]]) -> float:
        """Microseconds for a graph of these launches, which is recorded once."""
        graph = self._graphs.get((kernel, count))
        if graph is None:
            graph = self._graphs[kernel, count] = recorded(runs(), self._index)
            self._timed(graph)  # the first launch of a graph takes longer
        return self._timed(graph)

    def _timed(self, graph: Run) -> float:
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        stream = torch.cuda.current_stream(self._index)
        start.record(stream)
        graph(stream.cuda_stream)
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3
