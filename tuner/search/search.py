"""The search for one problem on one device: propose, evaluate, learn, write everything down.

Usage:
    result = search(space, evaluator, store, Budget(trials=200), toolchain=toolchain)
    result.winner           # the Record to use, None when nothing worked

What has been found out already is read from the store first, so a search that was interrupted
goes on where it was.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from flashtune.kernels.backends.target import baseline_config, default_config
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.tuner.objective import Objective, front
from flashtune.tuner.search.evaluate import Evaluator
from flashtune.tuner.search.failure import Failure, known_remedy, most_frequent
from flashtune.tuner.search.proposal import Proposals, references
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.store import FINAL_POLICY, Store

FINALISTS = 6
MOST_COMPARISONS = 10  # in which none fails, but the lead is lost


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a search may spend. `trials` counts evaluations, those of interrupted runs included."""

    trials: int
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """How far a search is: one after each evaluation, and one before the finalists are timed.

    total: the budget's trials, or as many as there turn out to be configs. stops: when, by the
    monotonic clock, time runs out.
    """

    done: int
    total: int
    failed: int
    best_us: float | None
    best: Config | None
    comparing: bool = False
    stops: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a search came to. Times are of the final comparison where there was one.

    `searched_us` is the best time before that comparison, `failure` the most frequent reason of
    failures, if any. `default_kept`: nothing beat the default by more than the noise. `front`:
    where energy counts, the records that no other beats in both time and energy, fastest first. A
    search that timed out or was cancelled (Ctrl-C) has all that it measured in the store; only a
    cancelled one leaves the finalists uncompared.
    """

    problem: Problem
    winner: Record | None
    searched_us: float | None
    default_us: float | None
    baseline_us: float | None
    evaluated: int
    failed: int
    failure: Failure | None
    default_kept: bool
    objective: Objective
    front: tuple[Record, ...]
    timed_out: bool
    cancelled: bool


def search(
    space: Space,
    evaluator: Evaluator,
    store: Store,
    budget: Budget,
    *,
    toolchain: Toolchain,
    sampler: str = "tpe",
    seed: int = 0,
    near: Iterable[Record] = (),
    retry_failed: bool = False,
    objective: Objective = Objective.TIME,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Result:
    """Search `space` within `budget`; every evaluation is in the store before the next one.

    near: records of any problems or devices, whose configs are tried early. retry_failed:
    evaluate first, and again, what failed in earlier runs. objective: what to minimise; what was
    measured without that is evaluated again. KeyboardInterrupt ends the search
    early; the finalists are then not compared.
    """
    proposals = Proposals(space, sampler=sampler, seed=seed, near=near)
    run = _Run(proposals, evaluator, store, budget, toolchain, objective)
    run.recall(retry_failed)
    timed_out = cancelled = False
    try:
        timed_out = run.evaluate(on_event)
        on_event(run.event(comparing=True))
        run.compare()
    except KeyboardInterrupt:
        cancelled = True
    return run.result(timed_out, cancelled)


@dataclass
class _Run:
    """One search's parts; `search` above is its story."""

    proposals: Proposals
    evaluator: Evaluator
    store: Store
    budget: Budget
    toolchain: Toolchain
    objective: Objective

    def __post_init__(self) -> None:
        self.space = self.proposals.space
        self.measured: dict[Config, Measurement] = {}  # by the search; proposals know costs
        self.finals: dict[Config, Measurement] = {}  # what finalists cost
        self.timed_again: dict[Config, Measurement] = {}  # what they took
        self.default = default_config(self.space.problem, self.space.device)
        self.stops = time.monotonic() + (self.budget.timeout_s or math.inf)
        self.dry = False  # no config is left to propose

    def recall(self, retry_failed: bool) -> None:
        """Learn from the store what earlier runs found out, or propose it again if it failed."""
        for record in self.store.records(
            device=self.space.device.name, toolchain=self.toolchain, problem=self.space.problem
        ):
            if record.provenance is not self.evaluator.provenance:
                continue
            try:
                config = parse_config(record.config)
            except FlashtuneError:
                continue  # of another version of its plan
            if retry_failed and record.measurement.median_us is None:
                self.proposals.retry(config)
            elif self.objective.knows(record.measurement):
                self.measured[config] = record.measurement
                self.proposals.recall(config, self.objective.seen(record.measurement))

    def evaluate(self, on_event: Callable[[Event], None]) -> bool:
        """Evaluate until the budget is spent; True when time ran out first."""
        known = self.proposals.known
        while True:
            left = self.budget.trials - len(known) - self.evaluator.pending
            for _ in range(0 if self.dry else min(self.evaluator.room, left)):
                config = next(self.proposals, None)
                if config is None:
                    self.dry = True
                    break
                self.evaluator.submit(config)
            if not self.evaluator.pending:
                return False
            for evaluation in self.evaluator.wait(0.5):
                _stop_for_the_machine(evaluation.measurement)
                self._write(evaluation.config, evaluation.measurement)
                self.measured[evaluation.config] = evaluation.measurement
                seen = self.objective.seen(evaluation.measurement)
                self.proposals.learn(evaluation.config, seen)
                on_event(self.event())
            if time.monotonic() > self.stops:
                return True

    def compare(self) -> None:
        """Time the best configs and the default side by side, and write that down.

        Where none beats the default by more than the noise, only the default's time is written,
        which makes it the winner, and the times of those that an earlier run compared, so that
        an old lucky time does not remain the winner.
        """
        self.finals = self._finals()
        compared = {
            config for config, each in self.proposals.known.items() if each.policy == FINAL_POLICY
        }
        for config in self.finals:
            if not self._default_kept() or config in {self.default, *compared}:
                self._write(config, self.timed_again[config])

    def _finals(self) -> dict[Config, Measurement]:
        """What became of the finalists that worked; a failure is written at once.

        One that fails when it is timed again is no longer a finalist, and one that takes longer
        than it did may leave the lead to a config that was no finalist. Then those that are now
        the best are compared, until neither happens.
        """
        finals: dict[Config, Measurement] = {}
        tried: set[Config] = set()
        left = MOST_COMPARISONS
        while left and (configs := self._finalists(finals, tried)):
            found = {each.config: each.measurement for each in self.evaluator.compare(configs)}
            for measurement in found.values():
                _stop_for_the_machine(measurement)
            tried.update(configs)
            self.timed_again |= found
            finals |= {config: self.objective.seen(each) for config, each in found.items()}
            failed = {config: each for config, each in found.items() if each.median_us is None}
            for config, measurement in failed.items():
                del finals[config]
                self.proposals.correct(config, measurement)
                self._write(config, measurement)
            if not failed:
                left = left - 1 if self._may_lose(finals, tried) else 0
        return finals

    def _finalists(
        self, finals: Mapping[Config, Measurement], tried: Collection[Config]
    ) -> list[Config]:
        """The best configs, and the default and the baseline where they work.

        None where only one config ever worked.
        """
        times = self._expected_us(finals)
        ranked = sorted(times, key=lambda config: times[config])
        wanted = dict.fromkeys([*ranked[:FINALISTS], *references(self.space)])
        configs = [config for config in wanted if config in times]
        return configs if len(times) > 1 or tried else []

    def _may_lose(self, finals: Mapping[Config, Measurement], tried: Collection[Config]) -> bool:
        """Whether a config that was not compared may be faster than all that were."""
        if not finals:
            return False
        best = min(finals.values(), key=lambda each: each.median_us or math.inf)
        bound_us = (best.median_us or 0.0) - best.noise_us
        times = self._expected_us(finals)
        return any(times[config] < bound_us for config in times if config not in tried)

    def _expected_us(self, finals: Mapping[Config, Measurement]) -> dict[Config, float]:
        """The times of the configs that work: what they took in a comparison, or would take.

        A comparison may find every config slower, as clocks drift; and one that was timed too
        short, by far more than the others. So what all have in common is the least.
        """
        known = {
            config: self.proposals.known[config].median_us or 0.0
            for config in self.proposals.ranked()
        }
        again = {config: each.median_us or 0.0 for config, each in finals.items()}
        drift = min((again[each] / known[each] for each in again if known.get(each)), default=1.0)
        drift = max(1.0, drift)
        return {config: again.get(config, drift * time_us) for config, time_us in known.items()}

    def event(self, comparing: bool = False) -> Event:
        """How far the search is."""
        known, ranked = self.proposals.known, self.proposals.ranked()
        best = ranked[0] if ranked else None
        best_us = self.measured[best].median_us if best else None
        return Event(
            done=len(known),
            total=len(known) + self.evaluator.pending if self.dry else self.budget.trials,
            failed=sum(each.median_us is None for each in known.values()),
            best_us=best_us,
            best=best,
            comparing=comparing,
            stops=self.stops,
        )

    def result(self, timed_out: bool, cancelled: bool) -> Result:
        """What the search came to."""
        problem, device = self.space.problem, self.space.device
        event = self.event()
        records = [
            each
            for each in self.store.records(
                device=device.name, problem=problem, toolchain=self.toolchain, ok_only=True
            )
            if self.space.holds(each.config)
        ]
        winner = self.objective.best(records)
        failure = most_frequent(self.proposals.known.values())
        if failure and event.best is None:
            failure = replace(failure, remedy=known_remedy(device, self.toolchain))
        default_won = winner is not None and winner.config == config_data(self.default)
        return Result(
            problem=problem,
            winner=winner,
            searched_us=event.best_us,
            default_us=self._time_of(self.default),
            baseline_us=self._time_of(baseline_config(problem, device)),
            evaluated=event.done,
            failed=event.failed,
            failure=failure,
            default_kept=default_won and self._default_kept(),
            objective=self.objective,
            front=tuple(front(records)) if self.objective.needs_energy else (),
            timed_out=timed_out,
            cancelled=cancelled,
        )

    def _write(self, config: Config, measurement: Measurement) -> None:
        record = Record(
            device=self.space.device.name,
            toolchain=self.toolchain,
            problem=self.space.problem,
            config=config_data(config),
            provenance=self.evaluator.provenance,
            measurement=measurement,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self.store.add(record)

    def _default_kept(self) -> bool:
        """Whether the finalists were compared and none beat the default by more than noise."""
        default = self.finals.get(self.default)
        times = [each.median_us for each in self.finals.values() if each.median_us is not None]
        if default is None or default.median_us is None:
            return False
        return min(times) > default.median_us - default.noise_us

    def _time_of(self, config: Config) -> float | None:
        found = self.timed_again.get(config) or self.measured.get(config)
        return found.median_us if found else None


def _stop_for_the_machine(measurement: Measurement) -> None:
    """Raise FlashtuneError for what would go wrong with every config, and is none's fault."""
    if measurement.outcome is Outcome.ENVIRONMENT:
        raise FlashtuneError(
            f"the search stops for the machine's sake: {measurement.error}. What was measured is "
            "kept: set that right, then run the same command again"
        )
