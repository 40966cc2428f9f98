"""The CUDA C++ backend: a source's machine code, loaded and launched through the driver.

Usage:
    binary = compile_cuda(candidate.source, candidate.device.arch)
    step = CudaStep(candidate, binary, torch_device)
    step(weights, hidden, out)                                 # launches; capturable
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashtune.kernels.backends.cubin import resource_usage
from flashtune.kernels.backends.cuda.nvrtc import compile_cuda, taken
from flashtune.kernels.backends.gpu import Launch, LaunchedStep
from flashtune.kernels.backends.triton.backend import EMPTY_BEST
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step
from flashtune.tuning_db.problem import Problem

_UNSENT = 2  # as the template has it: no packed logit
_taken = functools.partial(taken, library="the CUDA driver")


@dataclass(frozen=True, slots=True)
class CudaScratch:
    """What a step writes on its way. Not to be shared by steps that run at the same time.

    Shapes: scores float32 `[n_clusters]`; moments float32 `[blocks, 2]`, of each block's scores
    their sum and that of their squares; state int64 `[3]`, best packed logit, arrivals, and blocks
    that have begun; candidates int64 `[blocks, n_rescored]`, each block's best packed logits.
    """

    scores: torch.Tensor
    moments: torch.Tensor
    state: torch.Tensor
    candidates: torch.Tensor

    @classmethod
    def create(cls, problem: Problem, blocks: int, device: torch.device) -> "CudaScratch":
        """Scratch in the state that a step leaves behind."""
        return cls(
            scores=torch.empty(problem.n_clusters, dtype=torch.float32, device=device),
            moments=torch.empty(blocks, 2, dtype=torch.float32, device=device),
            state=torch.tensor([EMPTY_BEST, 0, 0], dtype=torch.int64, device=device),
            candidates=torch.full(
                (blocks, problem.n_rescored), _UNSENT, dtype=torch.int64, device=device
            ),
        )


class CudaStep(LaunchedStep):
    """A candidate in CUDA C++."""

    def __init__(
        self,
        candidate: Candidate,
        binary: bytes,
        device: torch.device,
    ) -> None:
        """Load the binary on `device`; raises FlashtuneError when the driver refuses."""
        from cuda.bindings import driver

        self._driver = driver
        self._index = torch.cuda.current_device()
        self._context = _primary_context(self._index)
        self._enter()
        launches = candidate.launches
        self.scratch = CudaScratch.create(candidate.problem, launches[0].programs, device)
        self._module = _taken(driver.cuModuleLoadData(binary))
        self.launches = [self._bind(launch, candidate.lanes) for launch in launches]

    def _enter(self) -> None:
        """Give the calling thread the context if it has none: torch does so only when it must."""
        driver = self._driver
        if not int(_taken(driver.cuCtxGetCurrent())):
            _taken(driver.cuCtxSetCurrent(self._context))

    def _bind(self, launch: KernelUse, lanes: int) -> Launch:
        driver, index = self._driver, self._index
        function = _taken(driver.cuModuleGetFunction(self._module, launch.kernel.encode()))
        attributes = driver.CUfunction_attribute
        for name, value in (
            (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.dynamic_bytes),
            (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            _taken(driver.cuFuncSetAttribute(function, name, value))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = lanes * launch.warps, 1, 1
        config.sharedMemBytes = launch.dynamic_bytes
        overlap = driver.CUlaunchAttribute()
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        overlap.value = allowed
        config.attrs, config.numAttrs = [overlap], 1

        types = (ctypes.c_void_p,) * len(launch.arguments)

        def run(*pointers: int) -> None:
            self._enter()
            config.hStream = torch._C._cuda_getCurrentRawStream(index)
            _taken(driver.cuLaunchKernelEx(config, function, (pointers, types), 0))

        return Launch(launch.kernel, run, launch.arguments)

    def _value(self, tensor: torch.Tensor) -> int:
        """A pointer."""
        return tensor.data_ptr()


class CudaBackend:
    """NVIDIA GPUs, through CUDA C++."""

    def compile(self, candidate: Candidate) -> Sequence[KernelUse]:
        """Compile for the device's architecture and read what the kernels need."""
        needs = resource_usage(compile_cuda(candidate.source, candidate.device.arch))
        return [
            replace(
                launch,
                registers=needs[launch.kernel]["REG"],
                spilled=needs[launch.kernel]["STACK"],
            )
            for launch in candidate.launches
        ]

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads the kernels with scratch of its own."""
        binary = compile_cuda(source or candidate.source, candidate.device.arch)
        return lambda: CudaStep(candidate, binary, torch_device)


@functools.cache
def _primary_context(index: int) -> Any:
    """A device's context that torch uses, kept as long as the process lives."""
    from cuda.bindings import driver

    return _taken(driver.cuDevicePrimaryCtxRetain(_taken(driver.cuDeviceGet(index))))
