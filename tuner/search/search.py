"""The search for one problem on one device: propose, evaluate, learn, record everything.

Usage:
    result = search(space, evaluator, store, Budget(trials=200), toolchain=toolchain)
    result.winner           # the Record to use, None if nothing worked

    one = Search(space, evaluator, …)
    steps = one.steps()     # to run several side by side: each yields where it would wait
    one.result()

Earlier results are read from the store first, so an interrupted search continues where it stopped.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from flashtune.kernels.backends.target import baseline_config, default_config, timed_otherwise
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.tuner.objective import Objective, front
from flashtune.tuner.search.evaluate import REST_SECONDS, Evaluation, Evaluator, Steps
from flashtune.tuner.search.failure import Failure, known_remedy, most_frequent
from flashtune.tuner.search.proposal import Proposals, references
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.policy import is_final
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.store import Store

FINALISTS = 6
MOST_COMPARISONS = 10  # comparisons without failures in which the lead changes
AT_ONCE = 16  # hurried proposals between two checks of the workers' replies


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a search may spend. `trials` counts evaluations, including those of earlier runs."""

    trials: int
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A search's progress: sent after each evaluation, and before the finalists are timed.

    total: the budget's trials, or the number of configs if there are fewer. stops: when time runs
    out, on the monotonic clock. workers: how many evaluate now; most_workers: how many could.
    """

    done: int
    total: int
    failed: int
    best_us: float | None
    best: Config | None
    comparing: bool = False
    stops: float = math.inf
    workers: int = 1
    most_workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a search. Times are from the final comparison, if there was one.

    `searched_us` is the best time before that comparison, `failure` the most frequent reason of
    failures, if any. `default_kept`: nothing beat the default by more than the noise. `front`: if
    energy counts, the records that no other beats in both time and energy, fastest first. A search
    that timed out or was cancelled (Ctrl-C) has all its measurements in the store; only a
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


def search(space: Space, evaluator: Evaluator, *arguments: Any, **options: Any) -> Result:
    """Run a single search to its end. The arguments are those of `Search`.

    KeyboardInterrupt ends the search early; the finalists are then not compared.
    """
    one = Search(space, evaluator, *arguments, **options)
    try:
        for seconds in one.steps():
            evaluator.rest(seconds)
    except KeyboardInterrupt:
        pass
    return one.result()


class Search:
    """A search within a budget; every evaluation is stored before the next one begins."""

    def __init__(
        self,
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
    ) -> None:
        """Learn from earlier runs. The time limit starts now.

        near: records of any problems or devices, whose configs are tried early. retry_failed:
        first evaluate again the configs that failed in earlier runs. objective: what to minimise;
        configs measured without it are evaluated again.
        """
        self.proposals = Proposals(space, sampler=sampler, seed=seed, near=near)
        self.space, self.evaluator, self.store = space, evaluator, store
        self.budget, self.toolchain, self.on_event = budget, toolchain, on_event
        self.objective = objective
        self.measured: dict[Config, Measurement] = {}  # times; proposals know costs instead
        self.finals: dict[Config, Measurement] = {}  # costs of finalists
        self.timed_again: dict[Config, Measurement] = {}  # their times
        self.default = default_config(space.problem, space.device)
        self.stops = time.monotonic() + (budget.timeout_s or math.inf)
        self.dry = False  # no config left to propose
        self.timed_out = self.ended = False
        self._recall(retry_failed)

    def steps(self) -> Steps[None]:
        """Evaluate, then compare the finalists."""
        self.timed_out = yield from self._evaluate()
        self.on_event(self.event(comparing=True))
        yield from self._compare()
        self.ended = True

    def _recall(self, retry_failed: bool) -> None:
        """Learn from the results of earlier runs in the store; failures may be proposed again.

        Times that were not taken as they are now can't be compared: those configs are timed again.
        """
        for record in self.store.records(
            device=self.space.device.name, toolchain=self.toolchain, problem=self.space.problem
        ):
            timed = record.measurement.median_us is not None
            if record.provenance is not self.evaluator.provenance:
                continue
            if timed and timed_otherwise(record, self.space.device):
                continue
            try:
                config = parse_config(record.config)
            except FlashtuneError:
                continue  # from another version of its plan
            if retry_failed and record.measurement.median_us is None:
                self.proposals.retry(config)
            elif self.objective.knows(record.measurement):
                self.measured[config] = record.measurement
                self.proposals.recall(config, self.objective.seen(record.measurement))

    def _evaluate(self) -> Steps[bool]:
        """Evaluate until the budget is spent; True if time ran out first."""
        known = self.proposals.known
        while True:
            left = self.budget.trials - len(known) - self.evaluator.pending
            wanted = 0 if self.dry else min(self.evaluator.room, left)
            for number in range(wanted):
                hurry = self.evaluator.starves
                if number and (not hurry or number == AT_ONCE):
                    break
                several = self.evaluator.workers[0] > 1
                config = self.proposals.propose(several=several, hurry=hurry)
                if config is None:
                    self.dry = True
                    break
                self.evaluator.submit(config)
                wanted -= 1
            if not self.evaluator.pending:
                return False
            yield 0.0 if wanted and not self.dry else REST_SECONDS
            self._take(self.evaluator.collect())
            if time.monotonic() > self.stops:
                return True

    def _take(self, evaluations: Sequence[Evaluation]) -> None:
        """Store the results, then learn from them."""
        found = [(each.config, each.measurement) for each in evaluations]
        right = [each for each in found if each[1].outcome is not Outcome.ENVIRONMENT]
        self._write(*right)
        for config, measurement in found:
            _stop_for_the_machine(measurement)
            self.measured[config] = measurement
            self.proposals.learn(config, self.objective.seen(measurement))
            self.on_event(self.event())

    def _compare(self) -> Steps[None]:
        """Time the best configs and the default side by side, and store the result.

        If none beats the default by more than the noise, only the default's time is stored, which
        makes it the winner, and the times of configs that an earlier run compared, so that an old
        lucky time does not remain the winner.
        """
        self.finals = yield from self._finals()
        compared = {
            config for config, each in self.proposals.known.items() if is_final(each.policy)
        }
        for config in self.finals:
            if not self._default_kept() or config in {self.default, *compared}:
                self._write((config, self.timed_again[config]))

    def _finals(self) -> Steps[dict[Config, Measurement]]:
        """The measurements of the finalists that worked; a failure is stored at once.

        A config that fails when timed again is no longer a finalist, and one that is now slower
        may lose the lead to a config that was not a finalist. Then the configs that are now best
        are compared, until neither happens.
        """
        finals: dict[Config, Measurement] = {}
        tried: set[Config] = set()
        left = MOST_COMPARISONS
        while left and (configs := self._finalists(finals, tried)):
            evaluations = yield from self.evaluator.compare(configs)
            found = {each.config: each.measurement for each in evaluations}
            for measurement in found.values():
                _stop_for_the_machine(measurement)
            tried.update(configs)
            self.timed_again |= found
            finals |= {config: self.objective.seen(each) for config, each in found.items()}
            failed = {config: each for config, each in found.items() if each.median_us is None}
            for config, measurement in failed.items():
                del finals[config]
                self.proposals.correct(config, measurement)
                self._write((config, measurement))
            if not failed:
                left = left - 1 if self._may_lose(finals, tried) else 0
        return finals

    def _finalists(
        self, finals: Mapping[Config, Measurement], tried: Collection[Config]
    ) -> list[Config]:
        """The best configs, and the default and the baseline if they work.

        None if only one config ever worked.
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
        """The times of the configs that work, as measured in a comparison or as expected there.

        A comparison may find every config slower, as clocks drift, and a config whose first time
        was too short far slower than the others. So the smallest slowdown is taken as common to
        all.
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
        """The search's progress."""
        known, best = self.proposals.known, self.proposals.best
        workers, most_workers = self.evaluator.workers
        return Event(
            done=len(known),
            total=len(known) + self.evaluator.pending if self.dry else self.budget.trials,
            failed=self.proposals.failed,
            best_us=self.measured[best].median_us if best else None,
            best=best,
            comparing=comparing,
            stops=self.stops,
            workers=workers,
            most_workers=most_workers,
        )

    def result(self) -> Result:
        """The search's result, or its result so far."""
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
            timed_out=self.timed_out,
            cancelled=not self.ended,
        )

    def _write(self, *found: tuple[Config, Measurement]) -> None:
        """Add records to the store, all in one transaction."""
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        records = [
            Record(
                device=self.space.device.name,
                toolchain=self.toolchain,
                problem=self.space.problem,
                config=config_data(config),
                provenance=self.evaluator.provenance,
                measurement=measurement,
                created=created,
            )
            for config, measurement in found
        ]
        if records:
            self.store.add(*records)

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
    """Raise FlashtuneError for a fault that would hit every config and is due to none."""
    if measurement.outcome is Outcome.ENVIRONMENT:
        raise FlashtuneError(
            f"the search stopped because of a problem of the machine: {measurement.error}. All "
            "measurements are kept: fix the problem, then run the same command again"
        )
