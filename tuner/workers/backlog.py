"""Requests that wait for a worker, and which of them a worker is given.

Usage:
    backlog.add(request)
    for post, request in backlog.deal(idle, usable):
        …
"""

import hashlib
import itertools
import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field

from flashtune.tuner.workers.connection import Connection
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


@dataclass(slots=True)
class Outage:
    """A time without connection: why, since when, how often it was tried in vain, the next try."""

    why: str
    began: float
    tries: int = 0
    next_try: float = 0.0


@dataclass(eq=False, slots=True)
class Post:
    """A place, the worker there, and what it works on.

    admitted: whether it may be given any task, and not only those for it alone. aside: why it is
    given none, if so. fresh: whether its worker has not said yet that it has started.
    problem: of which it was asked last.
    """

    place: Place
    admitted: bool
    aside: str = ""
    connection: Connection | None = None
    connected: bool = False
    fresh: bool = True
    request: Request | None = None
    deadline: float = 0.0
    outage: Outage | None = None
    problem: Problem | None = None


class Backlog:
    """The waiting requests of a pool."""

    def __init__(self) -> None:
        """None waits."""
        self._pinned: dict[str, deque[Request]] = {}
        self._steady: list[Request] = []
        self._open: dict[tuple[str, Problem], deque[Request]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._waiting

    def add(self, request: Request) -> None:
        """Behind all others of its kind."""
        self._queue_of(request).append(request)
        self._waiting += 1

    def put_back(self, request: Request) -> None:
        """Before all others of its kind."""
        self._queue_of(request).insert(0, request)
        self._waiting += 1

    def remove(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Those that are not wanted any more, which no longer wait."""
        removed: list[Request] = []
        for queue in [*self._pinned.values(), self._steady, *self._open.values()]:
            removed += filter(unwanted, queue)
            kept = [each for each in queue if not unwanted(each)]
            queue.clear()
            queue.extend(kept)
        self._waiting -= len(removed)
        return removed

    def deal(self, idle: Sequence[Post], usable: Sequence[Post]) -> Iterator[tuple[Post, Request]]:
        """Each idle worker with the request that it should be given now, if there is one.

        usable: the workers that may be given anything. A request that is not taken is to be put
        back. A problem that no worker is at goes first, so that none waits for the others' end;
        then the worker's own, whose inputs it has; then the oldest.
        """
        if not self._waiting or not idle:
            return
        able = {id(each) for each in usable}
        judges = [(each, _judge(each, usable)) for each in self._steady]
        sites = {each.place.site for each in usable}
        several = sum(map(bool, self._open.values())) > 1  # else it does not matter who has what
        taken = Counter(each.problem for each in usable if several)
        for post in idle:
            if not self._waiting:
                return
            if pinned := self._pinned.get(post.place.name):
                yield post, self._taken(pinned, 0)
                continue
            if id(post) not in able:
                continue
            steady = next((each for each, judge in judges if judge is post), None)
            if steady is not None:
                judges = [(each, judge) for each, judge in judges if each is not steady]
                yield post, self._taken(self._steady, self._steady.index(steady))
                continue
            queue = self._best(post, sites, taken)
            if queue is not None:
                taken[post.problem] -= 1
                taken[queue[0].task.problem] += 1
                yield post, self._taken(queue, 0)

    def _best(
        self, post: Post, sites: Collection[str], taken: Counter[Problem | None]
    ) -> deque[Request] | None:
        """Where the next open request of a worker waits."""
        there = {
            problem: queue
            for (site, problem), queue in self._open.items()
            if queue and (site in ("", post.place.site) or site not in sites)
        }
        if len(there) > 1:
            there = {each: there[each] for each in there if not taken[each]} or there
        if post.problem in there:
            return there[post.problem]
        return min(there.values(), key=lambda queue: queue[0].number, default=None)

    def _taken(self, queue: MutableSequence[Request], place: int) -> Request:
        self._waiting -= 1
        return queue.pop(place) if place else _first(queue)

    def _queue_of(self, request: Request) -> MutableSequence[Request]:
        if request.at:
            return self._pinned.setdefault(request.at, deque())
        if request.steady:
            return self._steady
        return self._open.setdefault((request.site, request.task.problem), deque())


def _first(queue: MutableSequence[Request]) -> Request:
    request = queue[0]
    del queue[0]
    return request


def _judge(request: Request, usable: Sequence[Post]) -> Post | None:
    """The worker for a problem's steady tasks: the same one while it is there.

    Problems are spread over the workers; where one is gone, only its problems move.
    """
    key = request.task.problem.key

    def rank(post: Post) -> bytes:
        return hashlib.sha256(f"{post.place.name}\n{key}".encode()).digest()

    return max(usable, key=rank, default=None)
