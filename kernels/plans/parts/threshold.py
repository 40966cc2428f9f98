"""The search for a threshold over the clusters' scores: where it starts, and in which lanes.

The search itself is in the templates. docs/design.md and decision 3 describe it.
"""

import math
from statistics import NormalDist

from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.templates.render import Value
from flashtune.tuning_db.problem import Problem

# Programs that share the prefetch of a cluster: the likely ones are unevenly spread, and a program
# with several of its own would request them one after another. Measured against 1 and 16 on an
# H200.
SPREAD = 4


def threshold_values(problem: Problem, slack: int) -> dict[str, Value]:
    """Where the threshold search starts: the normal quantile at the middle of what is accepted.

    hazard is -d log(count) / d quantile there.
    """
    return search_values(problem.n_probes, slack, problem.n_clusters)


def threshold_quantile(problem: Problem, slack: int) -> float:
    """The expected threshold, in standard deviations above the mean, for normal scores."""
    return _quantile(_share(problem.n_probes, slack, problem.n_clusters))


def search_values(least: int, slack: int, number: int) -> dict[str, Value]:
    """Where a search for `least` of so many scores, or up to `slack` more, starts."""
    share = _share(least, slack, number)
    quantile = _quantile(share)
    return {
        "quantile": round(quantile, 6),
        "hazard": round(NormalDist().pdf(quantile) / share, 6),
        "log_target": round(math.log(least + slack / 2), 6),
    }


def _quantile(share: float) -> float:
    return NormalDist().inv_cdf(1 - share)


def _share(least: int, slack: int, number: int) -> float:
    """The share of scores to select, kept inside (0, 1)."""
    return min(max((least + slack / 2) / number, 1e-6), 1 - 1e-6)


def prefetch_spread(problem: Problem, parts: int) -> int:
    """How many of the `parts` programs that gather share the prefetch of a cluster."""
    spread = SPREAD
    while spread > 1 and (spread > parts or problem.cluster_bytes % (spread * 16)):
        spread //= 2
    return spread


def lanes(number: int, warps: int) -> int:
    """Scores side by side in a Triton plan's search: four per thread of 32, a 16-byte load."""
    return min(128 * warps, max(64, next_power_of_2(number)))


def lane_values(problem: Problem, slack: int, warps: int) -> dict[str, Value]:
    """The search in a Triton plan: where it starts, how scores map to lanes."""
    width = lanes(problem.n_clusters, warps)
    return {
        **threshold_values(problem, slack),
        "lanes": width,
        "members": -(-problem.n_clusters // width),
        "prefetch": False,
    }


def prefetch_values(problem: Problem, slack: int, margin: int) -> dict[str, Value]:
    """Which clusters' rows are prefetched before it is known whether they are selected."""
    least = threshold_quantile(problem, slack) - margin / 100
    return {"prefetch": margin >= 0, "prefetch_quantile": round(least, 6)}


def share_values(problem: Problem, gather_rows: int, warps: int, parts: int) -> dict[str, Value]:
    """How the selected rows, and the clusters to prefetch from, are shared out among programs."""
    touched = (gather_rows - 2) // problem.cluster_size + 2 if gather_rows > 1 else 1
    spread = prefetch_spread(problem, parts)
    stripe = -(-problem.n_clusters // (parts // spread))
    stripe_padded = next_power_of_2(stripe)
    pieces = max(1, warps * 32 // stripe_padded)
    while pieces > 1 and problem.cluster_bytes % (pieces * spread * 16):
        pieces //= 2
    return {
        "spread": spread,
        "touched": touched,
        "stripe": stripe,
        "stripe_padded": stripe_padded,
        "pieces": pieces,
        "piece_bytes": problem.cluster_bytes // (pieces * spread),
    }
