"""What kernels need of NVIDIA's driver: loaded binaries, and launches prepared once.

Usage:
    kernels = Binary(binary, device_index)
    run = kernels.prepared(Shape("score", programs=132, threads=256), [cell, …])
    cell.value = tensor.data_ptr()     # an argument is whatever its cell holds at the launch
    run(stream)

It is called through ctypes: a launch costs the host the driver's own time and less than a
microsecond more, where bindings that make an object of every argument take several. Nothing here
needs a compiler.
"""

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from flashtune.kernels.backends.gpu import Run
from flashtune.tuning_db.errors import FlashtuneError

# Of the driver's header
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT = 8, 9  # attributes of a function
_COOPERATIVE, _OVERLAPPED = 2, 6  # attributes of a launch
_NON_BLOCKING, _RELAXED = 1, 2  # kinds of a stream and of a capture
_NO_FLAGS = ctypes.c_ulonglong()
_USUAL_SHARED_BYTES = 48 * 1024  # more has to be asked for
# Kernels of Triton take pointers to scratch after their own arguments: two so far. What a kernel
# does not take is not read.
_UNUSED_ARGUMENTS = 4

_LOADED: Counter[int] = Counter()  # binaries, by their bytes

Cell = ctypes.c_uint64 | ctypes.c_int32


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: one of a launch, of which only a flag is used here."""

    _fields_ = (("id", ctypes.c_uint), ("_", ctypes.c_uint), ("flag", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel is launched: its name, thread blocks, and threads of each.

    overlapped: it may begin before the preceding kernel has ended (programmatic dependent
    launch). cooperative: all of its blocks must be resident at once. most_shared: as much of the
    L1 cache as possible becomes shared memory.
    """

    kernel: str
    programs: int
    threads: int
    dynamic_bytes: int = 0
    overlapped: bool = False
    cooperative: bool = False
    most_shared: bool = False


class Binary:
    """A binary's kernels, loaded into a device's primary context, which is the one of torch.

    Raises FlashtuneError if the driver refuses. It stays loaded until it is unloaded, even if
    nothing refers to it any more: graphs that captured its kernels may outlive it.
    """

    def __init__(self, binary: bytes, index: int) -> None:
        """Load it on the device with this index."""
        self._driver, self._context = library(), _primary_context(index)
        _enter(self._context)
        self._module = ctypes.c_void_p()
        _check(self._driver.cuModuleLoadData(ctypes.byref(self._module), binary))
        self._size = len(binary)  # 0 once it is unloaded
        _LOADED[self._size] += 1

    def unload(self) -> None:
        """Unload it, once: neither its kernels nor graphs of them can be launched any more."""
        if not self._size:
            return
        _LOADED[self._size] -= 1
        self._size = 0
        _enter(self._context)
        _check(self._driver.cuModuleUnload(self._module))

    def prepared(self, shape: Shape, cells: Sequence[Cell]) -> Run:
        """What launches a kernel on a stream, with the values that its cells hold then."""
        function, config = self._function(shape), _config(shape)
        unused = [ctypes.c_uint64() for _ in range(_UNUSED_ARGUMENTS)]
        all_cells = [*cells, *unused]
        arguments = (ctypes.c_void_p * len(all_cells))(*map(ctypes.addressof, all_cells))
        launch, where = self._driver.cuLaunchKernelEx, ctypes.byref(config)

        def run(stream: int) -> None:
            config.stream = stream
            error = launch(where, function, arguments, None)
            if error:
                again = partial(launch, where, function, arguments, None)
                _check(_in_context(error, self._context, again))

        run.cells = all_cells  # type: ignore[attr-defined]  # arguments only points to them
        return run

    def _function(self, shape: Shape) -> ctypes.c_void_p:
        driver, function = self._driver, ctypes.c_void_p()
        name = shape.kernel.encode()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), self._module, name))
        wanted = {}
        if shape.dynamic_bytes > _USUAL_SHARED_BYTES or shape.most_shared:
            wanted[_MAX_DYNAMIC_SHARED] = shape.dynamic_bytes
        if shape.most_shared:
            wanted[_SHARED_CARVEOUT] = 100
        for attribute, value in wanted.items():
            _check(driver.cuFuncSetAttribute(function, attribute, value))
        return function


def loaded() -> tuple[int, int]:
    """How many binaries this process has loaded, and their total size in bytes."""
    return _LOADED.total(), sum(size * count for size, count in _LOADED.items())


class _Graph:
    """A recorded sequence of launches; it is destroyed with the object that launches it."""

    def __init__(self, runs: Sequence[Run], index: int) -> None:
        driver = self._driver = library()
        self._launch, self.handle = driver.cuGraphLaunch, ctypes.c_void_p()
        self._context = _primary_context(index)
        stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING))
        try:
            _check(driver.cuStreamBeginCapture_v2(stream, _RELAXED))
            try:
                for run in runs:
                    run(stream.value or 0)
            finally:
                error = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
            _check(error)
            try:
                _check(
                    driver.cuGraphInstantiateWithFlags(ctypes.byref(self.handle), graph, _NO_FLAGS)
                )
            finally:
                driver.cuGraphDestroy(graph)
        finally:
            driver.cuStreamDestroy_v2(stream)

    def launch(self, stream: int) -> None:
        error = self._launch(self.handle, stream)
        if error:
            again = partial(self._launch, self.handle, stream)
            _check(_in_context(error, self._context, again))

    def __del__(self) -> None:
        if self.handle:
            self._driver.cuGraphExecDestroy(self.handle)


def recorded(runs: Sequence[Run], index: int) -> Run:
    """A function that launches all of these at once, with the values that their cells hold now.

    On the device with this index. Captures of other threads are not disturbed. Raises
    FlashtuneError where the driver refuses.
    """
    driver, mode = library(), ctypes.c_int(_RELAXED)
    _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        return _Graph(runs, index).launch
    finally:
        _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def _config(shape: Shape) -> _Config:
    flags = {_OVERLAPPED: shape.overlapped, _COOPERATIVE: shape.cooperative}
    chosen = [number for number, wanted in flags.items() if wanted]
    attributes = (_Attribute * len(chosen))()
    for attribute, number in zip(attributes, chosen, strict=True):
        attribute.id, attribute.flag[0] = number, 1
    return _Config(
        grid=(shape.programs, 1, 1),
        block=(shape.threads, 1, 1),
        dynamic_bytes=shape.dynamic_bytes,
        attributes=attributes,
        n_attributes=len(chosen),
    )


@functools.cache
def library() -> Any:
    """The driver's library; raises FlashtuneError if there is none."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise FlashtuneError(f"there is no NVIDIA driver: {error}") from error
    with suppress(AttributeError):  # a driver that is too old for graphs
        found.cuGraphLaunch.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return found


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses; kept as long as the process lives."""
    driver, device, context = library(), ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), index))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


def _enter(context: ctypes.c_void_p) -> None:
    """Give the calling thread a context if it has none: torch does so only when it must."""
    current = ctypes.c_void_p()
    _check(library().cuCtxGetCurrent(ctypes.byref(current)))
    if not current.value:
        _check(library().cuCtxSetCurrent(context))


def _in_context(error: int, context: ctypes.c_void_p, launch: Callable[[], int]) -> int:
    """The error of a launch, which is tried again where the thread had no context."""
    if error != _INVALID_CONTEXT:
        return error
    _enter(context)
    return launch()


def _check(error: int) -> None:
    """Raise FlashtuneError with the driver's name of an error."""
    if error:
        name = ctypes.c_char_p()
        library().cuGetErrorName(error, ctypes.byref(name))
        said = name.value.decode() if name.value else f"error {error}"
        raise FlashtuneError(f"the CUDA driver says {said}")
