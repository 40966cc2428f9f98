"""The CUDA C++ backend: a source's machine code, loaded and launched through the driver.

Usage:
    binary = compile_cuda(candidate.source, candidate.device.arch)
    step = CudaStep(candidate, Binary(binary, torch_device.index), torch_device)
    step(weights, hidden, out)                                 # launches; capturable
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from flashtune.kernels.backends.cubin import resource_usage
from flashtune.kernels.backends.cuda.nvrtc import compile_cuda
from flashtune.kernels.backends.gpu import Launch
from flashtune.kernels.backends.nvidia.driver import Binary, Shape
from flashtune.kernels.backends.nvidia.step import DriverStep, index_of
from flashtune.kernels.backends.triton.backend import EMPTY_BEST
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step
from flashtune.tuning_db.problem import Problem

_UNSENT = 2  # as the template has it: no packed logit


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


class CudaStep(DriverStep):
    """A candidate in CUDA C++."""

    def __init__(self, candidate: Candidate, binary: Binary, device: torch.device) -> None:
        """Take a binary that is loaded on `device`; the step has scratch of its own."""
        super().__init__(device)
        uses = candidate.launches
        self.binaries = [binary]
        self.scratch = CudaScratch.create(candidate.problem, uses[0].programs, device)
        self.launches = [
            Launch(
                use.kernel, partial(binary.prepared, _shape(use, candidate.lanes)), use.arguments
            )
            for use in uses
        ]


def _shape(use: KernelUse, lanes: int) -> Shape:
    return Shape(
        use.kernel,
        programs=use.programs,
        threads=lanes * use.warps,
        dynamic_bytes=use.dynamic_bytes,
        overlapped=True,
        most_shared=True,
    )


class CudaBackend:
    """NVIDIA GPUs, through CUDA C++."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        """Compile for the device's architecture and read what the kernels need."""
        needs = resource_usage(compile_cuda(source or candidate.source, candidate.device.arch))
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
        code = compile_cuda(source or candidate.source, candidate.device.arch)
        binary = functools.cache(lambda: Binary(code, index_of(torch_device)))
        return lambda: CudaStep(candidate, binary(), torch_device)
