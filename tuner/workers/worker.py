"""A worker process: reads tasks on standard input, answers on a descriptor, may be killed.

Usage:
    python -m flashtune.tuner.workers.worker < tasks 3> replies     # lines of message.py

If a request's content is null, the answer is null, too: it says that the worker has started.
Other output, of a library or a candidate, is not a reply. Nothing here knows of the search or the
database.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.measure.failure import failure
from flashtune.kernels.measure.trial import FAR_BEHIND, Trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.weights import Step
from flashtune.tuner.workers.answers.message import from_line, to_line
from flashtune.tuner.workers.answers.reply import Reply, policy_of
from flashtune.tuner.workers.keeper import REPLIES
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome

SAMPLES = 10
COMPARE_ROUNDS, COMPARE_REPLAYS = 8, 5


class Worker:
    """Answers tasks; keeps the workload of the last problem."""

    def __init__(self) -> None:
        """Loads nothing before the first task."""
        self._workload: Workload | None = None
        self._made_for: tuple[Problem, int] | None = None

    def answer(self, task: Task) -> Reply:
        """Perform the task; a candidate's failure is an answer, never an exception."""
        if task.kind == "compile":
            return self._compile(task)
        if task.kind == "measure":
            return self._measure(task)
        return self._compare(task)

    def _compile(self, task: Task) -> Reply:
        try:
            candidate = task.candidates[0]
            source = task.sources[0] if task.sources else None
            uses = backend_of(candidate).compile(candidate, source)
        except Exception as error:
            failed = failure(error, Outcome.COMPILE_ERROR, policy_of(task))
            return Reply(measurements=(failed,))
        return Reply(uses=tuple(uses))

    def _measure(self, task: Task) -> Reply:
        """Time one config, but only its first samples if it is far behind the best."""

        def run(trial: Trial[int]) -> None:
            if task.best_us is not None:
                trial.drop_slower_than(FAR_BEHIND * task.best_us)
            trial.take_turns(rounds=1, replays=SAMPLES)

        return self._try(task, run)

    def _compare(self, task: Task) -> Reply:
        """Time several configs in turns; if some fail, the others continue."""
        return self._try(task, lambda trial: trial.take_turns(COMPARE_ROUNDS, COMPARE_REPLAYS))

    def _try(self, task: Task, run: Callable[[Trial[int]], None]) -> Reply:
        """Run a task's configs, by number, in a trial.

        A crash ends the worker: what it left on the device must not affect the next task.
        """
        numbers, policy = range(len(task.candidates)), policy_of(task)
        try:
            workload = self.workload(task)
        except Exception as error:  # out of memory, or a device that no longer answers
            failed = failure(error, Outcome.CRASH, policy)
            known = failed if task.kind == "measure" else None  # those compared worked before
            fatal = failed.outcome is Outcome.CRASH
            return Reply(measurements=(known,) * len(numbers), fatal=fatal)
        trial: Trial[int] = Trial(workload, target_of(task.device).timer, policy)
        for number in numbers:
            trial.load(number, partial(self._load, task, number))
            trial.admit(number, **task.candidates[number].leeway)
        run(trial)
        if task.energy:
            try:
                where = torch.device(target_of(task.device).torch_device)
                with target_of(task.device).energy(where) as joules:
                    trial.meter(joules)
            except FlashtuneError as error:  # no config's fault: the search must stop
                trouble = MachineTroubleError(str(error))
                return Reply(
                    measurements=(failure(trouble, Outcome.CRASH, policy),) * len(numbers)
                )
        found = trial.finish()
        return Reply(
            measurements=tuple(found.get(number) for number in numbers),
            fatal=trial.lost or any(each.outcome is Outcome.CRASH for each in found.values()),
        )

    def workload(self, task: Task) -> Workload:
        """The inputs for the task's problem and seed, made once."""
        if self._workload is None or self._made_for != (task.problem, task.seed):
            self._workload = None  # first, to free its memory
            device = torch.device(target_of(task.device).torch_device)
            self._workload = Workload.create(
                task.problem, device, cold_bytes=task.device.l2_bytes, seed=task.seed
            )
            self._made_for = (task.problem, task.seed)
        return self._workload

    def _load(self, task: Task, number: int) -> Step:
        candidate = task.candidates[number]
        where = torch.device(target_of(task.device).torch_device)
        source = task.sources[number] if task.sources else None
        return backend_of(candidate).loader(candidate, where, source)()


def main(worker: Worker) -> None:
    """Answer until standard input ends."""
    os.set_inheritable(REPLIES, False)  # not for processes that candidates start
    with os.fdopen(REPLIES, "w", encoding="utf-8") as replies:
        for line in sys.stdin:
            request, task = from_line(line)
            reply = None if task is None else worker.answer(Task.from_data(task))
            replies.write(to_line(request, reply and reply.data()) + "\n")
            replies.flush()
            if reply is not None and reply.fatal:
                return


if __name__ == "__main__":
    main(Worker())
