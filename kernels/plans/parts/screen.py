"""Quantised rows screen candidates, and the model's own rows decide among the best of them.

Each program that screens stores the best logit of its share. If n_rescored of these maxima reach a
bound, at least as many candidates do; all that reach it are decided. More may be decided: the
search for the bound ends early, with up to twice as many maxima above it.
"""

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.kernels.plans.parts.threshold import lanes, search_values
from flashtune.kernels.plans.parts.tile import BASE_REGISTERS, MOST_MEMBERS
from flashtune.templates.render import Value
from flashtune.tuning_db.problem import Problem

MOST_BOUNDED = 4096  # maxima that every program of a launch may search: one warp can hold them
DECIDE_WARPS = 8  # of programs that decide one row after another
_ROW_PER_THREAD = 32  # elements of a model's row per thread, if rows are read one by one


def bound_values(problem: Problem, maxima: int, counted: int, warps: int) -> dict[str, Value]:
    """How so many warps search a token's maxima, of which about `counted` are finite."""
    if not problem.n_rescored:
        return {}
    width, counted = lanes(maxima, warps), min(maxima, max(1, counted))
    start = search_values(problem.n_rescored, problem.n_rescored, counted)
    return {
        "bound_maxima": maxima,
        "bound_counted": counted,
        "bound_lanes": width,
        "bound_members": -(-maxima // width),
        "bound_most": 2 * problem.n_rescored,
        **{f"bound_{name}": value for name, value in start.items()},
    }


def single_rows_values(problem: Problem, maxima: int, counted: int) -> dict[str, Value]:
    """How candidates are decided one after another, by programs that each find the bound."""
    if not problem.n_rescored:
        return {}
    return {
        **bound_values(problem, maxima, counted, DECIDE_WARPS),
        "decide_warps": DECIDE_WARPS,
        "decide_block": _block(problem),
        "deciders": deciders(problem, maxima),
    }


def deciders(problem: Problem, maxima: int) -> int:
    """Programs that decide for one token: one for each maximum that reaches the bound."""
    return min(2 * problem.n_rescored, maxima)


def single_rows_passes(candidate: Candidate, gather: KernelUse) -> tuple[KernelUse, ...]:
    """The launch that follows a gather that screens for several tokens at a time."""
    problem, threads = candidate.problem, candidate.lanes * DECIDE_WARPS
    if not problem.n_rescored:
        return ()
    rows, block = int(candidate.config.gather_rows), 2 * _block(problem)
    return (
        KernelUse(
            kernel="decide",
            programs=deciders(problem, gather.programs) * problem.n_tokens,
            warps=DECIDE_WARPS,
            registers=BASE_REGISTERS + (gather.programs + 4 * rows + block) // threads,
            shared_bytes=0,
        ),
    )


def _block(problem: Problem) -> int:
    return min(max(64, next_power_of_2(problem.hidden_size)), 32 * DECIDE_WARPS * _ROW_PER_THREAD)


def why_not_bounded(problem: Problem, maxima: int, warps: int) -> str | None:
    """Why so many warps cannot search a token's maxima, or None."""
    if problem.n_rescored and -(-maxima // lanes(maxima, warps)) > MOST_MEMBERS:
        return f"the best of {maxima} programs do not fit the registers of {warps} warps"
    return None


def why_not_rescored(candidate: Candidate) -> str | None:
    """For plans with no launch after the gather, where the best candidates are unknown."""
    if candidate.problem.n_rescored:
        return f"plan {candidate.config.plan} has no launch that decides candidates again"
    return None
