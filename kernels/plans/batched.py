"""The plan `batched`: several tokens at a time on tensor cores, each probed cluster read once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.digits import digit_launches, digit_values
from flashtune.kernels.plans.parts.screen import (
    DECIDE_WARPS,
    single_rows_passes,
    single_rows_values,
    why_not_bounded,
)
from flashtune.kernels.plans.parts.size import (
    epilogue_values,
    next_power_of_2,
    read_by,
    shape_values,
    stored_values,
)
from flashtune.kernels.plans.parts.tensor_tile import (
    TENSOR_TILE,
    expected_tensor_pass,
    padded_tokens,
    why_not_tensor_tiled,
)
from flashtune.kernels.plans.parts.threshold import lane_values
from flashtune.kernels.plans.parts.tile import (
    SLACKS,
    expected_search,
    narrowed,
    why_not_overlapped,
    why_not_selected,
)
from flashtune.kernels.plans.parts.widen import BY_BITS, BY_DIGITS, MULTIPLIED
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchedConfig(Config):
    """Score, find a threshold for each token, then pass once over the clusters of any token.

    A cluster that several tokens probe is read once. With `visit` "all" the gather has a tile for
    every cluster, of as many whole clusters as fit `gather_rows`, and reads the rows that any
    token probes; with "listed" the tokens' clusters are listed first, and tiles are filled with
    their rows. Other knobs are as in StagedConfig.
    """

    plan: ClassVar[str] = "batched"

    widen: str = knob("cast", MULTIPLIED)
    score_rows: int = knob(32, (16, 32, 64, 128))
    score_block: int = knob(128, (32, 64, 128, 256))
    score_warps: int = knob(2, (1, 2, 4, 8))
    score_stages: int = knob(3, (1, 2, 3, 4, 5))
    select_warps: int = knob(16, (4, 8, 16, 32))
    slack: int = knob(16, SLACKS)
    visit: str = knob("all", ("all", "listed"))
    gather_rows: int = knob(16, (16, 32, 64, 128, 256))
    gather_block: int = knob(128, (32, 64, 128, 256))
    gather_warps: int = knob(1, (1, 2, 4, 8))
    gather_stages: int = knob(3, (1, 2, 3, 4, 5))
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


_DIGITS = BatchedConfig(
    widen="digits", visit="listed", score_rows=64, score_warps=4, gather_rows=32, gather_warps=2
)  # as the cost model has it: none was measured
_STARTS = (
    BatchedConfig(),
    BatchedConfig(
        score_block=256,
        score_warps=1,
        score_stages=4,
        select_warps=8,
        slack=64,
        gather_block=256,
    ),
    BatchedConfig(score_warps=1, gather_rows=64, gather_warps=4, pdl=True),
    BatchedConfig(score_warps=1, gather_rows=64, gather_warps=4),
    BatchedConfig(
        score_rows=16,
        score_warps=1,
        score_stages=4,
        select_warps=8,
        visit="listed",
        gather_rows=64,
        gather_warps=2,
        widen="bits",
        pdl=True,
    ),
    BatchedConfig(
        score_warps=1, score_stages=4, select_warps=8, visit="listed", gather_stages=5, pdl=True
    ),
    replace(_DIGITS, pdl=True),
    _DIGITS,
)  # starting points of searches: found on one H200, those of a list on one H100


def tile_share(candidate: Candidate) -> int:
    """Rows of a tile of the gather: those of whole clusters."""
    size = candidate.problem.cluster_size
    return int(candidate.config.gather_rows) // size * size


def _most_listed(candidate: Candidate) -> int:
    """Clusters that the tokens probe, if they share none and none tie."""
    problem = candidate.problem
    probed = problem.n_probes + int(candidate.config.slack)
    return min(problem.n_clusters, problem.n_tokens * probed + problem.n_pinned)


def _tiles(candidate: Candidate) -> int:
    problem, config = candidate.problem, candidate.config
    if config.visit == "listed":
        return -(-_most_listed(candidate) * problem.cluster_size // int(config.gather_rows))
    return -(-problem.vocab_size // tile_share(candidate))


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    """One program per tile; for a list, as many as it needs if no clusters tie."""
    problem, config = candidate.problem, candidate.config
    score_tiles = -(-problem.n_clusters // config.score_rows)
    gather_tiles = _tiles(candidate)
    gather = expected_tensor_pass("gather", candidate, gather_tiles)
    return (
        *digit_launches(candidate),
        expected_tensor_pass("score", candidate, score_tiles),
        expected_search(candidate, config.select_warps),
        gather,
        *single_rows_passes(candidate, gather),
    )


def _values(candidate: Candidate) -> dict[str, Value]:
    problem, config = candidate.problem, candidate.config
    uses = {use.kernel: use for use in _launches(candidate)}
    score, gather = uses["score"], uses["gather"]
    probed = problem.n_probes + config.slack // 2 + problem.n_pinned
    return {
        **shape_values(problem),
        **stored_values(problem),
        **asdict(config),
        **digit_values(candidate),
        "tokens_padded": padded_tokens(candidate),
        "gather_programs": gather.programs,
        "share": tile_share(candidate),
        "listed_at_once": next_power_of_2(problem.n_probes + config.slack + problem.n_pinned),
        "score_programs": score.programs,
        **lane_values(problem, config.slack, config.select_warps),
        **epilogue_values(problem, score),
        **single_rows_values(problem, gather.programs, probed),
    }


def _why_not_whole(candidate: Candidate) -> str | None:
    size, rows = candidate.problem.cluster_size, candidate.config.gather_rows
    if candidate.config.visit == "listed":
        return None
    return f"a cluster of {size} does not fit {rows} rows" if rows < size else None


def _why_not_bounded(candidate: Candidate) -> str | None:
    if _why_not_whole(candidate):
        return None  # another rule's
    return why_not_bounded(candidate.problem, _tiles(candidate), DECIDE_WARPS)


def _why_not_multiplied(candidate: Candidate) -> str | None:
    """Quantised numbers are converted to the hidden state's dtype; others must have it."""
    problem = candidate.problem
    if format_of(problem.centroid_dtype).quantised:
        return None
    if problem.centroid_dtype != problem.state_dtype:
        return (
            f"tensor cores need one dtype, not hidden states in {problem.state_dtype} and "
            f"centroids in {problem.centroid_dtype}"
        )
    return None


def _starts(problem: Problem, device: Device) -> Sequence[BatchedConfig]:
    return narrowed(_STARTS, problem)


BATCHED = Plan(
    config=BatchedConfig,
    builder="triton",
    template="triton/batched.py.j2",
    rules=(
        read_by("triton"),
        Rule(why_not_overlapped, frozenset(["pdl"])),
        BY_BITS,
        BY_DIGITS,
        Rule(
            lambda each: why_not_selected(each.problem, each.config.select_warps),
            frozenset(["select_warps"]),
        ),
        Rule(
            lambda each: why_not_tensor_tiled("score", each),
            frozenset(["widen", *(f"score_{each}" for each in TENSOR_TILE)]),
        ),
        Rule(
            lambda each: why_not_tensor_tiled("gather", each),
            frozenset(["widen", *(f"gather_{each}" for each in TENSOR_TILE)]),
        ),
        Rule(_why_not_whole, frozenset(["gather_rows", "visit"])),
        Rule(_why_not_bounded, frozenset(["gather_rows", "visit", "slack"])),
        Rule(_why_not_multiplied, frozenset(["slack"])),
    ),
    launches=_launches,
    values=_values,
    slack=lambda config: int(config.slack),
    starts=_starts,
    tensor_cores=True,
)


def default(problem: Problem) -> BatchedConfig:
    """The config to run without a record.

    For 16-bit rows on an H100, "all" is fastest; for quantised rows, starting so many programs
    takes longer than listing the clusters first.
    """
    if not format_of(problem.weight_dtype).quantised:
        return BatchedConfig()
    widen = "bits" if "int8" in (problem.weight_dtype, problem.centroid_dtype) else "cast"
    return BatchedConfig(visit="listed", gather_rows=32, gather_warps=2, widen=widen)
