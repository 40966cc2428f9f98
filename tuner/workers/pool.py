"""Workers that can hang, crash and be killed, and are then replaced.

Usage:
    with WorkerPool(here(4)) as pool:
        pool.submit(task, seconds=60)
        for task, reply in pool.wait(1.0):
            …

A fresh worker is asked first whether it has started, so that a task's own time begins then. One
that answers anything but what it was asked is ended as well, and its task has failed.
Where workers are far and the way to one is lost, its task is given to another one, or begun again
when there is a connection. Several users share a pool, each as an `owner` of its tasks:

    pool.submit(task, 60, owner=self)
    pool.rest(0.5)              # until a worker has something to say; reads and hands out
    pool.collect(self)
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from flashtune.tuner.workers.answers.message import MOST_CHARACTERS, ReplyError, answer_to, to_line
from flashtune.tuner.workers.answers.reply import Reply, policy_of, read_reply
from flashtune.tuner.workers.backlog import Backlog, Outage, Post, Request
from flashtune.tuner.workers.connection import Connection, Ending
from flashtune.tuner.workers.process import wait_for_any
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import Place, Places
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Measurement, Outcome

GREET_SECONDS = 240.0  # to connect, and for a small machine to unpack what it is sent
START_SECONDS = 180.0  # for a fresh process to import torch on a busy machine
LAST_SECONDS = 5.0  # for a process that has closed its output to be gone
CONNECT_SECONDS = 300.0  # for which lost connections are tried again, when no worker is left
LONGEST_PAUSE = 30.0  # seconds between two tries
MOST_LOSSES = 3  # a task that was begun so often may be what breaks the connection
ROSTER_SECONDS = 5.0  # between two looks at which places there are
_TROUBLE = Outcome.ENVIRONMENT

Wait = Callable[[Sequence[Connection], float], list[Connection]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    """How many workers there may be, how many are there, and how many may be at each site."""

    size: int
    working: int
    sites: Mapping[str, int]


class WorkerPool:
    """A worker for each place, started when needed. Not for use from several threads."""

    def __init__(
        self,
        places: Places,
        on_note: Callable[[str], None] = lambda text: None,
        *,
        admits: bool = True,
        ready: Wait = wait_for_any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No worker is started before the first task.

        places: where workers may be, or what says so every few seconds. on_note: told, in a line,
        when a connection is lost and when there is one again. admits: whether workers get tasks
        before somebody calls `admit`. ready, clock: how to wait, and what time it is.
        """
        self._roster = places if callable(places) else None
        self._on_note, self._admits = on_note, admits
        self.ready, self._clock = ready, clock
        self._backlog = Backlog()
        self._answered: dict[Hashable, list[tuple[Task, Reply]]] = {}
        self._pending: Counter[Hashable] = Counter()
        self._counted: _Counts | None = None
        self._posts: list[Post] = []
        self._next_look, self._empty_since = clock() + ROSTER_SECONDS, clock()
        self._set_places(places() if callable(places) else places)

    def __enter__(self) -> "WorkerPool":
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every worker."""
        self.close()

    @property
    def size(self) -> int:
        """How many workers there may be; those that were set aside do not count."""
        return self._counts.size

    @property
    def working(self) -> int:
        """How many workers there are that may be given any task, as of the last turn."""
        return self._counts.working

    @property
    def sites(self) -> Mapping[str, int]:
        """The number of workers of each site that may be given any task, as of the last turn."""
        return self._counts.sites

    @property
    def newcomers(self) -> list[str]:
        """The places of workers that nobody has admitted or set aside yet."""
        return [post.place.name for post in self._posts if not post.admitted and not post.aside]

    def admit(self, name: str) -> None:
        """Let the worker of a place have any task."""
        for post in self._posts:
            if post.place.name == name:
                post.admitted, self._counted = True, None
        self._assign()

    def set_aside(self, name: str, why: str) -> None:
        """Give the worker of a place nothing any more, and end it."""
        for post in self._posts:
            if post.place.name == name:
                post.aside, self._counted = why, None
                self._end([post])

    def pending(self, owner: Hashable = None) -> int:
        """An owner's tasks whose answers have not been collected yet."""
        return self._pending[owner]

    def submit(
        self,
        task: Task,
        seconds: float,
        *,
        owner: Hashable = None,
        at: str = "",
        site: str = "",
        steady: bool = False,
    ) -> None:
        """Queue a task; a worker that has started and takes longer than `seconds` is killed.

        at: the only place where it may be done; if that is lost, the answer says nothing. site:
        where it should be done. steady: by the worker that does all such tasks of the problem.
        """
        self._backlog.add(
            Request(task=task, seconds=seconds, owner=owner, at=at, site=site, steady=steady)
        )
        self._pending[owner] += 1
        self._assign()

    def collect(self, owner: Hashable = None) -> list[tuple[Task, Reply]]:
        """An owner's tasks that have been answered, each once."""
        found = self._answered.pop(owner, [])
        self._pending[owner] -= len(found)
        return found

    def rest(self, seconds: float) -> None:
        """Wait until a worker has something to say, for at most that long."""
        rest([self], seconds)

    def wait(self, seconds: float, owner: Hashable = None) -> list[tuple[Task, Reply]]:
        """The tasks answered within `seconds`: returns once there is any, or none are pending."""
        end = self._clock() + seconds
        while self.pending(owner) and not self._answered.get(owner):
            self.rest(max(0.0, min(end - self._clock(), 0.2)))
            if self._clock() >= end:
                break
        return self.collect(owner)

    def cancel(self, owner: Hashable = None) -> None:
        """Forget an owner's tasks: those begun end with their worker, idle ones live on."""
        self._backlog.remove(lambda request: request.owner == owner)
        self._answered.pop(owner, None)
        self._pending.pop(owner, None)
        self._end([each for each in self._posts if each.request and each.request.owner == owner])
        self._assign()

    def close(self) -> None:
        """End every worker and forget what was pending."""
        self._backlog.remove(lambda request: True)
        self._answered.clear()
        self._pending.clear()
        self._end(self._posts)

    @property
    def has_answers(self) -> bool:
        """Whether there is anything to collect."""
        return bool(self._answered)

    @property
    def heard(self) -> list[Connection]:
        """The connections on which something is waited for."""
        return [
            post.connection
            for post in self._posts
            if post.connection is not None and (post.request is not None or not post.connected)
        ]

    def turn(self, ready: Sequence[Connection]) -> None:
        """Read what these connections have to say, end what took too long, and hand out tasks.

        Raises FlashtuneError when there has been no worker for too long.
        """
        speaking = {id(each) for each in ready}
        now = self._clock()
        for post in self._posts:
            if post.connection is None or (post.request is None and post.connected):
                continue
            speaks = id(post.connection) in speaking
            if speaks or not post.connected or now > post.deadline:
                self._hear(post, speaks)
        if self._roster is not None and self._clock() >= self._next_look:
            self._next_look = self._clock() + ROSTER_SECONDS
            self._set_places(self._roster())
        self._give_up()
        self._assign()
        self._counted = None

    def _set_places(self, places: Sequence[Place]) -> None:
        """Have a post for each of the places; what others were doing is given to them."""
        there = {place.name: place for place in places}
        gone = [post for post in self._posts if post.place.name not in there]
        for post in gone:
            request = post.request
            self._end([post])
            if request is not None:
                self._again(request, began=True)
        kept = [post for post in self._posts if post.place.name in there]
        known = {post.place.name for post in kept}
        new = [each for each in places if each.name not in known]
        self._posts = kept + [Post(each, self._admits) for each in new]
        names = {post.place.name for post in gone}
        for request in self._backlog.remove(lambda request: request.at in names):
            self._answer(request, _unsaid(request))

    @property
    def _counts(self) -> _Counts:
        """Counted once a turn: searches ask for them at each step, and there may be hundreds."""
        if self._counted is None:
            usable = self._usable()
            self._counted = _Counts(
                size=sum(not post.aside for post in self._posts),
                working=sum(post.connected for post in usable),
                sites=Counter(post.place.site for post in usable),
            )
        return self._counted

    def _usable(self) -> list[Post]:
        return [
            post for post in self._posts if post.admitted and not post.aside and not post.outage
        ]

    def _end(self, posts: Sequence[Post]) -> None:
        """End the workers of posts, all at once."""
        connections = [post.connection for post in posts if post.connection is not None]
        for connection in connections:
            connection.hang_up()
        for connection in connections:
            connection.end()
        for post in posts:
            post.connection, post.connected, post.request = None, False, None

    def _assign(self) -> None:
        """Hand out what waits, to workers that are there before those that must be started."""
        if not len(self._backlog):
            return
        idle = [post for post in self._posts if post.connected and post.request is None]
        if idle:
            for post, request in self._backlog.deal(idle, self._usable()):
                self._give(post, request)
        while len(self._backlog) and (started := self._start_more()):
            for post, request in self._backlog.deal(started, self._usable()):
                self._give(post, request)

    def _start_more(self) -> list[Post]:
        """Start workers for what waits; those that are there at once."""
        now = self._clock()
        connecting = [post for post in self._posts if post.connection and not post.connected]
        able = [
            post
            for post in self._posts
            if post.connection is None
            and not post.aside
            and (post.outage is None or now >= post.outage.next_try)
        ]
        if not (connecting or able):
            return []
        candidates = [*self._usable(), *(post for post in able if post.admitted and post.outage)]
        wanted = list(self._backlog.deal([*connecting, *able], candidates))
        for _, request in reversed(wanted):
            self._backlog.put_back(request)
        for post, _ in wanted:
            if post.connection is None:
                post.connection, post.fresh = post.place.transport.start(), True
                post.deadline = now + GREET_SECONDS
                if post.connection.connected:
                    self._greet(post)
        return [post for post, _ in wanted if post.connected]

    def _give(self, post: Post, request: Request) -> None:
        """Hand a worker a request, or ask a fresh one first whether it has started.

        One that is gone, or says what nobody asked, is ended.
        """
        assert post.connection is not None
        if not post.connection.is_quiet:
            self._backlog.put_back(request)
            self._part_with(post)
            return
        post.request, post.problem = request, request.task.problem
        if post.fresh:
            self._ask(post, None, START_SECONDS)
        else:
            self._ask(post, request.task.data(), request.seconds)

    def _ask(self, post: Post, content: Any, seconds: float) -> None:
        """Send a line under the name of the worker's request, to be answered in that time."""
        assert post.connection is not None
        assert post.request is not None
        post.deadline = self._clock() + seconds
        post.connection.write(to_line(post.request.name, content))

    def _part_with(self, post: Post) -> None:
        """End an idle worker that is gone, or says what nobody asked."""
        assert post.connection is not None
        try:
            post.connection.read()
        except EOFError:
            self._replace(post, Outcome.CRASH)
        except ReplyError:
            pass
        self._end([post])

    def _hear(self, post: Post, readable: bool) -> None:
        """Read what a worker has to say, or end it where that takes too long."""
        assert post.connection is not None
        try:
            line = post.connection.read() if readable else None
            if post.connection.connected and not post.connected:
                self._greet(post)
            if line is not None and post.request is not None:
                self._read(post, post.request, answer_to(post.request.name, line))
            elif self._clock() > post.deadline:
                self._replace(post, Outcome.TIMEOUT)
        except EOFError:
            self._replace(post, Outcome.CRASH)
        except ReplyError as error:
            self._refuse(post, error)

    def _greet(self, post: Post) -> None:
        post.connected = True
        if post.outage is not None:
            post.outage = None
            self._note(post, "connected again")

    def _read(self, post: Post, request: Request, content: Any) -> None:
        """Take a worker's reply, or give it its first task once it has started."""
        if not post.fresh:
            self._take(post, request, read_reply(content, request.task))
        elif content is None:
            post.fresh = False
            self._ask(post, request.task.data(), request.seconds)
        else:
            raise ReplyError("it answers a greeting with something else")

    def _take(self, post: Post, request: Request, reply: Reply) -> None:
        post.request = None
        trouble = [each for each in reply.measurements if each and each.outcome is _TROUBLE]
        if trouble and self._has_others(post):
            self._note(
                post,
                f"it is set aside because of a problem of its machine: {trouble[0].error}",
            )
            self.set_aside(post.place.name, trouble[0].error)
            self._again(request, began=False)
            return
        if reply.fatal:
            self._end([post])
        self._answer(request, reply)

    def _answer(self, request: Request, reply: Reply) -> None:
        self._answered.setdefault(request.owner, []).append((request.task, reply))

    def _refuse(self, post: Post, error: ReplyError) -> None:
        """End a worker that does not keep to what is agreed: it is believed no more.

        What else it sent would be taken for the answer to the next task.
        """
        connected, request = post.connected, post.request
        self._end([post])
        if not connected:
            self._lost(post, request, connected, f"no worker could be started: {error}")
        elif request is not None:
            why = f"the worker gave no valid reply: {error}"
            self._answer(request, _failure(request, Outcome.CRASH, why))

    def _replace(self, post: Post, outcome: Outcome) -> None:
        """End a worker that is of no more use; its request has failed or is begun again."""
        assert post.connection is not None
        connected, request = post.connected, post.request
        unsent = outcome is Outcome.TIMEOUT and post.connection.unsent > 0
        ending = post.connection.end(LAST_SECONDS if outcome is Outcome.CRASH else 0.0)
        post.connection, post.connected, post.request = None, False, None
        why = _why_ended(post, request, outcome, ending)
        if outcome is Outcome.CRASH and ending.why_lost is not None:
            self._lost(post, request, connected, ending.why_lost)
        elif unsent:
            self._lost(post, request, connected, f"the worker takes no task: {why}")
        elif not connected:
            self._lost(post, request, connected, f"no worker could be started: {why}")
        elif request is not None:
            if outcome is Outcome.TIMEOUT and not request.hung and self._has_others(post):
                request.hung = True  # or its machine did: another one has its say
                self._again(request, began=False)
            else:
                self._answer(request, _failure(request, outcome, why))

    def _has_others(self, post: Post) -> bool:
        """Whether there are workers of another machine."""
        return any(each.place.site != post.place.site for each in self._usable())

    def _lost(self, post: Post, request: Request | None, connected: bool, why: str) -> None:
        """Note that there is no way to a worker; others get its request, or it again."""
        if connected or post.outage is None:
            post.outage = Outage(why, began=self._clock())
        post.outage.why = why
        pause = min(2.0**post.outage.tries, LONGEST_PAUSE)
        post.outage.tries += 1
        post.outage.next_try = self._clock() + pause
        if request is not None and not self._again(request, began=connected, why=why):
            return
        if len(self._posts) == 1:
            self._note(post, f"{why}: trying again in {pause:.0f} s")
        elif post.outage.tries == 1:
            self._note(post, f"{why}: its work goes to others, and it is tried again")

    def _note(self, post: Post, text: str) -> None:
        named = len(self._posts) == 1 or post.place.name in text
        self._on_note(text if named else f"{post.place.name}: {text}")

    def _again(self, request: Request, *, began: bool, why: str = "its worker is gone") -> bool:
        """Have a request begun again; False where it breaks every connection, which it is told."""
        request.losses += began
        if request.losses >= MOST_LOSSES:
            error = f"lost {MOST_LOSSES} times: {why}"
            self._answer(request, _failure(request, Outcome.CRASH, error))
            return False
        if request.at:
            self._answer(request, _unsaid(request))
        else:
            self._backlog.put_back(request)
        return True

    def _give_up(self) -> None:
        """Raise FlashtuneError where there has been no worker for too long."""
        now = self._clock()
        able = [post for post in self._posts if not post.aside]
        if able:
            self._empty_since = now
        away = [post.outage for post in able if post.outage and post.connection is None]
        since = max((each.began for each in away), default=self._empty_since)
        if len(self._backlog) and len(away) == len(able) and now - since > CONNECT_SECONDS:
            why = away[0].why if away else "no worker is left"
            raise FlashtuneError(
                f"{why} (tried for {CONNECT_SECONDS:.0f} s). All measurements are kept: run the "
                "same command again to continue"
            )


def rest(pools: Sequence[WorkerPool], seconds: float) -> None:
    """Wait until a worker of any pool has something to say, at most that long; then read it.

    Does not wait while there is something to collect.
    """
    seconds = 0.0 if any(pool.has_answers for pool in pools) else seconds
    speaking = pools[0].ready([each for pool in pools for each in pool.heard], seconds)
    for pool in pools:
        pool.turn(speaking)


def _why_ended(post: Post, request: Request | None, outcome: Outcome, ending: Ending) -> str:
    if outcome is Outcome.TIMEOUT and request is not None and post.fresh:
        why = f"the worker has not started in {START_SECONDS:.0f} s"
    elif outcome is Outcome.TIMEOUT:
        why = f"no answer in {request.seconds if request else GREET_SECONDS:.0f} s"
    elif ending.code < 0:
        why = f"the worker died by signal {-ending.code}"
    else:
        why = f"the worker died with exit code {ending.code}"
    return f"{why}: {ending.said}" if ending.said else why


def _unsaid(request: Request) -> Reply:
    """The reply that says nothing of any config."""
    return Reply(measurements=(None,) * len(request.task.candidates))


def _failure(request: Request, outcome: Outcome, error: str) -> Reply:
    """The reply for a task whose worker ended. Of several configs it is not known which did it."""
    if len(request.task.candidates) > 1:
        return _unsaid(request)
    measurement = Measurement(
        outcome=outcome, error=error[:MOST_CHARACTERS], policy=policy_of(request.task)
    )
    return Reply(measurements=(measurement,))
