"""Which of the waiting tasks each worker is given."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.candidate import Candidate
from flashtune.tuner.workers.backlog import Backlog, Post, Request
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

Ask = Callable[..., Request]


@pytest.fixture
def problems(problem: Problem) -> list[Problem]:
    return [replace(problem, n_probes=number) for number in (4, 5, 6)]


@pytest.fixture
def ask(device: Device, problems: list[Problem]) -> Ask:
    """A request of a problem: `ask(0, site="a")`."""

    def make(number: int = 0, **changes: object) -> Request:
        problem = problems[number]
        candidate = Candidate(problem, default_config(problem, device), device)
        task = Task(kind="measure", candidates=(candidate,))
        return Request(task=task, seconds=1.0, **changes)  # type: ignore[arg-type]

    return make


def posts(*sites: str) -> list[Post]:
    """Workers of these sites that have done nothing yet."""
    return [
        Post(Place(name=f"worker {number}", site=site), admitted=True)
        for number, site in enumerate(sites)
    ]


def dealt(backlog: Backlog, idle: list[Post], usable: list[Post]) -> list[Request | None]:
    """What each of the idle workers gets."""
    found = {id(post): request for post, request in backlog.deal(idle, usable)}
    return [found.get(id(post)) for post in idle]


def filled(*requests: Request) -> Backlog:
    backlog = Backlog()
    for request in requests:
        backlog.add(request)
    return backlog


def test_the_oldest_goes_first_and_what_is_put_back_before_it(ask: Ask) -> None:
    first, second = ask(), ask()
    backlog, [worker] = filled(first, second), posts("")
    assert len(backlog) == 2
    assert dealt(backlog, [worker], [worker]) == [first]
    backlog.put_back(first)
    assert dealt(backlog, [worker], [worker]) == [first]
    assert dealt(backlog, [worker], [worker]) == [second]
    assert (dealt(backlog, [worker], [worker]), len(backlog)) == ([None], 0)


def test_a_worker_goes_on_with_its_problem_unless_another_has_no_worker(
    ask: Ask, problems: list[Problem]
) -> None:
    workers = posts("", "")
    workers[0].problem, workers[1].problem = problems[0], problems[1]
    old, own = ask(1), ask(0)
    assert dealt(filled(old, own), workers[:1], workers) == [own]
    lonely = ask(2)
    assert dealt(filled(old, own, lonely), workers[:1], workers) == [lonely]


def test_problems_are_spread_over_workers_that_begin(ask: Ask) -> None:
    workers = posts("", "", "")
    requests = [ask(0), ask(0), ask(1), ask(2)]
    given = dealt(filled(*requests), workers, workers)
    assert given == [requests[0], requests[2], requests[3]]


def test_what_was_compiled_at_a_site_is_measured_there_while_there_are_workers(ask: Ask) -> None:
    here, there = posts("a", "b")
    request = ask(site="b")
    backlog = filled(request)
    assert dealt(backlog, [here], [here, there]) == [None]
    assert dealt(backlog, [here, there], [here, there]) == [None, request]
    backlog.put_back(request)
    assert dealt(backlog, [here], [here]) == [request]


def test_what_is_for_one_place_goes_nowhere_else(ask: Ask) -> None:
    """There it goes even to a worker that may be given nothing else."""
    here, there = posts("", "")
    request = ask(at=there.place.name)
    backlog = filled(request)
    assert dealt(backlog, [here], [here]) == [None]
    assert dealt(backlog, [there], []) == [request]


def test_steady_tasks_of_a_problem_go_to_one_worker_while_it_is_there(ask: Ask) -> None:
    workers = posts(*([""] * 8))

    def judge(number: int, usable: list[Post]) -> Post:
        [post] = [post for post, _ in filled(ask(number, steady=True)).deal(usable, usable)]
        return post

    first = judge(0, workers)
    assert judge(0, workers) is first
    assert judge(0, workers[::-1]) is first
    others = [post for post in workers if post is not first]
    second = judge(0, others)
    assert judge(0, [post for post in workers if post is not second]) is first
    waits = filled(ask(0, steady=True))
    assert dealt(waits, others, workers) == [None] * 7
    assert len({judge(number, workers).place.name for number in range(3)}) > 1


def test_what_is_not_wanted_any_more_is_forgotten(ask: Ask) -> None:
    mine = [ask(owner="me"), ask(owner="me", at="worker 0"), ask(owner="me", steady=True)]
    other = ask(owner="you")
    backlog, workers = filled(*mine, other), posts("", "")
    assert {id(each) for each in backlog.remove(lambda request: request.owner == "me")} == {
        id(each) for each in mine
    }
    assert len(backlog) == 1
    assert dealt(backlog, workers, workers) == [other, None]
