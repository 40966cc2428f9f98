"""A worker process: reads tasks on standard input, answers on standard output, can be killed.

Usage:
    python -m flashtune.tuner.workers.worker < tasks > replies      # see task.py for the lines

What a candidate prints goes to standard error. Nothing here knows of the search or the database.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

import torch

from flashtune.kernels.backends.backend import DoesNotFitError
from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.measure.timing import Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.weights import Step
from flashtune.tuner.workers.task import Reply, Task
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome

PRUNE_RATIO = 1.3  # a config this much slower than the best at its first samples is not timed on
FIRST_SAMPLES = 2
SAMPLES = 10
COMPARE_ROUNDS = 8
_FULL = ("too many blocks in cooperative launch", "out of memory", "out of resource")


class WrongResultError(Exception):
    """A candidate's tokens are not right."""


class Worker:
    """Answers tasks; keeps the workload of the last problem."""

    def __init__(self) -> None:
        """Nothing is loaded before the first task."""
        self._workload: Workload | None = None
        self._made_for: tuple[Problem, int] | None = None

    def answer(self, task: Task) -> Reply:
        """Do what the task asks; a candidate's failure is an answer, never an exception."""
        if task.kind == "compile":
            return self._compile(task)
        if task.kind == "measure":
            return self._measure(task)
        return self._compare(task)

    def _compile(self, task: Task) -> Reply:
        try:
            candidate = task.candidates[0]
            uses = backend_of(candidate).compile(candidate)
        except Exception as error:
            return _failed(error, Outcome.COMPILE_ERROR)
        return Reply(uses=tuple(uses))

    def _measure(self, task: Task) -> Reply:
        stage = Outcome.COMPILE_ERROR
        try:
            load = self._loader(task, 0)
            workload = self.workload(task)
            stage = Outcome.CRASH
            timer = _verified_timer(task.candidates[0], load, workload)
            measurement = _time(timer, task.best_us)
        except Exception as error:
            return _failed(error, stage)
        return Reply(measurements=(measurement,))

    def _compare(self, task: Task) -> Reply:
        """Time several configs in turns; all fail if one does."""
        try:
            workload = self.workload(task)
            timers = [
                _verified_timer(candidate, self._loader(task, number), workload)
                for number, candidate in enumerate(task.candidates)
            ]
            samples = interleaved(timers, COMPARE_ROUNDS)
        except Exception as error:
            return _failed(error, Outcome.CRASH)
        return Reply(measurements=tuple(_measurement(Timing.of(own), "final") for own in samples))

    def workload(self, task: Task) -> Workload:
        """The inputs for the task's problem and seed, made once."""
        if self._workload is None or self._made_for != (task.problem, task.seed):
            self._workload = None  # first, to have its memory back
            device = torch.device(target_of(task.device).torch_device)
            self._workload = Workload.create(
                task.problem, device, cold_bytes=task.device.l2_bytes, seed=task.seed
            )
            self._made_for = (task.problem, task.seed)
        return self._workload

    def _loader(self, task: Task, number: int) -> Callable[[], Step]:
        candidate = task.candidates[number]
        where = torch.device(target_of(task.device).torch_device)
        source = task.sources[number] if task.sources else None
        return backend_of(candidate).loader(candidate, where, source)


def _verified_timer(candidate: Candidate, load: Callable[[], Step], workload: Workload) -> Timer:
    step = load()
    reason = workload.why_wrong(step, candidate.slack)
    if reason:
        raise WrongResultError(reason)
    return target_of(candidate.device).timer(step, workload)


def _time(timer: Timer, best_us: float | None) -> Measurement:
    samples = timer.sample(FIRST_SAMPLES)
    if best_us is not None and min(samples) > PRUNE_RATIO * best_us:
        return _measurement(Timing.of(samples), "search", Outcome.PRUNED)
    return _measurement(Timing.of(timer.sample(SAMPLES)), "search")


def _measurement(timing: Timing, policy: str, outcome: Outcome = Outcome.OK) -> Measurement:
    return Measurement(
        outcome=outcome,
        median_us=timing.median_us,
        spread_us=timing.spread_us,
        samples=timing.samples,
        policy=policy,
    )


def _failed(error: Exception, stage: Outcome) -> Reply:
    """The reply for an exception; after a fault on the device the worker is of no more use."""
    text = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None:
        text += f" ({error.__cause__})"
    full = any(words in text.lower() for words in _FULL)
    if isinstance(error, FlashtuneError):
        outcome = Outcome.INVALID
    elif isinstance(error, WrongResultError):
        outcome = Outcome.WRONG_RESULT
    elif isinstance(error, (DoesNotFitError, torch.OutOfMemoryError)) or full:
        outcome = Outcome.OUT_OF_RESOURCES
    else:
        outcome = stage
    measurement = Measurement(outcome=outcome, error=" ".join(text.split())[:500])
    return Reply(measurements=(measurement,), fatal=outcome is Outcome.CRASH)


@contextlib.contextmanager
def _replies() -> Iterator[TextIO]:
    """The standard output of old, for replies alone; what else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        yield replies


def main(worker: Worker) -> None:
    """Answer until standard input ends."""
    with _replies() as replies:
        for line in sys.stdin:
            reply = worker.answer(Task.from_json(line))
            replies.write(reply.to_json() + "\n")
            replies.flush()
            if reply.fatal:
                return


if __name__ == "__main__":
    main(Worker())
