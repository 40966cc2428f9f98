"""Where a candidate is evaluated: measured on this machine's device, or predicted.

Usage:
    with WorkerPool(8) as compilers, WorkerPool(1) as measurer:
        evaluator = MeasuringEvaluator(problem, device, compilers, measurer, seed=0)
        evaluator.submit(config)
        for evaluation in evaluator.wait(1.0):
            evaluation.config, evaluation.measurement

Both keep compilers running ahead: `room` says how many more configs may be submitted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flashtune.kernels.backends.target import target_of
from flashtune.kernels.measure.trial import FAR_BEHIND
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.predict.cost_model import VERSION, predict
from flashtune.tuner.workers.answers.reply import SEARCH_POLICY, Reply
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance

COMPILE_SECONDS = 120.0
MEASURE_SECONDS = 60.0
COMPARE_SECONDS = 180.0
_UNSAID = Measurement(outcome=Outcome.CRASH, error="the worker did not say what became of it")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What became of a config."""

    config: Config
    measurement: Measurement


class Evaluator(Protocol):
    """Takes configs, gives measurements, several under way at once."""

    provenance: Provenance

    @property
    def room(self) -> int:
        """How many more configs may be submitted now."""

    @property
    def pending(self) -> int:
        """Configs submitted whose evaluation has not been given out."""

    def submit(self, config: Config) -> None:
        """Start on a config."""

    def wait(self, seconds: float) -> list[Evaluation]:
        """Evaluations that are complete, waiting for one for at most that long."""

    def compare(self, configs: Sequence[Config]) -> list[Evaluation]:
        """Evaluate again, side by side; those of which that says nothing new are left out."""

    def close(self) -> None:
        """End what is under way."""


class PredictingEvaluator:
    """Cross-compiles for a device that is not here, and asks the cost model."""

    provenance = Provenance.PREDICTED

    def __init__(self, problem: Problem, device: Device, compilers: WorkerPool) -> None:
        """The pool is the caller's, to be used for one problem after another."""
        self._problem, self._device, self._pool = problem, device, compilers

    @property
    def room(self) -> int:
        """Compilers without work, and one config in hand for each."""
        return max(0, 2 * self._pool.size - self._pool.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled."""
        return self._pool.pending

    def submit(self, config: Config) -> None:
        """Compile a config."""
        candidate = Candidate(self._problem, config, self._device)
        self._pool.submit(Task(kind="compile", candidates=(candidate,)), COMPILE_SECONDS)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Predictions of what has been compiled."""
        return [
            Evaluation(task.candidates[0].config, self._measurement(task.candidates[0], reply))
            for task, reply in self._pool.wait(seconds)
        ]

    def compare(self, configs: Sequence[Config]) -> list[Evaluation]:
        """Nothing: a prediction does not change by being made again."""
        return []

    def close(self) -> None:
        """End what is under way."""
        self._pool.cancel()

    def _measurement(self, candidate: Candidate, reply: Reply) -> Measurement:
        if reply.measurement is not None:
            return reply.measurement
        if any(use.spilled for use in reply.uses):
            spilled = {use.kernel: use.spilled for use in reply.uses if use.spilled}
            return Measurement(
                outcome=Outcome.OUT_OF_RESOURCES, error=f"spills bytes a thread: {spilled}"
            )
        named = {use.kernel for use in reply.uses}
        unsaid = [use.kernel for use in candidate.launches if use.kernel not in named]
        if unsaid:
            return Measurement(
                outcome=Outcome.CRASH, error=f"the worker did not say what {unsaid[0]} needs"
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
        except ValueError as error:  # of a problem, or kernels, that would take days
            return Measurement(outcome=Outcome.INVALID, error=f"predicted: {error}")


class MeasuringEvaluator:
    """Compiles in parallel, then verifies and times one config after another on the device.

    Where compilers would disturb the timing, the two take turns. Where there are none, the
    worker that measures compiles, too.

    A time so short that it would prune the best one known is taken once more before it counts, as
    finalists are. So what is pruned is slower than a config that was timed twice.
    """

    provenance = Provenance.MEASURED

    def __init__(
        self,
        problem: Problem,
        device: Device,
        compilers: WorkerPool | None,
        measurer: WorkerPool,
        *,
        seed: int,
        elsewhere: bool = False,
        energy: bool = False,
    ) -> None:
        """The pools are the caller's; `measurer` has one worker. `seed` makes the inputs.

        elsewhere: the worker has neither templates nor the compilers' cache. It is given source.
        energy: that is measured, too, and nothing pruned, since what is slow may take little.
        """
        self._problem, self._device, self._seed = problem, device, seed
        self._compilers, self._measurer = compilers, measurer
        self._elsewhere, self._energy = elsewhere, energy
        self._best_us: float | None = None
        self._confirmed_us = math.inf  # the best time that was taken twice
        self._in_turns = target_of(device).times_alone
        self._compiled: list[Config] = []

    @property
    def room(self) -> int:
        """As many configs may be under way as compilers can keep ahead of the timing."""
        if self._in_turns and (self._measurer.pending or self._compiled):
            return 0
        compiling = self._compilers.size if self._compilers else 0
        return max(0, 2 * compiling + 2 - self.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled, measured, or waiting for either."""
        return self._compiling + len(self._compiled) + self._measurer.pending

    def submit(self, config: Config) -> None:
        """Compile a config, then measure it."""
        if self._compilers is None:
            self._compiled.append(config)
        else:
            self._compilers.submit(self._task("compile", (config,)), COMPILE_SECONDS)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Failures to compile, and measurements."""
        evaluations = []
        idle = self._measurer.pending == 0
        compiled = self._compilers.wait(seconds if idle else 0.0) if self._compilers else []
        for task, reply in compiled:
            if reply.measurement is not None:
                evaluations.append(Evaluation(task.candidates[0].config, reply.measurement))
            else:
                self._compiled.append(task.candidates[0].config)
        if not (self._in_turns and self._compiling):
            for config in self._compiled:
                self._measure(config)
            self._compiled.clear()
        for task, reply in self._measurer.wait(0.0 if evaluations else seconds):
            evaluations += self._judged(task, reply.measurement or _UNSAID)
        return evaluations

    def _judged(self, task: Task, measurement: Measurement) -> list[Evaluation]:
        """What a measurement says of its config: nothing yet where that is to be timed again."""
        config = task.candidates[0].config
        again = task.kind == "compare"
        if measurement.outcome is Outcome.OK and measurement.median_us is not None:
            if again:
                self._confirmed_us = min(self._confirmed_us, measurement.median_us)
            elif FAR_BEHIND * measurement.median_us < self._confirmed_us:
                self._measurer.submit(self._task("compare", (config,)), COMPARE_SECONDS)
                return []
            self._best_us = min(self._best_us or math.inf, measurement.median_us)
        return [Evaluation(config, replace(measurement, policy=SEARCH_POLICY))]

    def compare(self, configs: Sequence[Config]) -> list[Evaluation]:
        """Time several configs in turns, so that a drifting clock favours none.

        What had not been measured yet is given up. A config that fails now is a failure, and
        does not keep the others from being timed. One that could not be timed is left out.
        """
        self.close()
        return [Evaluation(*each) for each in self._compared(tuple(configs)).items()]

    def close(self) -> None:
        """End what is under way."""
        if self._compilers is not None:
            self._compilers.cancel()
        self._compiled.clear()
        self._measurer.cancel()

    def _compared(self, configs: tuple[Config, ...]) -> dict[Config, Measurement]:
        """Measurements of the configs, each timed with as many of the others as work.

        Where one takes the worker along, those left are timed by a new one. If it is not known
        which one did, each is tried alone first. One of which even that says nothing is left out.
        """
        answers = self._ask(configs)
        found = {config: each for config, each in zip(configs, answers, strict=False) if each}
        missing = tuple(config for config in configs if config not in found)
        if found or not missing:
            return {**found, **(self._compared(missing) if missing else {})}
        if len(configs) == 1:
            return {}
        for config in configs:
            found |= self._compared((config,))
        right = tuple(config for config, each in found.items() if each.outcome is Outcome.OK)
        again = 1 < len(right) < len(configs)
        return {**found, **(self._compared(right) if again else {})}

    def _ask(self, configs: tuple[Config, ...]) -> tuple[Measurement | None, ...]:
        """What a worker says of these configs, timed in turns."""
        self._measurer.submit(self._task("compare", configs), COMPARE_SECONDS)
        answers: list[tuple[Task, Reply]] = []
        while not answers:
            answers = self._measurer.wait(1.0)
        return answers[0][1].measurements

    @property
    def _compiling(self) -> int:
        return self._compilers.pending if self._compilers else 0

    def _measure(self, config: Config) -> None:
        seconds = MEASURE_SECONDS + (COMPILE_SECONDS if self._elsewhere else 0.0)
        self._measurer.submit(self._task("measure", (config,)), seconds)

    def _task(self, kind: str, configs: tuple[Config, ...]) -> Task:
        candidates = tuple(Candidate(self._problem, each, self._device) for each in configs)
        sent = self._elsewhere and kind != "compile"
        return Task(
            kind=kind,
            candidates=candidates,
            seed=self._seed,
            best_us=None if self._energy else self._best_us,
            energy=self._energy and kind != "compile",
            sources=tuple(each.source for each in candidates) if sent else (),
        )
