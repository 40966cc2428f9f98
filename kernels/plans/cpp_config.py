"""The plans of C++ kernels for CPUs, and which of their configs are valid.

An arch here is a machine and its best SIMD level, `x86_64-avx512_bf16`; it has the levels below
that one as well.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flashtune.kernels.plans.knob import Rule, knob
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

SIMD_LEVELS = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512_bf16"),
    "aarch64": ("scalar", "neon", "neon_bf16"),
}
LANES = {"scalar": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "neon": 4, "neon_bf16": 4}
ALL_LEVELS = tuple(LANES)
BF16_LEVELS = ("avx512_bf16", "neon_bf16")
MOST_SUMS = 16  # vectors of sums that a micro-kernel keeps in registers
THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
PARTS = (1, 2, 4, 8, 16, 32)
SELECTIONS = ("threshold", "histogram", "nth_element")
SLACK = (0, 8, 16, 32, 64)
_SLACKING = {"selection": ("threshold", "histogram")}


@dataclass(frozen=True, kw_only=True, slots=True)
class CppFusedConfig:
    """Every thread scores slabs of centroids, finds the threshold, and gathers slab by slab.

    simd: the instructions used. threads: the caller's counted in. parts: slabs a thread; which
    thread takes one is settled as they run. `score_` and `gather_` knobs shape the micro-kernels:
    rows side by side, columns of blocks with sums of their own, blocks unrolled, and how many
    tiles ahead is prefetched.
    """

    plan: ClassVar[str] = "cpp_fused"
    template: ClassVar[str] = "cpp/decode.cpp.j2"

    selection: str = knob("threshold", SELECTIONS)
    slack: int = knob(0, SLACK, _SLACKING)
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
    gather_prefetch: int = knob(0, (0, 1, 2, 4, 8))


@dataclass(frozen=True, kw_only=True, slots=True)
class CppStagedConfig:
    """Score, select and gather one after another, each shared out; knobs as in CppFusedConfig."""

    plan: ClassVar[str] = "cpp_staged"
    template: ClassVar[str] = "cpp/decode.cpp.j2"

    selection: str = knob("threshold", SELECTIONS)
    slack: int = knob(0, SLACK, _SLACKING)
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
    gather_prefetch: int = knob(0, (0, 1, 2, 4, 8))


CppConfig = CppFusedConfig | CppStagedConfig


def simd_levels(arch: str) -> tuple[str, ...]:
    """The SIMD levels of an arch, the best one last."""
    machine, _, best = arch.partition("-")
    levels = SIMD_LEVELS.get(machine, ("scalar",))
    return levels[: levels.index(best) + 1] if best in levels else levels[:1]


def _why_not_run(config: CppConfig, problem: Problem, device: Device) -> str | None:
    if config.simd not in simd_levels(device.arch):
        return f"{device.name} has no {config.simd}"
    if config.simd in BF16_LEVELS and problem.weight_dtype != "bf16":
        return f"{config.simd} needs hidden states and weights in bf16"
    return None


def _why_not_shared(config: CppConfig, problem: Problem, device: Device) -> str | None:
    if config.threads > device.sm_count:
        return f"{config.threads} threads are more than the {device.sm_count} cores"
    return None


def _why_not_scored(config: CppConfig, problem: Problem, device: Device) -> str | None:
    if config.score_rows > problem.n_clusters:
        return f"score_rows {config.score_rows} is more than the {problem.n_clusters} clusters"
    return _why_not_tiled("score", config, problem)


def _why_not_gathered(config: CppConfig, problem: Problem, device: Device) -> str | None:
    if config.gather_rows > problem.cluster_size:
        return f"gather_rows {config.gather_rows} is more than a cluster's {problem.cluster_size}"
    return _why_not_tiled("gather", config, problem)


def _why_not_tiled(stage: str, config: CppConfig, problem: Problem) -> str | None:
    rows, columns = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_columns")
    unroll = getattr(config, f"{stage}_unroll")
    if rows * columns > MOST_SUMS:
        return f"the {stage} tile {rows}x{columns} has more than {MOST_SUMS} sums"
    width = columns * unroll * 2 * LANES[config.simd]
    if columns * unroll > 1 and width > problem.hidden_size:
        return f"{stage}_columns and {stage}_unroll take more than the hidden size"
    return None


_TILE = ("rows", "columns", "unroll")
RULES = (
    Rule(_why_not_run, frozenset(["simd"])),
    Rule(_why_not_shared, frozenset(["threads"])),
    Rule(_why_not_scored, frozenset(["simd", *(f"score_{each}" for each in _TILE)])),
    Rule(_why_not_gathered, frozenset(["simd", *(f"gather_{each}" for each in _TILE)])),
)


def default_config(problem: Problem, device: Device) -> CppConfig:
    """A config that is valid for every problem, used where nothing better is known."""
    return _fitted(CppFusedConfig(), problem, device)


def baseline_config(problem: Problem, device: Device) -> CppConfig:
    """The pipeline every comparison is made with: three stages, partial sorting between."""
    return _fitted(CppStagedConfig(selection="nth_element"), problem, device)


def known_good(problem: Problem, device: Device) -> list[CppConfig]:
    """Where searches begin: the defaults, with fewer threads, other tiles, other instructions."""
    fused = _fitted(CppFusedConfig(), problem, device)
    staged = _fitted(CppStagedConfig(), problem, device)
    lower = simd_levels(device.arch)[max(0, len(simd_levels(device.arch)) - 2)]
    return [
        fused,
        staged,
        replace(fused, simd=lower),
        replace(fused, threads=1),
        replace(fused, score_columns=4, gather_columns=4),
        replace(fused, gather_rows=8, gather_prefetch=4),
        replace(staged, score_unroll=4, gather_unroll=4),
        replace(fused, selection="histogram"),
    ]


def _fitted(config: CppConfig, problem: Problem, device: Device) -> CppConfig:
    """The config with the device's best instructions, all its cores, and tiles that fit."""
    levels = simd_levels(device.arch)
    if problem.weight_dtype != "bf16":
        levels = tuple(level for level in levels if level not in BF16_LEVELS)
    changes: dict[str, Any] = {
        "simd": levels[-1],
        "threads": max(number for number in THREADS if number <= max(1, device.sm_count)),
    }
    for stage in ("score", "gather"):
        columns = getattr(config, f"{stage}_columns")
        if columns * 2 * LANES[levels[-1]] > problem.hidden_size:
            changes[f"{stage}_columns"] = 1
    return replace(config, **changes)


def slack_of(config: CppConfig) -> int:
    """How many clusters more than asked a config may probe; none where partial sorting selects."""
    return config.slack if config.selection in _SLACKING["selection"] else 0
