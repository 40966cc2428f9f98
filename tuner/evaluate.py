"""Where a candidate is evaluated: measured on this machine's device, or predicted.

Usage:
    with MeasuringEvaluator(problem, device, jobs=8, seed=0) as evaluator:
        evaluator.submit(config)
        for evaluation in evaluator.wait(1.0):
            evaluation.config, evaluation.measurement

Both keep compilers running ahead: `room` says how many more configs may be submitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from flashtune.kernels.config import Config
from flashtune.tuner.cost_model import VERSION, predict_us
from flashtune.tuner.pool import COMMAND, WorkerPool
from flashtune.tuner.task import Reply, Task
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance

COMPILE_SECONDS = 120.0
MEASURE_SECONDS = 60.0
COMPARE_SECONDS = 180.0


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

    def compare(self, configs: Sequence[Config]) -> list[Measurement]:
        """Evaluate again, side by side; empty where that would say nothing new."""

    def close(self) -> None:
        """End what is under way."""


class _Closing:
    """Evaluators end with their `with` block."""

    def close(self) -> None:
        """End what is under way."""
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class PredictingEvaluator(_Closing):
    """Cross-compiles for a device that is not here, and asks the cost model."""

    provenance = Provenance.PREDICTED

    def __init__(
        self, problem: Problem, device: Device, *, jobs: int, command: Sequence[str] = COMMAND
    ) -> None:
        """`jobs` compilers at a time."""
        self._problem, self._device, self._jobs = problem, device, jobs
        self._pool = WorkerPool(jobs, command)

    def __enter__(self) -> "PredictingEvaluator":
        """The evaluator itself."""
        return self

    @property
    def room(self) -> int:
        """Compilers without work, and one config in hand for each."""
        return max(0, 2 * self._jobs - self._pool.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled."""
        return self._pool.pending

    def submit(self, config: Config) -> None:
        """Compile a config."""
        task = Task(kind="compile", problem=self._problem, configs=(config,), device=self._device)
        self._pool.submit(task, COMPILE_SECONDS)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Predictions of what has been compiled."""
        return [
            Evaluation(task.configs[0], self._measurement(task.configs[0], reply))
            for task, reply in self._pool.wait(seconds)
        ]

    def compare(self, configs: Sequence[Config]) -> list[Measurement]:
        """Nothing: a prediction does not change by being made again."""
        return []

    def close(self) -> None:
        """End the compilers."""
        self._pool.close()

    def _measurement(self, config: Config, reply: Reply) -> Measurement:
        if reply.measurements:
            return reply.measurements[0]
        if any(use.spilled for use in reply.uses):
            spilled = {use.kernel: use.spilled for use in reply.uses if use.spilled}
            return Measurement(
                outcome=Outcome.OUT_OF_RESOURCES, error=f"spills bytes a thread: {spilled}"
            )
        time_us = predict_us(self._problem, config, self._device, reply.uses)
        return Measurement(outcome=Outcome.OK, median_us=time_us, policy=VERSION)


class MeasuringEvaluator(_Closing):
    """Compiles in parallel, then verifies and times one config after another on the device."""

    provenance = Provenance.MEASURED

    def __init__(
        self,
        problem: Problem,
        device: Device,
        *,
        jobs: int,
        seed: int,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`jobs` compilers at a time; `seed` makes the inputs."""
        self._problem, self._device, self._jobs, self._seed = problem, device, jobs, seed
        self._compilers = WorkerPool(jobs, command)
        self._measurer = WorkerPool(1, command)
        self._best_us: float | None = None

    def __enter__(self) -> "MeasuringEvaluator":
        """The evaluator itself."""
        return self

    @property
    def room(self) -> int:
        """As many configs may be under way as compilers can keep ahead of the timing."""
        return max(0, 2 * self._jobs + 2 - self.pending)

    @property
    def pending(self) -> int:
        """Configs being compiled, measured, or waiting for either."""
        return self._compilers.pending + self._measurer.pending

    def submit(self, config: Config) -> None:
        """Compile a config, then measure it."""
        self._compilers.submit(self._task("compile", (config,)), COMPILE_SECONDS)

    def wait(self, seconds: float) -> list[Evaluation]:
        """Failures to compile, and measurements."""
        evaluations = []
        idle = self._measurer.pending == 0
        for task, reply in self._compilers.wait(seconds if idle else 0.0):
            if reply.measurements:
                evaluations.append(Evaluation(task.configs[0], reply.measurements[0]))
            else:
                self._measurer.submit(self._task("measure", task.configs), MEASURE_SECONDS)
        for task, reply in self._measurer.wait(0.0 if evaluations else seconds):
            measurement = reply.measurements[0]
            if measurement.outcome is Outcome.OK and measurement.median_us is not None:
                self._best_us = min(self._best_us or measurement.median_us, measurement.median_us)
            evaluations.append(Evaluation(task.configs[0], measurement))
        return evaluations

    def compare(self, configs: Sequence[Config]) -> list[Measurement]:
        """Time several configs in turns, so that a drifting clock favours none.

        What had not been measured yet is given up.
        """
        self._compilers.close()
        self._measurer.drop()
        self._measurer.submit(self._task("compare", tuple(configs)), COMPARE_SECONDS)
        while True:
            for task, reply in self._measurer.wait(1.0):
                if task.kind == "compare":
                    complete = len(reply.measurements) == len(configs)
                    return list(reply.measurements) if complete else []

    def close(self) -> None:
        """End compilers and measurer."""
        self._compilers.close()
        self._measurer.close()

    def _task(self, kind: str, configs: tuple[Config, ...]) -> Task:
        return Task(
            kind=kind,
            problem=self._problem,
            configs=configs,
            device=self._device,
            seed=self._seed,
            best_us=self._best_us,
        )
