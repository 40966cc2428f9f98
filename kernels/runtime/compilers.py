"""Compilers that run in threads beside a race and can be ended, even if they hang.

Usage:
    compilers = Compilers(4)
    futures = [compilers.submit(compile_it, each) for each in …]
    compilers.wait(10.0)
    compilers.end()        # cancels jobs that have not begun, kills programs that still run

Most of a compiler's work is done by programs that a thread waits for (g++, ptxas); they are killed
with all their children. Compilation inside this process (Triton's passes, NVRTC) cannot be ended:
it runs in a daemon thread, which does not keep the process alive.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
_Job = tuple[Future[Any], Callable[[], Any]]
_TASKS = Path("/proc/self/task")
_END_SECONDS = 1.0  # for threads to notice that their programs were killed


class Compilers:
    """A number of threads, each with one job at a time. The owner must end it, once."""

    def __init__(self, count: int) -> None:
        """Threads are started when there is work for them."""
        self._count = count
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no more
        self._futures: list[Future[Any]] = []
        self._threads: list[threading.Thread] = []

    def submit(self, compile_it: Callable[[], Result]) -> "Future[Result]":
        """Queue a job and return its future."""
        future: Future[Result] = Future()
        self._futures.append(future)
        self._jobs.put((future, compile_it))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name="flashtune compiler", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def wait(self, seconds: float) -> None:
        """Wait until all jobs are done, or until the time is over."""
        wait(self._futures, timeout=seconds)

    def cancel(self) -> None:
        """Cancel the jobs that have not begun."""
        for future in self._futures:
            future.cancel()

    def end(self) -> None:
        """Cancel, and kill the programs that still run, repeatedly while threads start new ones.

        Returns once all threads have ended, or a second later.
        """
        self.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _END_SECONDS
        while any(not future.done() for future in self._futures):
            for thread in self._threads:
                if thread.native_id is not None:
                    for pid in _children(_TASKS / str(thread.native_id)):
                        _kill(pid)
            if time.monotonic() > deadline:
                break
            self.wait(0.02)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, compile_it = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(compile_it())
            except BaseException as error:
                future.set_exception(error)


def _children(task: Path) -> list[int]:
    """The processes that a thread has started and not yet waited for."""
    try:
        return [int(each) for each in (task / "children").read_text().split()]
    except OSError:  # it has ended, or this system does not list children
        return []


def _kill(pid: int) -> None:
    """Kill a process after all its descendants, which may hold its pipes open."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in _children(task):
            _kill(child)
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
