"""The plan `cpp_staged` for CPUs: score, select and gather in turn, each split over threads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flashtune.kernels.plans.candidate import Candidate, Plan
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.simd import (
    ALL_LEVELS,
    CPP_RULES,
    CPU_SLACKS,
    PARTS,
    SELECTIONS,
    SLACKING,
    TEMPLATE,
    THREADS,
    cpp_values,
    fitted,
    slack_of,
)
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class CppStagedConfig(Config):
    """Score, select and gather in turn, each split over threads; knobs as in CppFusedConfig."""

    plan: ClassVar[str] = "cpp_staged"

    selection: str = knob("threshold", SELECTIONS)
    slack: int = knob(0, CPU_SLACKS, SLACKING)
    simd: str = knob("scalar", ALL_LEVELS)
    threads: int = knob(1, THREADS)
    score_parts: int = knob(16, PARTS)
    score_rows: int = knob(1, (1, 2, 4, 8))
    score_columns: int = knob(2, (1, 2, 4, 8))
    score_unroll: int = knob(1, (1, 2, 4))
    score_prefetch: int = knob(0, (0, 1, 2, 4, 8))
    gather_parts: int = knob(16, PARTS)
    gather_rows: int = knob(1, (1, 2, 4, 8))
    gather_columns: int = knob(2, (1, 2, 4, 8))
    gather_unroll: int = knob(1, (1, 2, 4))
    gather_prefetch: int = knob(0, (0, 1, 2, 4, 8, 16))


def baseline(problem: Problem, device: Device) -> CppStagedConfig:
    """The baseline of every comparison: three stages, with partial sorting to select."""
    return fitted(CppStagedConfig(selection="nth_element"), problem, device)


def _starts(problem: Problem, device: Device) -> Sequence[CppStagedConfig]:
    staged = fitted(CppStagedConfig(), problem, device)
    return (staged, replace(staged, score_unroll=4, gather_unroll=4))


def _values(candidate: Candidate) -> dict[str, Value]:
    config = candidate.config
    return {
        **cpp_values(candidate),
        "score_parts": config.threads * config.score_parts,
        "gather_parts": config.threads * config.gather_parts,
    }


CPP_STAGED = Plan(
    config=CppStagedConfig,
    builder="cpp",
    template=TEMPLATE,
    rules=CPP_RULES,
    launches=lambda candidate: (),
    values=_values,
    slack=slack_of,
    starts=_starts,
)
