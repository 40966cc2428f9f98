"""Worker processes that can hang, crash and be killed, and are then replaced.

Usage:
    with WorkerPool(4) as pool:
        pool.submit(task, seconds=60)
        for task, reply in pool.wait(1.0):
            …
"""

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO, NamedTuple

from flashtune.tuner.task import Reply, Task
from flashtune.tuning_db.record import Measurement, Outcome

COMMAND = (sys.executable, "-m", "flashtune.tuner.worker")
START_SECONDS = 180.0  # a fresh process may import torch on a busy machine


class _Request(NamedTuple):
    task: Task
    seconds: float


class _Process:
    """One worker process and the request it is working on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is for the search, which then ends its workers
        )
        assert self.popen.stdin and self.popen.stdout
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self.buffer = b""
        self.fresh = True
        self.request: _Request | None = None
        self.deadline = 0.0

    def send(self, request: _Request) -> None:
        """Hand over a request; a process that is gone shows at the next read."""
        self.request = request
        allowance = START_SECONDS if self.fresh else 0.0
        self.deadline = time.monotonic() + request.seconds + allowance
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(request.task.to_json().encode() + b"\n")
            self.stdin.flush()

    def read(self) -> Reply | None:
        """The reply if it is complete; raises EOFError when the process is gone."""
        chunk = self.stdout.read()
        if chunk == b"":
            raise EOFError
        self.buffer += chunk or b""
        line, found, rest = self.buffer.partition(b"\n")
        if not found:
            return None
        self.buffer = rest
        self.fresh = False
        return Reply.from_json(line.decode())

    def end(self) -> str:
        """Kill it with all that it started, and return the last thing it said."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, 9)
        self.popen.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        for stream in (self.stdin, self.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return said[-1] if said else ""


class WorkerPool:
    """Up to `size` worker processes, started when needed. Not for use from several threads."""

    def __init__(self, size: int, command: Sequence[str] = COMMAND) -> None:
        """No process is started before the first task."""
        self.size = size
        self._command = tuple(command)
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
        for process in [each for each in self._processes if each.request is not None]:
            process.end()
            self._processes.remove(process)

    def close(self) -> None:
        """End every process and forget what was pending."""
        self._queue.clear()
        for process in self._processes:
            process.end()
        self._processes.clear()

    def _assign(self) -> None:
        idle = [process for process in self._processes if process.request is None]
        while self._queue and (idle or len(self._processes) < self.size):
            if not idle:
                self._processes.append(_Process(self._command))
                idle.append(self._processes[-1])
            idle.pop().send(self._queue.popleft())

    def _collect(self, seconds: float) -> list[tuple[Task, Reply]]:
        busy = [process for process in self._processes if process.request is not None]
        with selectors.DefaultSelector() as selector:
            for process in busy:
                selector.register(process.stdout, selectors.EVENT_READ, process)
            ready = [key.data for key, _ in selector.select(seconds)]
        answered = []
        for process in busy:
            reply = self._outcome(process, process in ready)
            if reply is not None and process.request is not None:
                answered.append((process.request.task, reply))
                process.request = None
        return answered

    def _outcome(self, process: _Process, readable: bool) -> Reply | None:
        """What became of the process's request, None while it works on it."""
        try:
            reply = process.read() if readable else None
        except EOFError:
            return self._replace(process, Outcome.CRASH, "the worker died")
        if reply is not None and reply.fatal:
            self._replace(process, Outcome.CRASH, "")
        elif reply is None and time.monotonic() > process.deadline and process.request:
            seconds = process.request.seconds
            return self._replace(process, Outcome.TIMEOUT, f"no answer in {seconds:.0f} s")
        return reply

    def _replace(self, process: _Process, outcome: Outcome, why: str) -> Reply:
        said = process.end()
        self._processes.remove(process)
        code = process.popen.returncode
        if outcome is Outcome.CRASH:
            why += f" by signal {-code}" if code < 0 else f" with exit code {code}"
        count = len(process.request.task.configs) if process.request else 0
        error = f"{why}: {said}"[:500] if said else why
        return Reply(measurements=(Measurement(outcome=outcome, error=error),) * count)
