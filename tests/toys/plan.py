"""The plan `everything`: the logits of all rows, so many at a time, for 16 tokens at most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule
from flashtune.kernels.plans.knob import Config, knob


@dataclass(frozen=True, kw_only=True, slots=True)
class EverythingConfig(Config):
    """rows: how many are taken at a time."""

    plan: ClassVar[str] = "everything"

    rows: int = knob(64, (16, 64, 256))


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    programs = -(-candidate.problem.vocab_size // candidate.config.rows)
    return [KernelUse(kernel="logits", programs=programs, warps=1, registers=8, shared_bytes=0)]


def _why_not(candidate: Candidate) -> str | None:
    tokens = candidate.problem.n_tokens
    if candidate.problem.n_rescored:
        return "everything has no launch that decides candidates again"
    return f"everything is for 16 tokens at most, not {tokens}" if tokens > 16 else None


EVERYTHING = Plan(
    config=EverythingConfig,
    builder="chunks",
    template=None,
    rules=(Rule(_why_not),),
    launches=_launches,
    values=lambda candidate: {},
    slack=lambda config: 2**31,
    starts=lambda problem, device: [EverythingConfig(rows=16)],
)
