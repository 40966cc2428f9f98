"""What the C++ plans share: instruction sets, micro-kernels, how parts are distributed.

An arch here is a machine and its best SIMD level, `x86_64-avx512_bf16`; it has the levels below
that one as well.
"""

from dataclasses import asdict, replace
from typing import Any, TypeVar

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, Rule
from flashtune.kernels.plans.knob import Config
from flashtune.kernels.plans.parts.size import read_by, shape_values
from flashtune.kernels.plans.parts.threshold import threshold_values
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

TEMPLATE = "cpp/decode.cpp.j2"
SIMD_LEVELS = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"),
    "aarch64": ("scalar", "neon", "neon_dot", "neon_bf16"),
}
LANES = {
    "scalar": 4,
    "avx2": 8,
    "avx512": 16,
    "avx512_vnni": 16,
    "avx512_bf16": 16,
    "neon": 4,
    "neon_dot": 4,
    "neon_bf16": 4,
}
ALL_LEVELS = tuple(LANES)
BF16_LEVELS = ("avx512_bf16", "neon_bf16")
# Levels that multiply bytes of quantised rows as integers, which is faster there.
COUNTED = {
    "int8": ("avx512_vnni", "avx512_bf16", "neon_dot", "neon_bf16"),
    "int4": ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_bf16"),
}
COUNTING_LEVELS = ("avx512_vnni", "neon_dot")  # which add nothing else
MOST_HIDDEN = 2**31 // (255 * 128)  # of products of two bytes in a sum of 32 bits
MOST_SUMS = 16  # vectors of sums that a micro-kernel keeps in registers
THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
QUANTISED = {"score": (4, 8), "gather": (2, 16)}  # columns, and tiles ahead
AHEAD_IN_PLACE = 4  # rows
PARTS = (1, 2, 4, 8, 16, 32)
SELECTIONS = ("threshold", "histogram", "nth_element")
CPU_SLACKS = (0, 8, 16, 32, 64)
SLACKING = {"selection": ("threshold", "histogram")}

AnyConfig = TypeVar("AnyConfig", bound=Config)


def simd_levels(arch: str) -> tuple[str, ...]:
    """The SIMD levels of an arch, the best one last."""
    machine, _, best = arch.partition("-")
    levels = SIMD_LEVELS.get(machine, ("scalar",))
    return levels[: levels.index(best) + 1] if best in levels else levels[:1]


def useful_levels(problem: Problem, device: Device) -> tuple[str, ...]:
    """The SIMD levels of a device that kernels of the problem may have, the best one last."""
    return tuple(each for each in simd_levels(device.arch) if _why_useless(each, problem) is None)


def slack_of(config: Any) -> int:
    """How many more clusters than requested may be probed; none if partial sorting selects."""
    return int(config.slack) if config.selection in SLACKING["selection"] else 0


def cpp_values(candidate: Candidate) -> dict[str, Value]:
    """The template's values, except for how parts are distributed."""
    problem, config = candidate.problem, candidate.config
    weight, centroid = format_of(problem.weight_dtype), format_of(problem.centroid_dtype)
    slack = slack_of(config)
    most = min(problem.n_probes + slack, problem.n_clusters)
    probed = min(most + problem.n_pinned, problem.n_clusters)
    candidates = probed * problem.cluster_size
    return {
        "plan": config.plan,
        **shape_values(problem),
        "most": most,
        "weight_format": weight.cpp,
        "centroid_format": centroid.cpp,
        "model_format": format_of(problem.state_dtype).cpp,
        "weight_quantised": weight.quantised,
        "centroid_quantised": centroid.quantised,
        "quantised": weight.quantised or centroid.quantised,
        "pinned": problem.n_pinned,
        "in_place": problem.in_place,
        "scored": problem.n_probes < problem.n_clusters,
        "rescored": min(problem.n_rescored, candidates),
        "lanes": LANES[config.simd],
        "x86": config.simd in SIMD_LEVELS["x86_64"][1:],
        "neon": config.simd in SIMD_LEVELS["aarch64"][1:],
        **{f"counted_{name}": _is_counted(name, problem, config.simd) for name in COUNTED},
        **asdict(config),
        **threshold_values(problem, slack),
    }


def _why_not_run(candidate: Candidate) -> str | None:
    simd = candidate.config.simd
    if simd not in simd_levels(candidate.device.arch):
        return f"{candidate.device.name} has no {simd}"
    return _why_useless(simd, candidate.problem)


def _why_useless(simd: str, problem: Problem) -> str | None:
    """Why a level adds nothing for this problem to the levels below; None if it does."""
    if simd in BF16_LEVELS and not _multiplies_bf16(problem):
        return f"{simd} needs hidden states and weights in bf16"
    if simd in COUNTING_LEVELS and not any(_is_counted(name, problem, simd) for name in COUNTED):
        return f"{simd} needs rows or centroids in int8, or in int4 with a model in 16 bits"
    return None


def _multiplies_bf16(problem: Problem) -> bool:
    """Whether states and rows or centroids are in bf16, the only case that such levels add."""
    stored = (problem.weight_dtype, problem.centroid_dtype)
    return problem.state_dtype == "bf16" and "bf16" in stored


def _why_not_shared(candidate: Candidate) -> str | None:
    threads, cores = candidate.config.threads, candidate.device.sm_count
    return f"{threads} threads are more than the {cores} cores" if threads > cores else None


def _why_not_scored(candidate: Candidate) -> str | None:
    rows, clusters = candidate.config.score_rows, candidate.problem.n_clusters
    if rows > clusters:
        return f"score_rows {rows} is more than the {clusters} clusters"
    return _why_not_tiled("score", candidate)


def _why_not_gathered(candidate: Candidate) -> str | None:
    rows, size = candidate.config.gather_rows, candidate.problem.cluster_size
    if rows > size:
        return f"gather_rows {rows} is more than a cluster's {size}"
    if rows > 1 and candidate.problem.in_place:
        return f"rows in place are not adjacent: gather_rows must be 1, not {rows}"
    return _why_not_tiled("gather", candidate)


def _why_not_tiled(stage: str, candidate: Candidate) -> str | None:
    config = candidate.config
    rows, columns = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_columns")
    unroll = getattr(config, f"{stage}_unroll")
    if rows * columns > MOST_SUMS:
        return f"the {stage} tile {rows}x{columns} has more than {MOST_SUMS} sums"
    width = columns * unroll * _block(stage, candidate.problem, config.simd)
    if columns * unroll > 1 and width > candidate.problem.hidden_size:
        return f"{stage}_columns times {stage}_unroll exceeds the hidden size"
    return None


def _is_counted(name: str, problem: Problem, simd: str) -> bool:
    """Whether a format is read by integer products with a state that is counted in some unit.

    Sums of int8 go over a whole row, in 32 bits. States in float32 are too fine for int4, whose
    counts must be exact.
    """
    if name not in (problem.weight_dtype, problem.centroid_dtype) or simd not in COUNTED[name]:
        return False
    return problem.state_dtype != "fp32" if name == "int4" else problem.hidden_size <= MOST_HIDDEN


def _block(stage: str, problem: Problem, simd: str) -> int:
    """Elements that a micro-kernel takes at a time: two vectors, or more of few bytes."""
    stored = format_of(problem.centroid_dtype if stage == "score" else problem.weight_dtype)
    lanes = LANES[simd]
    if stored.name == "int4":
        return 8 * lanes if _is_counted("int4", problem, simd) else stored.group
    if stored.name == "int8":
        return 4 * lanes if lanes == 4 or _is_counted("int8", problem, simd) else 2 * lanes
    return 2 * lanes


_TILE = ("rows", "columns", "unroll")
CPP_RULES = (
    read_by("cpp"),
    Rule(_why_not_run, frozenset(["simd"])),
    Rule(_why_not_shared, frozenset(["threads"])),
    Rule(_why_not_scored, frozenset(["simd", *(f"score_{each}" for each in _TILE)])),
    Rule(_why_not_gathered, frozenset(["simd", *(f"gather_{each}" for each in _TILE)])),
)


def fitted(config: AnyConfig, problem: Problem, device: Device) -> AnyConfig:
    """The config with the device's best instructions, all its cores, and tiles that fit.

    Quantised rows are prefetched, and read into more sums: fewer bytes leave less time to wait.
    Rows in place are prefetched too, since a processor cannot predict the next.
    """
    best = useful_levels(problem, device)[-1]
    changes: dict[str, Any] = {
        "simd": best,
        "threads": max(number for number in THREADS if number <= max(1, device.sm_count)),
    }
    names = {"score": problem.centroid_dtype, "gather": problem.weight_dtype}
    for stage, name in names.items():
        columns = getattr(config, f"{stage}_columns")
        if format_of(name).quantised:
            columns, ahead = QUANTISED[stage]
            changes |= {f"{stage}_columns": columns, f"{stage}_prefetch": ahead}
        elif stage == "gather" and problem.in_place:
            changes["gather_prefetch"] = AHEAD_IN_PLACE
        if columns * _block(stage, problem, best) > problem.hidden_size:
            changes[f"{stage}_columns"] = 1
    return replace(config, **changes)
