"""The CUDA C++ backend: a source's machine code, loaded and launched through the driver.

Usage:
    binary = compile_cuda(render_cuda(problem, config, device), device.arch)
    step = CudaStep(problem, launches_of(problem, config, device), binary, torch_device)
    step(weights, hidden, out)                                 # launches; capturable
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashtune.kernels.backends.backend import KernelUse
from flashtune.kernels.backends.cubin import resource_usage
from flashtune.kernels.backends.cuda.nvrtc import compile_cuda, taken
from flashtune.kernels.backends.cuda.source import render_cuda
from flashtune.kernels.backends.gpu import GraphTimedBackend, LaunchedStep
from flashtune.kernels.backends.triton.backend import EMPTY_BEST
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.streamed import Launch, StreamedConfig, launches_of
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

_taken = functools.partial(taken, library="the CUDA driver")
_POINTERS = (ctypes.c_void_p,) * 8  # what both kernels are given


@dataclass(frozen=True, slots=True)
class CudaScratch:
    """What a step writes on its way. Not to be shared by steps that run at the same time.

    Shapes: scores float32 `[n_clusters]`; moments float32 `[blocks, 2]`, of each block's scores
    their sum and that of their squares; state int64 `[2]`, best packed logit and arrivals.
    """

    scores: torch.Tensor
    moments: torch.Tensor
    state: torch.Tensor

    @classmethod
    def create(cls, problem: Problem, blocks: int, device: torch.device) -> "CudaScratch":
        """Scratch in the state that a step leaves behind."""
        return cls(
            scores=torch.empty(problem.n_clusters, dtype=torch.float32, device=device),
            moments=torch.empty(blocks, 2, dtype=torch.float32, device=device),
            state=torch.tensor([EMPTY_BEST, 0], dtype=torch.int64, device=device),
        )


class CudaStep(LaunchedStep):
    """A candidate in CUDA C++."""

    def __init__(
        self,
        problem: Problem,
        launches: Sequence[Launch],
        binary: bytes,
        device: torch.device,
    ) -> None:
        """Load the binary on `device`; raises FlashtuneError when the driver refuses."""
        from cuda.bindings import driver

        self._driver = driver
        self._index = torch.cuda.current_device()
        self._context = _primary_context(self._index)
        self._enter()
        self.scratch = CudaScratch.create(problem, launches[0].blocks, device)
        self._module = _taken(driver.cuModuleLoadData(binary))
        self.launches = [(launch.kernel, self._bind(launch)) for launch in launches]

    def _enter(self) -> None:
        """Give the calling thread the context if it has none: torch does so only when it must."""
        driver = self._driver
        if not int(_taken(driver.cuCtxGetCurrent())):
            _taken(driver.cuCtxSetCurrent(self._context))

    def _bind(self, launch: Launch) -> Callable[..., None]:
        driver, index = self._driver, self._index
        function = _taken(driver.cuModuleGetFunction(self._module, launch.kernel.encode()))
        attributes = driver.CUfunction_attribute
        for name, value in (
            (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.ring_bytes),
            (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            _taken(driver.cuFuncSetAttribute(function, name, value))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * launch.warps, 1, 1
        config.sharedMemBytes = launch.ring_bytes
        overlap = driver.CUlaunchAttribute()
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        overlap.value = allowed
        config.attrs, config.numAttrs = [overlap], 1

        def run(*pointers: int) -> None:
            config.hStream = torch._C._cuda_getCurrentRawStream(index)
            _taken(driver.cuLaunchKernelEx(config, function, (pointers, _POINTERS), 0))

        return run

    def _arguments(self, tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
        self._enter()
        scratch = self.scratch
        all_tensors = (*tensors, scratch.scores, scratch.moments, scratch.state)
        return tuple(tensor.data_ptr() for tensor in all_tensors)


class CudaBackend(GraphTimedBackend):
    """NVIDIA GPUs, through CUDA C++."""

    def render(self, problem: Problem, config: Config, device: Device) -> str:
        """The candidate's CUDA C++ source."""
        return render_cuda(problem, config, device)

    def compile(self, problem: Problem, config: Config, device: Device) -> Sequence[KernelUse]:
        """Compile for the device's architecture and read what the kernels need."""
        needs = resource_usage(compile_cuda(self.render(problem, config, device), device.arch))
        return [
            KernelUse(
                kernel=launch.kernel,
                programs=launch.blocks,
                warps=launch.warps,
                registers=needs[launch.kernel]["REG"],
                shared_bytes=launch.shared_bytes,
                spilled=needs[launch.kernel]["STACK"],
            )
            for launch in _launches(problem, config, device)
        ]

    def loader(
        self,
        problem: Problem,
        config: Config,
        device: Device,
        torch_device: torch.device,
        source: str | None = None,
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads the kernels with scratch of its own."""
        binary = compile_cuda(source or self.render(problem, config, device), device.arch)
        launches = _launches(problem, config, device)
        return lambda: CudaStep(problem, launches, binary, torch_device)


@functools.cache
def _primary_context(index: int) -> Any:
    """A device's context that torch uses, kept as long as the process lives."""
    from cuda.bindings import driver

    return _taken(driver.cuDevicePrimaryCtxRetain(_taken(driver.cuDeviceGet(index))))


def _launches(problem: Problem, config: Config, device: Device) -> list[Launch]:
    """The launches of a config that was rendered here or elsewhere."""
    assert isinstance(config, StreamedConfig)
    return launches_of(problem, config, device)
