"""The plan `staged`: score, select and gather in separate launches, one after another."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule, why_broken
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.digits import (
    digit_launches,
    digit_values,
    expected_digit_pass,
    multiplies,
    why_not_digit_tiled,
)
from flashtune.kernels.plans.parts.screen import MOST_BOUNDED, bound_values
from flashtune.kernels.plans.parts.size import (
    epilogue_values,
    next_power_of_2,
    read_by,
    shape_values,
    stored_values,
)
from flashtune.kernels.plans.parts.threshold import lane_values, prefetch_values, share_values
from flashtune.kernels.plans.parts.tile import (
    MAX_TILE_PER_THREAD,
    PREFETCH_MARGINS,
    SLACKS,
    TILE,
    expected_pass,
    expected_search,
    narrowed,
    why_not_overlapped,
    why_not_prefetched,
    why_not_selected,
    why_not_tiled,
)
from flashtune.kernels.plans.parts.widen import BY_BITS, BY_DIGITS, MULTIPLIED
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedConfig(Config):
    """Score, select and gather in separate launches.

    selection: `torch_topk` (the baseline), `threshold` (one program per token, in a separate
    launch) or `in_gather` (every gather program finds the threshold itself, no launch).
    prefetch_margin: how far below the expected threshold, in hundredths of a standard deviation of
    the scores, a cluster's rows are still prefetched to L2; -1 prefetches nothing.
    """

    plan: ClassVar[str] = "staged"

    selection: str = knob("threshold", ("torch_topk", "threshold", "in_gather"))
    widen: str = knob("cast", MULTIPLIED)
    score_rows: int = knob(2, (1, 2, 4, 8, 16, 32, 64))
    score_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    score_warps: int = knob(4, (1, 2, 4, 8))
    score_stages: int = knob(1, (1, 2, 3, 4))
    score_unroll: int = knob(1, (1, 2, 4))
    score_programs_per_sm: int = knob(0, (0, 2, 4, 8, 16))
    select_warps: int = knob(16, (4, 8, 16, 32), {"selection": ("threshold",)})
    slack: int = knob(16, SLACKS, {"selection": ("threshold", "in_gather")})
    gather_rows: int = knob(4, (1, 2, 4, 8, 16, 32, 64))
    gather_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    gather_warps: int = knob(4, (1, 2, 4, 8, 16, 32))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    gather_unroll: int = knob(1, (1, 2, 4))
    gather_programs_per_sm: int = knob(1, (1, 2, 4), {"selection": ("in_gather",)})
    prefetch_margin: int = knob(-1, PREFETCH_MARGINS, {"selection": ("in_gather",)})
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


_DECIDED_PER_THREAD = 64  # elements of the model's rows, after a gather by digits

# Starting points of searches, expected best first: found by hand on one H200, with and without the
# features of sm_90.
_STARTS = (
    StagedConfig(pdl=True),
    StagedConfig(),
    StagedConfig(
        selection="in_gather",
        score_unroll=2,
        slack=8,
        gather_rows=32,
        gather_block=512,
        gather_warps=8,
        prefetch_margin=5,
        pdl=True,
    ),
    StagedConfig(selection="in_gather", gather_rows=32, gather_block=512, gather_warps=8),
)

# For quantised rows: tiles of as many bytes. On an H100 int8 is faster with widen "bits". That by
# digits is what the cost model has for Qwen3-VL-2B on an Orin Nano: it was not measured.
_DIGITS = StagedConfig(
    widen="digits",
    score_rows=64,
    score_block=256,
    score_stages=4,
    slack=8,
    gather_rows=32,
    gather_block=256,
    gather_warps=2,
    gather_stages=4,
)
_QUANTISED_STARTS = (
    StagedConfig(score_rows=4, gather_rows=8, widen="bits", pdl=True),
    StagedConfig(score_rows=4, gather_rows=8, widen="bits"),
    replace(_DIGITS, pdl=True),
    _DIGITS,
    StagedConfig(score_rows=4, gather_rows=8, pdl=True),
    StagedConfig(score_rows=4, gather_rows=8),
)


def select_warps(config: StagedConfig) -> int:
    """Warps of the programs that search for the threshold; 0 if a library selects."""
    found = {"threshold": config.select_warps, "in_gather": config.gather_warps}
    return found.get(config.selection, 0)


def slack_of(config: StagedConfig) -> int:
    """How many more clusters than requested may be probed; none if a library selects."""
    return config.slack if select_warps(config) else 0


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    """One program per tile, or a fixed number of programs that loop."""
    problem, config = candidate.problem, candidate.config
    tiles = _score_tiles(candidate)
    looping = config.score_programs_per_sm * candidate.device.sm_count
    parts = _parts(candidate)
    gathers = config.selection == "in_gather"
    score = _expected_pass("score", candidate, min(looping, tiles) if looping else tiles, False)
    gather = _expected_pass("gather", candidate, parts * problem.n_tokens, gathers)
    first, last = [*digit_launches(candidate), score], [gather]
    if problem.n_rescored:  # the same tiles again, of the model's own rows
        last.append(replace(gather, kernel="decide", shared_bytes=0))
    if config.selection != "threshold":
        return (*first, *last)
    return (*first, expected_search(candidate, config.select_warps), *last)


def _expected_pass(stage: str, candidate: Candidate, programs: int, searches: bool) -> KernelUse:
    warps = int(getattr(candidate.config, f"{stage}_warps"))
    if not multiplies(stage, candidate):
        return expected_pass(stage, candidate, warps, programs, searches)
    return expected_digit_pass(stage, candidate, warps, programs, _slots(stage, candidate))


def _slots(stage: str, candidate: Candidate) -> int:
    """Slots for the tokens that a tile is multiplied by: all of them, or in the gather one."""
    return next_power_of_2(candidate.problem.n_tokens) if stage == "score" else 1


def _score_tiles(candidate: Candidate) -> int:
    """Tiles of centroids; a program takes one or loops over several."""
    return -(-candidate.problem.n_clusters // int(candidate.config.score_rows))


def _parts(candidate: Candidate) -> int:
    """Programs of the gather per token."""
    problem, config = candidate.problem, candidate.config
    if config.selection == "in_gather":
        programs = config.gather_programs_per_sm * candidate.device.sm_count
        return max(1, int(programs) // problem.n_tokens)
    clusters = problem.n_probes + slack_of(config) // 2 + problem.n_pinned
    rows = min(clusters, problem.n_clusters) * problem.cluster_size
    parts = -(-rows // int(config.gather_rows))
    return min(parts, MOST_BOUNDED) if problem.n_rescored else parts


def _values(candidate: Candidate) -> dict[str, Value]:
    problem, config = candidate.problem, candidate.config
    (score,) = (use for use in _launches(candidate) if use.kernel == "score")
    parts, warps = _parts(candidate), select_warps(config)
    values: dict[str, Value] = {
        **shape_values(problem),
        **stored_values(problem),
        **asdict(config),
        **digit_values(candidate),
        "score_tiles": _score_tiles(candidate),
        "score_programs": score.programs,
        "parts": parts,
        **epilogue_values(problem, score),
        **bound_values(problem, parts, parts, config.gather_warps),
        "decide_block": _decide_block(candidate),
    }
    if warps:
        values |= lane_values(problem, config.slack, warps)
        values |= prefetch_values(problem, config.slack, config.prefetch_margin)
        values |= share_values(problem, config.gather_rows, warps, parts)
    return values


def _decide_block(candidate: Candidate) -> int:
    """Columns of a tile of the model's rows: what the gather multiplies by digits is wider."""
    config = candidate.config
    if not multiplies("gather", candidate):
        return int(config.gather_block)
    held = _DECIDED_PER_THREAD * config.gather_warps * candidate.lanes
    return int(min(config.gather_block, held // config.gather_rows))


def _why_not_tiled(stage: str, candidate: Candidate) -> str | None:
    config = candidate.config
    warps, rows = getattr(config, f"{stage}_warps"), getattr(config, f"{stage}_rows")
    if multiplies(stage, candidate):
        return why_not_digit_tiled(stage, warps, _slots(stage, candidate), candidate)
    if rows > (most := {"score": 16, "gather": 32}[stage]):
        return f"tiles of more than {most} rows are for digits"
    return why_not_tiled(stage, warps, candidate)


def _why_not_selected(candidate: Candidate) -> str | None:
    """What a selection method does not support."""
    problem, selection = candidate.problem, candidate.config.selection
    if problem.n_rescored and selection == "in_gather":
        return "in_gather writes no list from which candidates could be decided again"
    if selection == "in_gather" and multiplies("gather", candidate):
        return "in_gather searches with all of its warps, but digits need a list of clusters"
    if problem.n_pinned and selection == "torch_topk":
        return "torch.topk cannot pin clusters"
    return why_not_selected(problem, select_warps(candidate.config))


def _starts(problem: Problem, device: Device) -> Sequence[StagedConfig]:
    quantised = format_of(problem.weight_dtype).quantised
    return narrowed((*_QUANTISED_STARTS, *_STARTS) if quantised else _STARTS, problem)


STAGED = Plan(
    config=StagedConfig,
    builder="triton",
    template="triton/staged.py.j2",
    rules=(
        read_by("triton"),
        BY_BITS,
        BY_DIGITS,
        Rule(
            lambda each: _why_not_tiled("score", each),
            frozenset(["widen", *(f"score_{each}" for each in TILE)]),
        ),
        Rule(
            lambda each: _why_not_tiled("gather", each),
            frozenset(["widen", *(f"gather_{each}" for each in TILE)]),
        ),
        Rule(why_not_overlapped, frozenset(["pdl"])),
        Rule(_why_not_selected, frozenset(["selection", "select_warps", "gather_warps", "widen"])),
        Rule(why_not_prefetched, frozenset(["prefetch_margin"])),
    ),
    launches=_launches,
    values=_values,
    slack=slack_of,
    starts=_starts,
)


def baseline(problem: Problem, device: Device) -> StagedConfig:
    """The baseline of every comparison: `torch.topk`, one program per probed cluster.

    `torch.topk` can't pin clusters; if some are pinned, a threshold selects them.
    """
    rows = min(16, next_power_of_2(problem.cluster_size))
    selection = "threshold" if problem.n_pinned else "torch_topk"
    return _fitted(StagedConfig(selection=selection, gather_rows=rows), problem, device)


def default(problem: Problem, device: Device) -> StagedConfig:
    """A config that is valid for every problem whose scores fit a program's registers."""
    return _fitted(StagedConfig(), problem, device)


def _fitted(config: StagedConfig, problem: Problem, device: Device) -> StagedConfig:
    """The config with tiles narrowed, then warps taken away, until it is valid."""
    data: dict[str, Any] = asdict(config)
    lanes = Candidate(problem, config, device).lanes
    widest = max(64, next_power_of_2(problem.hidden_size))
    for stage, sums in (("score", problem.n_tokens), ("gather", 1)):
        data[f"{stage}_block"] = min(data[f"{stage}_block"], widest)
        room = MAX_TILE_PER_THREAD * data[f"{stage}_warps"] * lanes
        while data[f"{stage}_rows"] * data[f"{stage}_block"] * sums > room:
            smaller = f"{stage}_rows" if data[f"{stage}_rows"] > 1 else f"{stage}_block"
            data[smaller] = data[smaller] // 2
        tile = data[f"{stage}_rows"] * data[f"{stage}_block"]
        data[f"{stage}_warps"] = min(data[f"{stage}_warps"], tile // lanes)
    fitted = StagedConfig(**data)
    reason = why_broken(STAGED.rules, Candidate(problem, fitted, device))
    if reason:
        raise FlashtuneError(f"no default kernel for {problem.describe()}: {reason}")
    return fitted
