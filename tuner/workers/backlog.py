"""Requests that wait for a worker, and which of them a worker is given.

Usage:
    backlog.add(request)
    request = backlog.take(post, usable)      # None where there is nothing for it
"""

import hashlib
import itertools
import secrets
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.problem import Problem

_NUMBERS = itertools.count()


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """A task to be answered, the name that its answer must bear, and what befell it so far.

    at: the only place that may answer it. site: where it was compiled, and is measured while
    there are workers. steady: all such tasks of a problem go to one worker while that is there.
    losses: how often it was begun in vain. hung: whether a worker took too long for it.
    """

    task: Task
    seconds: float
    owner: Hashable = None
    at: str = ""
    site: str = ""
    steady: bool = False
    losses: int = 0
    hung: bool = False
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = field(default_factory=lambda: next(_NUMBERS))


class Asked(Protocol):
    """What is to be known of a worker to choose its next request."""

    @property
    def place(self) -> Place:
        """Where it is."""

    @property
    def problem(self) -> Problem | None:
        """Of which it was asked last: it has the inputs."""


class Backlog:
    """The waiting requests of a pool."""

    def __init__(self) -> None:
        """None waits."""
        self._pinned: dict[str, deque[Request]] = {}
        self._steady: deque[Request] = deque()
        self._open: dict[tuple[str, Problem], deque[Request]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues()))

    def __iter__(self) -> Iterator[Request]:
        """Those that wait."""
        return itertools.chain.from_iterable(self._queues())

    def add(self, request: Request) -> None:
        """Behind all others of its kind."""
        self._queue_of(request).append(request)

    def put_back(self, request: Request) -> None:
        """Before all others of its kind."""
        self._queue_of(request).appendleft(request)

    def remove(self, requests: Iterable[Request]) -> None:
        """Forget some of those that wait."""
        gone = {id(each) for each in requests}
        for queue in self._queues():
            kept = [each for each in queue if id(each) not in gone]
            queue.clear()
            queue.extend(kept)

    def of_place(self, name: str) -> list[Request]:
        """Those that only this place may answer."""
        return list(self._pinned.get(name, ()))

    def take(self, post: Asked, usable: Sequence[Asked]) -> Request | None:
        """The request that a worker should be given now, which no longer waits.

        usable: the workers that may be given anything.
        """
        queue = self._best(post, usable)
        if queue is None:
            return None
        if queue is not self._steady:
            return queue.popleft()
        mine = next(each for each in queue if _judge(each, usable) is post)
        queue.remove(mine)
        return mine

    def has_for(self, post: Asked, usable: Sequence[Asked]) -> bool:
        """Whether `take` would give something."""
        return self._best(post, usable) is not None

    def _best(self, post: Asked, usable: Sequence[Asked]) -> deque[Request] | None:
        """Where the next request of a worker waits.

        A problem that no worker is at goes first, so that none waits for the others' end; then
        the worker's own, whose inputs it has; then the oldest.
        """
        if pinned := self._pinned.get(post.place.name):
            return pinned
        if not any(each is post for each in usable):
            return None
        if any(_judge(each, usable) is post for each in self._steady):
            return self._steady
        sites = {each.place.site for each in usable}
        there = {
            problem: queue
            for (site, problem), queue in self._open.items()
            if queue and (site in ("", post.place.site) or site not in sites)
        }
        if len(there) > 1:
            taken = {each.problem for each in usable}
            there = {each: there[each] for each in there if each not in taken} or there
        if post.problem in there:
            return there[post.problem]
        return min(there.values(), key=lambda queue: queue[0].number, default=None)

    def _queue_of(self, request: Request) -> deque[Request]:
        if request.at:
            return self._pinned.setdefault(request.at, deque())
        if request.steady:
            return self._steady
        return self._open.setdefault((request.site, request.task.problem), deque())

    def _queues(self) -> Iterator[deque[Request]]:
        yield from self._pinned.values()
        yield self._steady
        yield from self._open.values()


def _judge(request: Request, usable: Sequence[Asked]) -> Asked | None:
    """The worker for a problem's steady tasks: the same one while it is there.

    Problems are spread over the workers; where one is gone, only its problems move.
    """

    def rank(post: Asked) -> bytes:
        text = f"{post.place.name}\n{request.task.problem.key}"
        return hashlib.sha256(text.encode()).digest()

    return max(usable, key=rank, default=None)
