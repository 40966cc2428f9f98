"""Add a plan, and a kind of device that runs it: plain torch that probes more than requested.

python examples/add_plan.py    (a plan with kernels has a template too: docs/howto/add-a-plan.md)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flashtune import FlashHead
from flashtune.kernels.backends.torch import TORCH, TorchBackend, TorchStep
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.candidate import PLANS, TARGETS
from flashtune.kernels.plans.knob import Config, knob


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerousConfig(Config):
    plan: ClassVar[str] = "generous"
    times: int = knob(2, (2, 4))  # as many clusters as requested


class GenerousBackend(TorchBackend):
    def loader(self, candidate, torch_device, source=None):
        problem = candidate.problem
        n_probes = min(candidate.config.times * problem.n_probes, problem.n_clusters)
        return lambda: TorchStep(replace(problem, n_probes=n_probes))


GENEROUS = replace(FALLBACK, config=GenerousConfig, builder="generous", slack=lambda _: 2**31)
SLATE = replace(
    TORCH, name="slate", plans=(GENEROUS, *TORCH.plans), default=lambda *_: GenerousConfig(),
    builders={**TORCH.builders, "generous": GenerousBackend},
    describe=lambda device: replace(TORCH.describe(device), name="slate", vendor="slate"),
)  # fmt: skip
with PLANS.added(GENEROUS), TARGETS.added(SLATE):
    head = FlashHead(torch.eye(60), torch.eye(60), torch.arange(60), n_probes=3, tune="never")
    print("tokens", head(torch.eye(60)[7:9]).tolist(), "by", head.explain(2)["config"])
