"""What a head takes a step on this machine, by number of probes, beside the dense head.

Usage:
    latency = HeadLatency(parts, states)
    latency.dense(), latency.probing(256)      # Timing, in microseconds a call of one token

As in a search, weights are cold (copies of the centroids rotate, together larger than the cache),
and steps are timed by measure/trial.py.
What runs is what FlashHead chooses here.
"""

from dataclasses import replace

import torch
from torch.nn.functional import linear

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.measure.trial import Trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.kernels.runtime.binding import bind
from flashtune.kernels.special_token import most_pinned, pin
from flashtune.kernels.weights import Step, Weights, problem_of, token_order
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

_REPLAYS = 30


class HeadLatency:
    """Times the steps of one head on its weight's device."""

    def __init__(self, parts: HeadParts, states: torch.Tensor) -> None:
        """Lay the weights out as FlashHead does."""
        weight, centroids = parts.weight, parts.clusters.centroids
        problem = problem_of(weight, centroids, parts.n_probes, n_tokens=1)
        order = token_order(parts.clusters.assignments, problem.n_clusters).to(weight.device)
        most = most_pinned(parts.n_probes)
        pinned = pin(order, problem.n_clusters, parts.special_token_ids, most)
        self._weights = Weights(
            weight=weight[pinned.order],
            centroids=pinned.centroids(centroids),
            ids=pinned.order.to(torch.int32),
        )
        self._dense_weight = weight
        self._problem = replace(
            problem,
            vocab_size=pinned.order.numel(),
            n_clusters=problem.n_clusters + pinned.n_added,
            n_pinned=pinned.n_pinned,
        )
        self._n_added = pinned.n_added
        self._states = states.to(weight.device, weight.dtype)

    def dense(self) -> Timing:
        """The dense head: a product with all of the weight, then argmax."""

        def step(_: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            torch.argmax(linear(hidden, self._dense_weight), dim=-1, out=out)

        return self._time(self._problem, step, "the dense head")

    def probing(self, n_probes: int) -> tuple[Timing, str]:
        """FlashHead with that many probes, and the level of its choice: exact … torch."""
        problem = replace(self._problem, n_probes=n_probes + self._n_added)
        bound = bind(problem, self._weights)
        timing = self._time(problem, bound.take_step(), f"the head with {n_probes} probes")
        return timing, bound.choice.level.value

    def _time(self, problem: Problem, step: Step, what: str) -> Timing:
        """The step's timing. No checks: `bind` has verified it.

        Raises FlashtuneError with the outcome where it fails.
        """
        device = device_of(self._weights.weight.device)
        cold_bytes = device.l2_bytes
        n_sets = max(2, -(-2 * cold_bytes // problem.minimum_bytes) + 1)
        sets = tuple(
            Weights(
                weight=self._weights.weight,
                centroids=self._weights.centroids.clone(),
                ids=self._weights.ids,
            )
            for _ in range(n_sets)
        )
        states = tuple(self._states[index % len(self._states)][None] for index in range(n_sets))
        workload = Workload(problem, sets, states, ())
        trial: Trial[str] = Trial(workload, target_of(device).timer, policy="quality")
        trial.load(what, lambda: step)
        trial.admit(what, slack=0)
        trial.take_turns(_REPLAYS)
        found = trial.finish()[what]
        if found.median_us is None or found.spread_us is None:
            raise FlashtuneError(f"{what} cannot be timed: {found.outcome.value}: {found.error}")
        return Timing(found.median_us, found.spread_us, found.samples)
