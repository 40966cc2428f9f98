"""Worker processes that can hang, crash and be killed, and are then replaced.

Usage:
    with WorkerPool(4) as pool:
        pool.submit(task, seconds=60)
        for task, reply in pool.wait(1.0):
            …

A worker that answers anything but what it was asked is ended as well, and its task has failed.
Where workers are far and the way to one is lost, its task is begun again on another connection.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from flashtune.tuner.workers.answers.message import MOST_CHARACTERS, ReplyError, answer_to, to_line
from flashtune.tuner.workers.answers.reply import Reply, policy_of, read_reply
from flashtune.tuner.workers.process import Ending, WorkerProcess, wait_for_any
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import LocalTransport, Transport
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Measurement, Outcome

START_SECONDS = 180.0  # a fresh process may import torch on a busy machine
LAST_SECONDS = 5.0  # for a process that has closed its output to be gone
CONNECT_SECONDS = 300.0  # for which a lost connection is tried again
LONGEST_PAUSE = 30.0  # seconds between two tries
MOST_LOSSES = 3  # a task that was begun so often may be what breaks the connection


@dataclass(slots=True)
class _Request:
    """A task to be answered, the name that its answer must bear, and how often it was lost."""

    task: Task
    seconds: float
    losses: int = 0
    name: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(slots=True)
class _Outage:
    """A time without connection: when it began, how often it was mended in vain, the next try."""

    began: float
    tries: int = 0
    next_try: float = 0.0


class _Process(WorkerProcess):
    """A worker process and the request it is working on."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.fresh = True
        self.request: _Request | None = None
        self.deadline = 0.0

    def send(self, request: _Request) -> None:
        """Hand over a request."""
        self.request = request
        allowance = START_SECONDS if self.fresh else 0.0
        self.deadline = time.monotonic() + request.seconds + allowance
        self.write(to_line(request.name, request.task.data()))

    def reply(self) -> Reply | None:
        """The reply if it is complete; raises EOFError when the process is gone, or ReplyError."""
        line = self.read()
        if line is None:
            return None
        assert self.request
        self.fresh = False
        return read_reply(answer_to(self.request.name, line), self.request.task)


class WorkerPool:
    """Up to `size` worker processes, started when needed. Not for use from several threads."""

    def __init__(
        self,
        size: int,
        transport: Transport | None = None,
        on_outage: Callable[[str], None] = lambda text: None,
    ) -> None:
        """No process is started before the first task. transport: to workers not of this machine.

        on_outage: told, in a line, when a connection is lost and when there is one again.
        """
        self.size = size
        self._transport = transport or LocalTransport()
        self._on_outage = on_outage
        self._outage: _Outage | None = None
        self._queue: deque[_Request] = deque()
        self._processes: list[_Process] = []

    def __enter__(self) -> "WorkerPool":
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process."""
        self.close()

    @property
    def pending(self) -> int:
        """Tasks that have not been answered yet."""
        return len(self._queue) + sum(p.request is not None for p in self._processes)

    def submit(self, task: Task, seconds: float) -> None:
        """Queue a task; a worker that takes longer than `seconds` for it is killed."""
        self._queue.append(_Request(task, seconds))
        self._assign()

    def wait(self, seconds: float) -> list[tuple[Task, Reply]]:
        """The tasks answered within `seconds`: returns once there is any, or none are pending."""
        end = time.monotonic() + seconds
        while self.pending:
            answered = self._collect(max(0.0, min(end - time.monotonic(), 0.2)))
            self._assign()
            if answered or time.monotonic() >= end:
                return answered
        return []

    def cancel(self) -> None:
        """Forget every pending task: those begun end with their process, idle ones live on."""
        self._queue.clear()
        self._end([each for each in self._processes if each.request is not None])

    def close(self) -> None:
        """End every process and forget what was pending."""
        self._queue.clear()
        self._end(list(self._processes))

    def _end(self, processes: Sequence[_Process]) -> None:
        """End processes, all at once."""
        for process in processes:
            process.hang_up()
        for process in processes:
            process.end()
            self._processes.remove(process)

    def _assign(self) -> None:
        idle = [process for process in self._processes if process.request is None]
        if self._queue:
            self._end([each for each in idle if not each.is_quiet])  # dead, or it answers nothing
            idle = [process for process in idle if process in self._processes]
        while self._queue and (idle or self._may_start()):
            if not idle:
                self._processes.append(_Process(self._transport))
                idle.append(self._processes[-1])
            idle.pop().send(self._queue.popleft())

    def _may_start(self) -> bool:
        paused = self._outage is not None and time.monotonic() < self._outage.next_try
        return len(self._processes) < self.size and not paused

    def _collect(self, seconds: float) -> list[tuple[Task, Reply]]:
        busy = [process for process in self._processes if process.request is not None]
        ready = wait_for_any(busy, seconds)
        answered = []
        for process in busy:
            request = process.request
            reply = self._outcome(process, process in ready)
            if reply is not None and request is not None:
                answered.append((request.task, reply))
                process.request = None
        return answered

    def _outcome(self, process: _Process, readable: bool) -> Reply | None:
        """What became of the process's request, None while it works on it."""
        connected = process.connected
        try:
            reply = process.reply() if readable else None
        except EOFError:
            return self._replace(process, Outcome.CRASH)
        except ReplyError as error:
            return self._refuse(process, error)
        if self._outage and process.connected and not connected:
            self._outage = None
            self._on_outage("connected again")
        if reply is not None and reply.fatal:
            self._end([process])
        elif reply is None and time.monotonic() > process.deadline:
            return self._replace(process, Outcome.TIMEOUT)
        return reply

    def _refuse(self, process: _Process, error: ReplyError) -> Reply | None:
        """The reply for a process that does not keep to what is agreed: it is believed no more.

        What else it sent would be taken for the answer to the next task.
        """
        self._end([process])
        request = process.request
        assert request
        if not process.connected:
            return self._lost(process, request, f"no worker could be started: {error}")
        return _failure(request, Outcome.CRASH, f"the worker gave no valid reply: {error}")

    def _replace(self, process: _Process, outcome: Outcome) -> Reply | None:
        """The reply for a process that is of no more use; None if its request is begun again."""
        unsent = outcome is Outcome.TIMEOUT and process.unsent > 0
        ending = process.end(LAST_SECONDS if outcome is Outcome.CRASH else 0.0)
        self._processes.remove(process)
        request = process.request
        assert request
        why = _why_ended(request, outcome, ending)
        if outcome is Outcome.CRASH and ending.why_lost is not None:
            return self._lost(process, request, ending.why_lost)
        if unsent:
            return self._lost(process, request, f"the worker takes no task: {why}")
        if not process.connected:
            return self._lost(process, request, f"no worker could be started: {why}")
        return _failure(request, outcome, why)

    def _lost(self, process: _Process, request: _Request, why: str) -> Reply | None:
        """Begin the request again when it is time; a failure where it breaks every connection.

        Raises FlashtuneError when there has been no connection for too long.
        """
        now = time.monotonic()
        if process.connected or self._outage is None:
            self._outage = _Outage(began=now)
        if process.connected:
            request.losses += 1
            if request.losses == MOST_LOSSES:
                return _failure(request, Outcome.CRASH, f"lost {MOST_LOSSES} times: {why}")
        if now - self._outage.began > CONNECT_SECONDS:
            raise FlashtuneError(
                f"{why} (tried for {CONNECT_SECONDS:.0f} s). What was measured is kept: run the "
                "same command again to go on"
            )
        pause = min(2.0**self._outage.tries, LONGEST_PAUSE)
        self._outage.tries += 1
        self._outage.next_try = now + pause
        self._queue.appendleft(request)
        self._on_outage(f"{why}: trying again in {pause:.0f} s")
        return None


def _why_ended(request: _Request, outcome: Outcome, ending: Ending) -> str:
    if outcome is Outcome.TIMEOUT:
        why = f"no answer in {request.seconds:.0f} s"
    elif ending.code < 0:
        why = f"the worker died by signal {-ending.code}"
    else:
        why = f"the worker died with exit code {ending.code}"
    return f"{why}: {ending.said}" if ending.said else why


def _failure(request: _Request, outcome: Outcome, error: str) -> Reply:
    """The reply for a task whose worker ended. Of several configs it is not known which did it."""
    n_configs = len(request.task.candidates)
    if n_configs > 1:
        return Reply(measurements=(None,) * n_configs)
    measurement = Measurement(
        outcome=outcome, error=error[:MOST_CHARACTERS], policy=policy_of(request.task)
    )
    return Reply(measurements=(measurement,))
