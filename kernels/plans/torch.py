"""The plan `torch`: plain torch, for devices without kernels and as the last fallback."""

from dataclasses import dataclass
from typing import ClassVar

from flashtune.kernels.plans.candidate import Plan
from flashtune.kernels.plans.knob import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchConfig(Config):
    """Nothing to choose: every operation is torch's own."""

    plan: ClassVar[str] = "torch"


TORCH = Plan(
    config=TorchConfig,
    builder="torch",
    template=None,
    rules=(),
    launches=lambda candidate: (),
    values=lambda candidate: {},
    slack=lambda config: 0,
    starts=lambda problem, device: (),
)
