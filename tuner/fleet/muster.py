"""Compares the workers of a fleet before they measure anything: by the time of one config.

Usage:
    muster = Muster(pool, task, on_note=print)     # the pool admits nobody by itself
    muster.turn()                                  # again and again, as workers come and go

All have the same device, by its name. One that is slow for a reason of its own (heat, another
job, a slower clock) would mislead a search, whose times come from any of them.
"""

import time
from collections.abc import Callable

from flashtune.tuner.workers.answers.reply import Reply
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.record import Measurement, Outcome

SECONDS = 300.0  # for the reference config, with compiling it
GATHER_SECONDS = 60.0  # for others, once the first has answered
MOST_TRIES = 2  # before a worker is set aside: it may have been disturbed


class Muster:
    """Admits the workers of a pool that agree with most, and sets the others aside.

    What they are compared by is the median of those that are there first; of two, the faster one:
    trouble makes slow. Workers that come later are compared with that.
    """

    def __init__(
        self,
        pool: WorkerPool,
        task: Task,
        on_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """task: a comparison of the reference config alone."""
        self._pool, self._task, self._on_note, self._clock = pool, task, on_note, clock
        self._asked: dict[str, int] = {}  # how often
        self._awaited: dict[str, None] = {}  # whose answer has not been collected
        self._found: dict[str, Measurement] = {}
        self._reference: tuple[str, Measurement] | None = None
        self._first_answer: float | None = None

    def turn(self) -> None:
        """Ask who has come, hear who has answered, and judge them when it is time."""
        newcomers = self._pool.newcomers
        for name in newcomers:
            if name not in self._asked:
                self._ask(name)
        for name in list(self._awaited):
            for _, reply in self._pool.collect((self, name)):
                del self._awaited[name]
                if name in newcomers:
                    self._hear(name, reply)
                else:  # it is gone or set aside; if it comes back, it is asked anew
                    del self._asked[name]
        if self._reference is None and self._found and self._is_time(newcomers):
            self._choose()
        if self._reference is not None:
            for name in list(self._found):
                self._judge(name, self._found.pop(name), *self._reference)

    def _ask(self, name: str) -> None:
        self._asked[name] = self._asked.get(name, 0) + 1
        self._awaited[name] = None
        self._pool.submit(self._task, SECONDS, owner=(self, name), at=name)

    def _hear(self, name: str, reply: Reply) -> None:
        measurement = reply.measurement
        if measurement is None:  # it was lost, and is asked again once it is there
            self._asked[name] -= 1
            self._ask(name)
            return
        self._found[name] = measurement
        if self._first_answer is None:
            self._first_answer = self._clock()

    def _is_time(self, newcomers: list[str]) -> bool:
        """Whether all have answered, or those that have not took too long."""
        assert self._first_answer is not None
        late = self._clock() > self._first_answer + GATHER_SECONDS
        return late or all(name in self._found for name in newcomers)

    def _choose(self) -> None:
        """Settle what workers are compared by. Where the config works nowhere, by nothing."""
        timed = {name: each for name, each in self._found.items() if each.outcome is Outcome.OK}
        if timed:
            ranked = sorted(timed, key=lambda name: timed[name].median_us or 0.0)
            name = ranked[(len(ranked) - 1) // 2]
            self._reference = name, timed[name]
            return
        why = next(iter(self._found.values())).error
        self._on_note(
            f"workers are not compared, because the default config works on none of them ({why})"
        )
        for name in self._found:
            self._pool.admit(name)
        self._found.clear()

    def _judge(self, name: str, found: Measurement, reference: str, expected: Measurement) -> None:
        """Admit a worker, ask it again, or set it aside."""
        if agree(found, expected):
            self._pool.admit(name)
        elif self._asked[name] < MOST_TRIES:
            self._ask(name)
        else:
            time_us = found.median_us
            took = f"takes {time_us:.2f} us" if time_us else f"fails ({found.error})"
            why = (
                f"{name} is set aside, since its times would mislead: the default config {took} "
                f"there, but {expected.median_us:.2f} us on {reference}"
            )
            self._on_note(why)
            self._pool.set_aside(name, why)


def agree(one: Measurement, other: Measurement) -> bool:
    """Whether two times of the same config are no further apart than both are noisy."""
    if one.median_us is None or other.median_us is None:
        return False
    return abs(one.median_us - other.median_us) <= one.noise_us + other.noise_us
