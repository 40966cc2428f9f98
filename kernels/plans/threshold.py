"""What the templates of every backend are filled in with."""

import math
from statistics import NormalDist

from flashtune.kernels.weights import FILL
from flashtune.templates.render import Value
from flashtune.tuning_db.problem import Problem

# Programs that share the prefetch of a cluster: the likely ones lie unevenly, and a program that
# had several to itself would ask for them one after another. Measured against 1 and 16 on an H200.
SPREAD = 4


def shape_values(problem: Problem) -> dict[str, Value]:
    """The sizes of the problem, and what comes out."""
    return {
        "vocab": problem.vocab_size,
        "hidden": problem.hidden_size,
        "clusters": problem.n_clusters,
        "cluster_size": problem.cluster_size,
        "probes": problem.n_probes,
        "tokens": problem.n_tokens,
        "epilogue": problem.epilogue,
        "fill": FILL,
    }


def threshold_values(problem: Problem, slack: int) -> dict[str, Value]:
    """Where the threshold search starts: the normal quantile at the middle of what is accepted.

    hazard is -d log(count) / d quantile there.
    """
    quantile, share = threshold_quantile(problem, slack), _share(problem, slack)
    return {
        "quantile": round(quantile, 6),
        "hazard": round(NormalDist().pdf(quantile) / share, 6),
        "log_target": round(math.log(problem.n_probes + slack / 2), 6),
    }


def threshold_quantile(problem: Problem, slack: int) -> float:
    """How many deviations above the mean the expected threshold lies, for normal scores."""
    return NormalDist().inv_cdf(1 - _share(problem, slack))


def _share(problem: Problem, slack: int) -> float:
    """The share of clusters to select, kept inside (0, 1)."""
    return min(max((problem.n_probes + slack / 2) / problem.n_clusters, 1e-6), 1 - 1e-6)


def prefetch_spread(problem: Problem, parts: int) -> int:
    """How many of the `parts` programs that gather share the prefetch of a cluster."""
    spread = SPREAD
    while spread > 1 and (spread > parts or problem.cluster_bytes % (spread * 16)):
        spread //= 2
    return spread
