"""The plan `cpp_fused` for CPUs: every thread scores, selects and gathers in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flashtune.kernels.plans.candidate import Candidate, Plan, why_broken
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
    useful_levels,
)
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class CppFusedConfig(Config):
    """Every thread scores slabs of centroids, finds the threshold, and gathers slab by slab.

    simd: the instructions used. threads: including the caller's. parts: slabs per thread, assigned
    dynamically. `score_` and `gather_` knobs shape the micro-kernels: rows side by side, columns
    of blocks with separate sums, blocks unrolled, and how many tiles ahead to prefetch.
    """

    plan: ClassVar[str] = "cpp_fused"

    selection: str = knob("threshold", SELECTIONS)
    slack: int = knob(0, CPU_SLACKS, SLACKING)
    simd: str = knob("scalar", ALL_LEVELS)
    threads: int = knob(1, THREADS)
    parts: int = knob(16, PARTS)
    score_rows: int = knob(1, (1, 2, 4, 8))
    score_columns: int = knob(2, (1, 2, 4, 8))
    score_unroll: int = knob(1, (1, 2, 4))
    score_prefetch: int = knob(0, (0, 1, 2, 4, 8))
    gather_rows: int = knob(1, (1, 2, 4, 8))
    gather_columns: int = knob(2, (1, 2, 4, 8))
    gather_unroll: int = knob(1, (1, 2, 4))
    gather_prefetch: int = knob(0, (0, 1, 2, 4, 8, 16))


def default(problem: Problem, device: Device) -> CppFusedConfig:
    """A config that is valid for every problem that the templates can read.

    Raises FlashtuneError for others.
    """
    config = fitted(CppFusedConfig(), problem, device)
    reason = why_broken(CPP_RULES, Candidate(problem, config, device))
    if reason:
        raise FlashtuneError(f"no default kernel for {problem.describe()}: {reason}")
    return config


def _starts(problem: Problem, device: Device) -> Sequence[CppFusedConfig]:
    """The default, with fewer threads, other tiles, other instructions."""
    fused = default(problem, device)
    levels = useful_levels(problem, device)
    tiles = (
        replace(fused, gather_rows=8, gather_prefetch=4),
        replace(fused, gather_rows=4, gather_columns=1, gather_prefetch=4),
    )
    if problem.in_place:
        tiles = (replace(fused, gather_prefetch=8), replace(fused, gather_prefetch=2))
    return (
        fused,
        replace(fused, simd=levels[max(0, len(levels) - 2)]),
        replace(fused, threads=1),
        replace(fused, score_columns=4, gather_columns=4),
        *tiles,
        replace(fused, score_rows=2, score_columns=2, score_prefetch=4),
        replace(fused, selection="histogram"),
    )


def _values(candidate: Candidate) -> dict[str, Value]:
    config = candidate.config
    return {**cpp_values(candidate), "score_parts": config.threads * config.parts}


CPP_FUSED = Plan(
    config=CppFusedConfig,
    builder="cpp",
    template=TEMPLATE,
    rules=CPP_RULES,
    launches=lambda candidate: (),
    values=_values,
    slack=slack_of,
    starts=_starts,
)
