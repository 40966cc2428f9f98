"""How many rounds the search for the threshold takes, by running it on normal scores.

Usage:
    mean_rounds(n_clusters=9496, n_probes=256, slack=16)     # 1.5 or so

The search is that of `templates/triton/_threshold.py.j2`, in numpy.
"""

import functools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_DRAWS = 64
_SECANT_ROUNDS = 12
_MOST_ROUNDS = 64


@functools.cache
def mean_rounds(n_clusters: int, n_probes: int, slack: int) -> float:
    """The mean number of counts until `n_probes … n_probes + slack` scores are selected."""
    generator = np.random.default_rng(0)
    draws = (generator.standard_normal(n_clusters) for _ in range(_DRAWS))
    return sum(_rounds(scores, n_probes, slack) for scores in draws) / _DRAWS


def _rounds(scores: NDArray[np.float64], n_probes: int, slack: int) -> int:
    target = math.log(n_probes + slack / 2)
    share = min(max((n_probes + slack / 2) / len(scores), 1e-6), 1 - 1e-6)
    quantile = NormalDist().inv_cdf(1 - share)
    low, high = float(scores.min()) - 1, float(scores.max()) + 1
    guess = float(scores.mean() + quantile * scores.std())
    step = float(scores.std()) * share / NormalDist().pdf(quantile)
    before = log_before = 0.0
    for number in range(1, _MOST_ROUNDS):
        if not low < guess < high or number > _SECANT_ROUNDS:
            guess = (low + high) / 2
        count = int((scores >= guess).sum())
        if n_probes <= count <= n_probes + slack:
            return number
        low, high = (guess, high) if count >= n_probes else (low, guess)
        log_count = math.log(max(count, 0.5))
        if number > 1 and log_count != log_before:
            step = (guess - before) / (log_before - log_count)
        before, log_before = guess, log_count
        guess += step * (log_count - target)
    return _MOST_ROUNDS
