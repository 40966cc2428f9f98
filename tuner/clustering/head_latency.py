"""What a head takes a step on this machine, by form and number of probes, beside dense heads.

Usage:
    latency = HeadLatency(parts, states)
    latency.dense()                       # Timing, in microseconds a call of one token
    latency.probing(256), latency.probing(256, form)
    latency.of(form, n_probes)            # any form's, or None where nothing runs it here

As in a search, weights are cold (copies of the centroids rotate, together larger than the cache),
and steps are timed by measure/trial.py. What runs is what FlashHead chooses here.
"""

import time
from dataclasses import replace

import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.measure.trial import Trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.kernels.runtime.binding import bind
from flashtune.kernels.special_token import SpecialTokens
from flashtune.kernels.weights import Step, Weights, problem_of, stored_weights, token_order
from flashtune.tuner.clustering.dense_step import dense_step
from flashtune.tuner.clustering.head_form import HeadForm, with_clusters
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

_REPLAYS = 30
_LEAST_REPLAYS, _SECONDS = 3, 5.0  # of a step that is slow


class HeadLatency:
    """Times the steps of one head on its weight's device."""

    def __init__(self, parts: HeadParts, states: torch.Tensor) -> None:
        """Nothing is laid out yet."""
        self._weight, self._centroids = parts.weight, parts.clusters.centroids
        self._order = token_order(parts.clusters.assignments, len(self._centroids)).to(
            self._weight.device
        )
        self._special = parts.special_token_ids
        self._problem = problem_of(self._weight, self._centroids, parts.n_probes, n_tokens=1)
        self._plain = with_clusters(self._problem.weight_dtype, None)
        self._states = states.to(self._weight.device, self._weight.dtype)
        self._laid_out: tuple[HeadForm, Weights] | None = None

    def of(self, form: HeadForm, n_probes: int) -> tuple[Timing, str] | None:
        """The timing of a form, and what ran: as `probing`, or `torch` for a dense head.

        None for a quantised dense head that torch has no product for here.
        """
        if form.clustered or form.screen:
            return self.probing(n_probes, form)
        timing = self.dense(form.rows)
        return None if timing is None else (timing, "torch")

    def dense(self, rows: str | None = None) -> Timing | None:
        """The dense head, its rows in the weight's dtype or another format."""
        rows = rows or self._plain.rows
        step = dense_step(rows, self._weight)
        weights = self._weights(self._plain)
        return step and self._time(self._problem, weights, step, f"the dense head in {rows}")

    def probing(self, n_probes: int, form: HeadForm | None = None) -> tuple[Timing, str]:
        """FlashHead with that many probes, and the level of its choice: exact … torch.

        form: plain unless given. Without clusters n_probes says nothing.
        """
        form = form or self._plain
        problem = replace(self._problem, n_probes=n_probes)
        problem = form.problem(problem, len(self._weight))
        weights = self._weights(form)
        bound = bind(problem, weights)
        step = self._with_special(bound.take_step(), form)
        what = f"the head with {n_probes} probes" if form.clustered else "the head"
        if form != self._plain:
            what = f"{what} in {form}"
        return self._time(problem, weights, step, what), bound.choice.level.value

    def _weights(self, form: HeadForm) -> Weights:
        """The weights as FlashHead lays them out, kept until those of another form are."""
        if self._laid_out is None or self._laid_out[0] != form:
            self._laid_out = None
            problem = form.problem(self._problem, len(self._weight))
            order, centroids = self._order, self._centroids
            if not form.clustered:
                order = torch.arange(len(self._weight), device=order.device)
                centroids = torch.zeros_like(centroids[:1])
            scored = format_of(problem.centroid_dtype).pack(centroids)
            self._laid_out = form, stored_weights(problem, self._weight, scored, order)
        return self._laid_out[1]

    def _with_special(self, step: Step, form: HeadForm) -> Step:
        """The step and what special tokens add to it, decided by the model's own rows."""
        if not (self._special and form.clustered):
            return step
        plain = form == self._plain
        order = (
            self._order if plain else torch.arange(len(self._weight), device=self._order.device)
        )
        special = SpecialTokens.of(self._special, order)

        def both(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            step(weights, hidden, out)
            rows = weights if plain else replace(weights, weight=self._weight)
            out.copy_(special(rows, hidden, out))

        return both

    def _time(self, problem: Problem, weights: Weights, step: Step, what: str) -> Timing:
        """The step's timing. No checks: `bind` has verified it, and special tokens change what
        is right. Raises FlashtuneError with the outcome where it fails.
        """
        device = device_of(self._weight.device)
        cold_bytes = device.l2_bytes
        n_sets = max(2, -(-2 * cold_bytes // problem.minimum_bytes) + 1)
        sets = tuple(replace(weights, centroids=weights.centroids.clone()) for _ in range(n_sets))
        states = tuple(self._states[index % len(self._states)][None] for index in range(n_sets))
        workload = Workload(problem, sets, states, ())
        trial: Trial[str] = Trial(workload, target_of(device).timer, policy="quality")
        trial.load(what, lambda: step)
        trial.admit(what, slack=0)
        trial.take_turns(_REPLAYS, least=_LEAST_REPLAYS, until=time.monotonic() + _SECONDS)
        found = trial.finish()[what]
        if found.median_us is None or found.spread_us is None:
            raise FlashtuneError(f"{what} cannot be timed: {found.outcome.value}: {found.error}")
        return Timing(found.median_us, found.spread_us, found.samples)
