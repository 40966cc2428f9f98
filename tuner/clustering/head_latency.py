"""A head's time per step on this machine, by form and number of probes, and dense heads'.

Usage:
    latency = HeadLatency(parts, states)
    latency.dense()                       # Timing, in microseconds per call of one token
    latency.probing(256), latency.probing(256, form)
    latency.of(form, n_probes)            # any form's, or None if nothing here runs it

As in a search, weights are cold (copies of the centroids rotate, together larger than the cache),
and steps are timed by measure/trial.py. The kernels are those that FlashHead chooses here.
"""

import time
from dataclasses import replace

import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.formats.format import dtype_name
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.measure.trial import Trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.kernels.runtime.binding import bind
from flashtune.kernels.weights import Step, Weights
from flashtune.tuner.clustering.dense_step import dense_step
from flashtune.tuner.clustering.head_form import HeadForm, with_clusters
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

_REPLAYS = 30
_LEAST_REPLAYS, _SECONDS = 3, 5.0  # for a slow step


class HeadLatency:
    """Times the steps of one head on its weight's device."""

    def __init__(self, parts: HeadParts, states: torch.Tensor) -> None:
        """Lays out nothing yet."""
        self._parts = parts
        self._plain = with_clusters(dtype_name(parts.weight), None)
        self._states = states.to(parts.weight.device, parts.weight.dtype)
        self._laid_out: tuple[HeadForm, FlashHead] | None = None

    def of(self, form: HeadForm, n_probes: int) -> tuple[Timing, str] | None:
        """The timing of a form, and what ran: as in `probing`, or `torch` for a dense head.

        None for a quantised dense head for which torch has no product here.
        """
        if form.clustered or form.screen:
            return self.probing(n_probes, form)
        timing = self.dense(form.rows)
        return None if timing is None else (timing, "torch")

    def dense(self, rows: str | None = None) -> Timing | None:
        """The dense head, its rows in the weight's dtype or another format."""
        rows = rows or self._plain.rows
        step = dense_step(rows, self._parts.weight)
        head = self._head(self._plain)
        return step and self._time(head.problem, head.decoder.weights, step, f"dense {rows}")

    def probing(self, n_probes: int, form: HeadForm | None = None) -> tuple[Timing, str]:
        """FlashHead with that many probes, and the level of its choice: exact … torch.

        form: default: plain. Without clusters n_probes has no effect.
        """
        form = form or self._plain
        head = self._head(form)
        problem, what = head.problem, "the head"
        if form.clustered:  # in addition to clusters added for special tokens
            problem = replace(problem, n_probes=problem.n_probes + n_probes - head.n_probes)
            what = f"the head with {n_probes} probes"
        if form != self._plain:
            what = f"{what} in {form}"
        bound = bind(problem, head.decoder.weights)
        timing = self._time(problem, head.decoder.weights, bound.take_step(), what)
        return timing, bound.choice.level.value

    def _head(self, form: HeadForm) -> FlashHead:
        """A FlashHead of the form, kept until another form is needed."""
        if self._laid_out is None or self._laid_out[0] != form:
            self._laid_out = None
            parts, clusters = self._parts, self._parts.clusters
            if form.clustered:
                head = FlashHead(
                    parts.weight,
                    clusters.centroids,
                    clusters.assignments,
                    n_probes=parts.n_probes,
                    special_token_ids=parts.special_token_ids,
                    screen=form.screen,
                    tune="never",
                )
            else:
                assert form.screen is not None
                head = FlashHead.screened(parts.weight, form.screen, tune="never")
            self._laid_out = form, head
        return self._laid_out[1]

    def _time(self, problem: Problem, weights: Weights, step: Step, what: str) -> Timing:
        """The step's timing, without checks: `bind` has verified it.

        Raises FlashtuneError with the outcome if it fails.
        """
        device = device_of(weights.weight.device)
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
