"""The plan `streamed`: CUDA C++ that streams whole rows through shared memory, for one token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.size import shape_values
from flashtune.kernels.plans.parts.threshold import (
    prefetch_spread,
    prefetch_values,
    threshold_values,
)
from flashtune.kernels.plans.parts.tile import SLACKS
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

MOST_SCORES_PER_THREAD = 64  # of the threshold search: a thread marks its own in a 64-bit number
MOST_RESCORED = 64  # a thread holds what some blocks have sent of these
MOST_STATIC = 48 * 1024  # bytes of shared memory that a block may have but for its ring
BASE_REGISTERS = 40  # of a thread, beside the hidden state
_STAGES = ("score", "gather")
_ARGUMENTS = ("hidden", "centroids", "weight", "ids", "out", "scores", "moments", "state")
_PLAIN, _READ = frozenset(["bf16", "fp16"]), frozenset(["bf16", "fp16", "int8"])


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedConfig(Config):
    """Score and gather in two overlapping launches, each with one block per multiprocessor.

    A warp has `stages` rows in flight, copied to shared memory by the bulk copy engine.
    prefetch_margin: how far below the expected threshold, in hundredths of a standard deviation
    of the scores, a cluster's rows are prefetched to L2; if negative, how far above. early:
    centroids are requested before the previous launch has ended. The kernel waits only for what
    that launch writes, which must not be the centroids.
    """

    plan: ClassVar[str] = "streamed"

    score_warps: int = knob(8, (4, 8, 12, 16))
    score_stages: int = knob(3, (1, 2, 3, 4, 6, 8))
    gather_warps: int = knob(16, (8, 12, 16, 24))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    slack: int = knob(16, SLACKS)
    prefetch: bool = knob(True, (False, True))
    prefetch_margin: int = knob(-10, (-40, -20, -10, 0, 5, 20), {"prefetch": (True,)})
    early: bool = knob(True, (False, True))


_STARTS = (
    StreamedConfig(),
    StreamedConfig(gather_warps=8, gather_stages=2),
    StreamedConfig(score_stages=2),  # rows of 6 KB
    # What fits if rows have 8 and 10 KB: not measured
    StreamedConfig(score_stages=2, gather_warps=8),
    StreamedConfig(score_stages=1, gather_warps=8),
)  # starting points of searches, found by hand on one H200


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    """The launches, in order.

    Shared memory is rounded up so that a multiprocessor holds one block of either launch, but not
    two of the same one: if a neighbouring block ended early, two would share a multiprocessor.
    """
    problem, config, device = candidate.problem, candidate.config, candidate.device
    limits = device.limits
    least = {
        "score": limits.shared_per_sm // 2 + limits.reserved_per_block,
        "gather": limits.shared_per_sm // 4 + limits.reserved_per_block,
    }
    listed = -(-problem.n_clusters // device.sm_count) + 2
    state = _row_bytes(problem.state_dtype, problem)
    decided = sent = 0
    if problem.n_rescored:  # each row's screened logit; in the ring, what the blocks have sent
        decided = 8 * -(-problem.vocab_size // device.sm_count) + 4 * problem.n_rescored + 8
        sent = 8 * device.sm_count * problem.n_rescored
    most_warps = max(config.score_warps, config.gather_warps)
    launches = []
    for kernel in _STAGES:
        warps, stages = (getattr(config, f"{kernel}_{each}") for each in ("warps", "stages"))
        stored = format_of(_dtype(kernel, problem))
        row = _row_bytes(stored.name, problem)
        # the hidden state, barriers, and what warps exchange
        fixed = state + 8 * (warps * stages + 1) + 16 * warps + 4 * listed + 256
        if stored.quantised:  # the hidden state in whole numbers, aligned
            fixed += 2 * problem.hidden_size + 4 * most_warps + 256
        if kernel == "gather":
            fixed += decided + 4 * warps
        filled = max(warps * stages * row, sent if kernel == "gather" else 0)
        ring = -(-max(filled, least[kernel] - fixed) // 128) * 128
        launches.append(
            KernelUse(
                kernel=kernel,
                programs=device.sm_count,
                warps=warps,
                registers=BASE_REGISTERS + _held_registers(problem),
                shared_bytes=ring + fixed,
                dynamic_bytes=ring,
                arguments=_arguments(problem),
            )
        )
    return launches


def _dtype(kernel: str, problem: Problem) -> str:
    """The dtype of the rows that a kernel streams."""
    return problem.centroid_dtype if kernel == "score" else problem.weight_dtype


def _arguments(problem: Problem) -> tuple[str, ...]:
    """Arguments of either launch: scales and the model's own rows only if they are read."""
    found = list(_ARGUMENTS)
    if format_of(problem.centroid_dtype).quantised:
        found.append("centroid_scales")
    if format_of(problem.weight_dtype).quantised:
        found.append("weight_scales")
    return (*found, *(["model_weight", "candidates"] if problem.n_rescored else []))


def _row_bytes(dtype: str, problem: Problem) -> int:
    """Bytes of a row's numbers, without its scale."""
    return problem.hidden_size * format_of(dtype).bits // 8


def _held_registers(problem: Problem) -> int:
    """Registers of a lane's share of a hidden state: 8 elements at a time, as float32 pairs."""
    return 4 * -(-problem.hidden_size // 256)


def _values(candidate: Candidate) -> dict[str, Value]:
    problem, config, blocks = candidate.problem, candidate.config, candidate.device.sm_count
    spread = prefetch_spread(problem, blocks)
    margin = prefetch_values(problem, config.slack, config.prefetch_margin)
    return {
        **shape_values(problem),
        **asdict(config),
        **threshold_values(problem, config.slack),
        "weight_dtype": problem.weight_dtype,
        "centroid_dtype": problem.centroid_dtype,
        "state_dtype": problem.state_dtype,
        "rescored": problem.n_rescored,
        "pinned": problem.n_pinned,
        "blocks": blocks,
        "prefetch_quantile": margin["prefetch_quantile"],
        "spread": spread,
        "stripe": -(-problem.n_clusters // (blocks // spread)),
    }


def _dtypes(problem: Problem) -> set[str]:
    """The formats of the rows that either launch reads."""
    decided = [problem.state_dtype] if problem.n_rescored else []
    return {problem.weight_dtype, problem.centroid_dtype, *decided}


def _why_not_streamed(candidate: Candidate) -> str | None:
    problem = candidate.problem
    if problem.n_tokens > 1:
        return f"streamed decodes one token at a time, not {problem.n_tokens}"
    if problem.in_place:
        return "streamed copies adjacent rows, not rows in place"
    if problem.n_rescored > MOST_RESCORED:
        return f"streamed decides at most {MOST_RESCORED} tokens again, not {problem.n_rescored}"
    if candidate.device.capability < 90:
        return "bulk copies to shared memory need sm_90 or later"
    dtypes = _dtypes(problem) | {problem.state_dtype}
    if dtypes - _READ or problem.state_dtype not in _PLAIN:
        return f"streamed is for weights of 16 bits or int8, not {', '.join(sorted(dtypes))}"
    multiple = 16 if dtypes - _PLAIN else 8
    if problem.hidden_size % multiple:
        return (
            f"bulk copies need a hidden size that is a multiple of {multiple}, not "
            f"{problem.hidden_size}"
        )
    return None


def _why_not_searched(candidate: Candidate) -> str | None:
    clusters, warps = candidate.problem.n_clusters, candidate.config.gather_warps
    if candidate.problem.n_pinned > 4 * candidate.lanes * warps:
        return f"{candidate.problem.n_pinned} pinned clusters are too many for {warps} warps"
    if clusters > MOST_SCORES_PER_THREAD * candidate.lanes * warps:
        return f"{clusters} scores are too many for {warps} warps"
    return None


def _why_not_held(candidate: Candidate) -> str | None:
    needed = BASE_REGISTERS + _held_registers(candidate.problem)
    for stage in _STAGES:
        warps = getattr(candidate.config, f"{stage}_warps")
        if needed > candidate.device.limits.registers_per_sm // (candidate.lanes * warps):
            return f"the hidden state does not fit the registers of {warps} warps in the {stage}"
    return None


def _why_not_beside(candidate: Candidate) -> str | None:
    launches, limits = _launches(candidate), candidate.device.limits
    for launch in launches:
        if launch.shared_bytes - launch.dynamic_bytes > MOST_STATIC:
            return (
                f"what a block of the {launch.kernel} keeps of its rows needs more than "
                f"{MOST_STATIC // 1024} KiB of shared memory on {candidate.device.sm_count} "
                "multiprocessors"
            )
        if launch.shared_bytes > limits.shared_per_block:
            return f"the rows in flight of the {launch.kernel} do not fit in shared memory"
    taken = sum(each.shared_bytes + limits.reserved_per_block for each in launches)
    if taken > limits.shared_per_sm:
        return "the rows in flight of score and gather do not fit on one multiprocessor"
    return None


def _starts(problem: Problem, device: Device) -> Sequence[StreamedConfig]:
    return _STARTS


STREAMED = Plan(
    config=StreamedConfig,
    builder="cuda",
    template="cuda/streamed.cu.j2",
    rules=(
        Rule(_why_not_streamed),
        Rule(_why_not_searched, frozenset(["gather_warps"])),
        Rule(_why_not_held, frozenset(["score_warps", "gather_warps"])),
        Rule(
            _why_not_beside,
            frozenset(["score_warps", "score_stages", "gather_warps", "gather_stages"]),
        ),
    ),
    launches=_launches,
    values=_values,
    slack=lambda config: int(config.slack),
    starts=_starts,
)
