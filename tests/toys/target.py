"""The target `abacus`: a processor that runs `everything`, and plain torch for the rest."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from flashtune.kernels.backends.torch import TORCH
from flashtune.kernels.epilogues.epilogue import epilogue_of
from flashtune.kernels.measure.timing import WallTimer
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step, Weights, filled_up
from flashtune.tuning_db.device import Device
from toys.plan import EVERYTHING, EverythingConfig

DEVICE = Device(
    name="abacus-10",
    title="An abacus with ten rods",
    vendor="abacus",
    arch="beads",
    sm_count=1,
    memory_bandwidth=1e9,
    l2_bytes=0,
    clock_hz=1.0,
    source="tests",
)


class ChunkBackend:
    """Steps that take the rows in chunks."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        return candidate.launches

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        problem = candidate.problem

        def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            hidden = filled_up(hidden, len(out))
            rows = torch.arange(problem.vocab_size).split(candidate.config.rows)
            parts = [
                hidden.float() @ weights.rows(problem, part, torch.float32).T for part in rows
            ]
            ids = weights.ids.expand(len(hidden), -1)
            epilogue_of(problem.epilogue).combine(ids, torch.cat(parts, dim=1), out)

        return lambda: step


ABACUS = replace(
    TORCH,
    name="abacus",
    lanes=4,
    plans=(EVERYTHING, *TORCH.plans),
    starts=(EVERYTHING,),
    builders={**TORCH.builders, EVERYTHING.builder: ChunkBackend},
    default=lambda problem, device: EverythingConfig(),
    timer=WallTimer,
    describe=lambda device: DEVICE,
    here=lambda: DEVICE,
    described=lambda: DEVICE,
    trouble=lambda: None,
)
