"""Where a candidate is evaluated: measured on this machine's device, or predicted.

Usage:
    with WorkerPool(here(8)) as compilers, WorkerPool(here(1)) as measurers:
        evaluator = MeasuringEvaluator(problem, device, compilers, measurers, seed=0)
        evaluator.submit(config)
        evaluator.rest(1.0)
        for evaluation in evaluator.collect():
            evaluation.config, evaluation.measurement

Both keep compilers running ahead: `room` says how many more configs may be submitted. Several
evaluators may share pools: they wait only in `rest`, which their caller calls once for all.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from flashtune.kernels.backends.target import policy_for, target_of
from flashtune.kernels.measure.trial import FAR_BEHIND
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.predict.cost_model import VERSION, predict
from flashtune.tuner.workers.answers.reply import Reply
from flashtune.tuner.workers.pool import WorkerPool, rest
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.policy import SEARCH
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance

COMPILE_SECONDS = 120.0
MEASURE_SECONDS = 60.0
COMPARE_SECONDS = 180.0
REST_SECONDS = 0.5  # longest single wait for workers
KEPT_BUSY = 16  # compilers per worker that measures: more would only wait for it
_UNSAID = Measurement(
    outcome=Outcome.CRASH, error="the worker reported no outcome for this config"
)

T = TypeVar("T")
# Concurrent work: it yields how many seconds the caller may wait for workers now.
Steps = Generator[float, None, T]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome of evaluating a config."""

    config: Config
    measurement: Measurement


class Evaluator(Protocol):
    """Takes configs and returns measurements, several at a time."""

    provenance: Provenance

    @property
    def room(self) -> int:
        """How many more configs may be submitted now."""

    @property
    def pending(self) -> int:
        """Configs submitted whose evaluation has not been collected."""

    @property
    def workers(self) -> tuple[int, int]:
        """How many workers evaluate now, and how many could."""

    @property
    def starves(self) -> bool:
        """Whether there are several workers, about to run out of work."""

    def submit(self, config: Config) -> None:
        """Start to evaluate a config."""

    def rest(self, seconds: float) -> None:
        """Wait until there may be something to collect, for at most `seconds`."""

    def collect(self) -> list[Evaluation]:
        """Evaluations that are complete."""

    def compare(self, configs: Sequence[Config]) -> Steps[list[Evaluation]]:
        """Evaluate again, side by side; leaves out configs about which that says nothing new."""

    def close(self) -> None:
        """End what is under way."""


class PredictingEvaluator:
    """Cross-compiles for an absent device, and asks the cost model for the time."""

    provenance = Provenance.PREDICTED

    def __init__(self, problem: Problem, device: Device, compilers: WorkerPool) -> None:
        """The pool belongs to the caller, who may use it for one problem after another."""
        self._problem, self._device, self._pool = problem, device, compilers

    @property
    def room(self) -> int:
        """Idle compilers, and one config queued for each compiler."""
        return max(0, 2 * self._pool.size - self.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled."""
        return self._pool.pending(self)

    @property
    def workers(self) -> tuple[int, int]:
        """One, this process: compilers only help."""
        return 1, 1

    @property
    def starves(self) -> bool:
        """Never: there is only one."""
        return False

    def submit(self, config: Config) -> None:
        """Compile a config."""
        candidate = Candidate(self._problem, config, self._device)
        task = Task(kind="compile", candidates=(candidate,))
        self._pool.submit(task, COMPILE_SECONDS, owner=self)

    def rest(self, seconds: float) -> None:
        """Wait for a compiler."""
        rest([self._pool], seconds)

    def collect(self) -> list[Evaluation]:
        """Predictions for the configs that have been compiled."""
        return [
            Evaluation(task.candidates[0].config, self._measurement(task.candidates[0], reply))
            for task, reply in self._pool.collect(self)
        ]

    def each(self, configs: Iterable[Config]) -> Iterator[Evaluation]:
        """Predictions for all of these configs, in the order in which they are ready."""
        for config in configs:
            self.submit(config)
        while self.pending:
            self.rest(REST_SECONDS)
            yield from self.collect()

    def compare(self, configs: Sequence[Config]) -> Steps[list[Evaluation]]:
        """Nothing: a repeated prediction is the same."""
        yield from ()
        return []

    def close(self) -> None:
        """End what is under way."""
        self._pool.cancel(self)

    def _measurement(self, candidate: Candidate, reply: Reply) -> Measurement:
        if reply.measurement is not None:
            return reply.measurement
        if any(use.spilled for use in reply.uses):
            spilled = {use.kernel: use.spilled for use in reply.uses if use.spilled}
            return Measurement(
                outcome=Outcome.OUT_OF_RESOURCES,
                error=f"spills registers (bytes per thread: {spilled})",
            )
        named = {use.kernel for use in reply.uses}
        unsaid = [use.kernel for use in candidate.launches if use.kernel not in named]
        if unsaid:
            return Measurement(
                outcome=Outcome.CRASH, error=f"the worker did not report what {unsaid[0]} needs"
            )
        try:
            prediction = predict(candidate, reply.uses)
            return Measurement(
                outcome=Outcome.OK,
                median_us=prediction.time_us,
                spread_us=prediction.high_us - prediction.low_us,
                policy=VERSION,
            )
        except FlashtuneError as error:  # a plan that the cost model does not cover
            return Measurement(outcome=Outcome.INVALID, error=str(error))
        except ValueError as error:  # a problem or kernels that would take days
            return Measurement(outcome=Outcome.INVALID, error=f"predicted: {error}")


class MeasuringEvaluator:
    """Compiles in parallel, then verifies and times configs on workers that have the device.

    If compilers would disturb the timing, the two take turns. Without compilers, the worker that
    measures also compiles. Configs that were compiled at a worker's site are measured there.

    A time so short that it would prune the best known config is measured once more before it
    counts, in the way finalists are. So every pruned config is slower than one that was timed
    twice. Longer ones wait meanwhile: most would prune nothing once it is confirmed. One worker
    times all finalists.
    """

    provenance = Provenance.MEASURED

    def __init__(
        self,
        problem: Problem,
        device: Device,
        compilers: WorkerPool | None,
        measurers: WorkerPool,
        *,
        seed: int,
        elsewhere: bool = False,
        energy: bool = False,
        sharers: Callable[[], int] = lambda: 1,
    ) -> None:
        """The pools belong to the caller. `seed` determines the inputs.

        elsewhere: the workers have neither templates nor the compilers' cache, so they are sent
        source. energy: measure energy, too, and prune nothing, since a slow config may need
        little. sharers: how many evaluators share these pools, this one included.
        """
        self._problem, self._device, self._seed = problem, device, seed
        self._compilers, self._measurers = compilers, measurers
        self._elsewhere, self._energy, self._sharers = elsewhere, energy, sharers
        self._best_us: float | None = None
        self._confirmed_us = math.inf  # the best time that was measured twice
        self._doubted: dict[Config, float] = {}  # times of configs that are being measured again
        self._waiting: list[tuple[Task, Measurement]] = []  # longer times that prune, too
        self._in_turns = target_of(device).times_alone
        self._sites: dict[Config, str] = {}  # of configs under way
        self._compiled: list[Config] = []

    @property
    def room(self) -> int:
        """As many configs may be under way as compilers can keep ahead of the timing."""
        if self._in_turns and (self._measurers.pending(self) or self._compiled):
            return 0
        measuring = self._measurers.size
        compiling = self._compilers.size if self._compilers else 0
        most = 2 * (measuring + min(compiling, KEPT_BUSY * measuring))
        return max(0, -(-most // self._sharers()) - self.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled, measured, or waiting for either."""
        measuring = self._measurers.pending(self) + len(self._waiting)
        return self._compiling + len(self._compiled) + measuring

    @property
    def workers(self) -> tuple[int, int]:
        """How many workers can measure now, and how many could be there."""
        return self._measurers.working, self._measurers.size

    @property
    def starves(self) -> bool:
        """Whether there are several workers, and fewer configs under way than workers."""
        workers = self._measurers.working
        return workers > 1 and self.pending * self._sharers() < workers

    def submit(self, config: Config) -> None:
        """Compile a config, then measure it."""
        if self._compilers is None:
            self._compiled.append(config)
            return
        self._sites[config] = site = self._next_site(self._compilers)
        task = self._task("compile", (config,))
        self._compilers.submit(task, COMPILE_SECONDS, owner=self, site=site)

    def rest(self, seconds: float) -> None:
        """Wait for a compiler or a worker that measures."""
        rest([*filter(None, [self._compilers]), self._measurers], seconds)

    def collect(self) -> list[Evaluation]:
        """Failures to compile, and measurements."""
        evaluations = []
        for task, reply in self._compilers.collect(self) if self._compilers else []:
            config = task.candidates[0].config
            if reply.measurement is not None:
                evaluations.append(self._ended(config, reply.measurement))
            else:
                self._compiled.append(config)
        if not (self._in_turns and self._compiling):
            for config in self._compiled:
                self._measure(config)
            self._compiled.clear()
        for task, reply in self._measurers.collect(self):
            evaluations += self._judged(task, reply.measurement or _UNSAID)
            if task.kind == "compare":
                evaluations += self._those_that_waited()
        return evaluations

    def _judged(self, task: Task, measurement: Measurement) -> list[Evaluation]:
        """The evaluation that a measurement completes; none if its config is to be timed again."""
        config, time_us = task.candidates[0].config, measurement.median_us
        again = task.kind == "compare"
        if again:
            del self._doubted[config]
        if measurement.outcome is Outcome.OK and time_us is not None:
            if again:
                self._confirmed_us = min(self._confirmed_us, time_us)
            elif FAR_BEHIND * time_us < self._confirmed_us:
                if time_us < min(self._doubted.values(), default=math.inf):
                    self._doubted[config] = time_us
                    self._ask("compare", config, COMPARE_SECONDS)
                else:
                    self._waiting.append((task, measurement))
                return []
            self._best_us = min(self._best_us or math.inf, time_us)
        return [self._ended(config, replace(measurement, policy=policy_for(SEARCH, task.device)))]

    def _those_that_waited(self) -> list[Evaluation]:
        """What becomes of times that waited for one that has been measured again."""
        waiting = sorted(self._waiting, key=lambda each: each[1].median_us or 0.0)
        self._waiting = []
        return [each for found in waiting for each in self._judged(*found)]

    def compare(self, configs: Sequence[Config]) -> Steps[list[Evaluation]]:
        """Time several configs in turns, so that a drifting clock favours none.

        Configs not measured yet are abandoned. A config that fails now is a failure, and does not
        keep the others from being timed. One that could not be timed is left out.
        """
        self.close()
        found = yield from self._compared(tuple(configs))
        return [Evaluation(*each) for each in found.items()]

    def close(self) -> None:
        """End what is under way."""
        if self._compilers is not None:
            self._compilers.cancel(self)
        self._compiled.clear()
        self._doubted.clear()
        self._waiting.clear()
        self._sites.clear()
        self._measurers.cancel(self)

    def _compared(self, configs: tuple[Config, ...]) -> Steps[dict[Config, Measurement]]:
        """Measurements of the configs, each timed together with all others that work.

        If a config takes the worker down, a new worker times the rest. If it is not known which
        one did, each is tried alone first. A config without a result even then is left out.
        """
        answers = yield from self._side_by_side(configs)
        found = {config: each for config, each in zip(configs, answers, strict=False) if each}
        missing = tuple(config for config in configs if config not in found)
        if found or not missing:
            others = (yield from self._compared(missing)) if missing else {}
            return {**found, **others}
        if len(configs) == 1:
            return {}
        for config in configs:
            found |= yield from self._compared((config,))
        right = tuple(config for config, each in found.items() if each.outcome is Outcome.OK)
        again = (yield from self._compared(right)) if 1 < len(right) < len(configs) else {}
        return {**found, **again}

    def _side_by_side(self, configs: tuple[Config, ...]) -> Steps[tuple[Measurement | None, ...]]:
        """One worker's measurements of these configs, timed in turns."""
        task = self._task("compare", configs)
        self._measurers.submit(task, COMPARE_SECONDS, owner=self, steady=True)
        while not (answers := self._measurers.collect(self)):
            yield REST_SECONDS
        return answers[0][1].measurements

    @property
    def _compiling(self) -> int:
        return self._compilers.pending(self) if self._compilers else 0

    def _measure(self, config: Config) -> None:
        self._ask(
            "measure", config, MEASURE_SECONDS + (COMPILE_SECONDS if self._elsewhere else 0.0)
        )

    def _ask(self, kind: str, config: Config, seconds: float) -> None:
        site = self._sites.get(config, "")
        self._measurers.submit(self._task(kind, (config,)), seconds, owner=self, site=site)

    def _ended(self, config: Config, measurement: Measurement) -> Evaluation:
        self._sites.pop(config, None)
        return Evaluation(config, measurement)

    def _next_site(self, compilers: WorkerPool) -> str:
        """The compiling site whose workers have the least to measure."""
        compiling = compilers.sites
        sites = {name: count for name, count in self._measurers.sites.items() if name in compiling}
        if not sites:
            return ""
        waiting = Counter(self._sites.values())
        return min(sites, key=lambda name: (waiting[name] / sites[name], name))

    def _task(self, kind: str, configs: tuple[Config, ...]) -> Task:
        candidates = tuple(Candidate(self._problem, each, self._device) for each in configs)
        return Task(
            kind=kind,
            candidates=candidates,
            seed=self._seed,
            best_us=None if self._energy else self._best_us,
            energy=self._energy and kind != "compile",
            sources=tuple(each.source for each in candidates) if self._elsewhere else (),
        )
