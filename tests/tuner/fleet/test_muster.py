"""Workers of one kind are compared before they measure, and those that are off set aside."""

from collections.abc import Callable

import pytest

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.candidate import Candidate
from flashtune.tuner.fleet.muster import GATHER_SECONDS, Muster
from flashtune.tuner.workers.answers.reply import Reply
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome

Answers = list[float | str | None]


class Pool:
    """Workers that answer so one after another: microseconds, None where lost, or an error."""

    def __init__(self, answers: dict[str, Answers]) -> None:
        self.answers = {name: list(each) for name, each in answers.items()}
        self.newcomers = list(answers)
        self.admitted: list[str] = []
        self.aside: list[str] = []
        self.asked: list[str] = []

    def submit(self, task: Task, seconds: float, *, owner: object, at: str) -> None:
        assert task.kind == "compare"
        self.asked.append(at)

    def collect(self, owner: tuple[object, str]) -> list[tuple[Task, Reply]]:
        name = owner[1]
        if name not in self.asked or not self.answers[name]:
            return []
        self.asked.remove(name)
        return [(None, Reply(measurements=(measured(self.answers[name].pop(0)),)))]  # type: ignore[list-item]

    def admit(self, name: str) -> None:
        self.admitted.append(name)
        self.newcomers.remove(name)

    def set_aside(self, name: str, why: str) -> None:
        self.aside.append(name)
        self.newcomers.remove(name)


def measured(answer: float | str | None) -> Measurement | None:
    if answer is None:
        return None
    if isinstance(answer, str):
        return Measurement(outcome=Outcome.CRASH, error=answer, policy="final-behind")
    return Measurement(
        outcome=Outcome.OK, median_us=answer, spread_us=0.0, samples=40, policy="final-behind"
    )


@pytest.fixture
def mustered(problem: Problem, device: Device) -> Callable[..., tuple[Pool, list[str]]]:
    """What becomes of workers that answer so: `mustered(seconds=0, a=[10.0], b=[12.0, 12.0])`."""

    def make(seconds: float = 0.0, turns: int = 4, **answers: Answers) -> tuple[Pool, list[str]]:
        candidate = Candidate(problem, default_config(problem, device), device)
        task = Task(kind="compare", candidates=(candidate,))
        pool, notes, now = Pool(answers), list[str](), [0.0]
        muster = Muster(pool, task, notes.append, lambda: now[0])  # type: ignore[arg-type]
        for _ in range(turns):
            muster.turn()
            now[0] += seconds
        return pool, notes

    return make


def test_workers_that_agree_are_admitted(mustered) -> None:
    """A hundredth of each time is noise."""
    pool, notes = mustered(a=[10.0], b=[10.15], c=[9.9])
    assert (sorted(pool.admitted), pool.aside, notes) == (["a", "b", "c"], [], [])


def test_one_that_is_off_twice_is_set_aside_with_a_line(mustered) -> None:
    pool, notes = mustered(a=[10.0], b=[12.0, 12.1], c=[10.05])
    assert (sorted(pool.admitted), pool.aside) == (["a", "c"], ["b"])
    assert notes == [
        "b is set aside, since its times would mislead: the default config takes 12.10 us there, "
        "but 10.05 us on c"
    ]


def test_one_that_was_disturbed_once_is_admitted(mustered) -> None:
    pool, notes = mustered(a=[10.0], b=[12.0, 10.0], c=[10.0])
    assert (sorted(pool.admitted), pool.aside, notes) == (["a", "b", "c"], [], [])


def test_of_two_the_slower_is_set_aside(mustered) -> None:
    pool, _ = mustered(a=[12.0, 12.0], b=[10.0])
    assert (pool.admitted, pool.aside) == (["b"], ["a"])


def test_one_that_fails_is_set_aside(mustered) -> None:
    pool, notes = mustered(a=[10.0], b=["illegal access", "illegal access"])
    assert (pool.admitted, pool.aside) == (["a"], ["b"])
    assert "the default config fails (illegal access) there" in notes[0]


def test_where_the_config_works_nowhere_nobody_is_set_aside(mustered) -> None:
    pool, notes = mustered(a=["no ptxas"], b=["no ptxas"])
    assert (sorted(pool.admitted), pool.aside) == (["a", "b"], [])
    assert notes == [
        "workers are not compared, because the default config works on none of them (no ptxas)"
    ]


def test_one_that_was_lost_is_asked_again(mustered) -> None:
    pool, _ = mustered(a=[10.0], b=[None, None, 10.0])
    assert sorted(pool.admitted) == ["a", "b"]


def test_late_ones_are_not_waited_for_and_compared_when_they_come(mustered) -> None:
    pool, _ = mustered(seconds=GATHER_SECONDS / 4, a=[10.0], b=[])
    assert pool.admitted == []
    pool, _ = mustered(seconds=GATHER_SECONDS, a=[10.0], b=[])
    assert (pool.admitted, pool.newcomers) == (["a"], ["b"])
    pool, _ = mustered(seconds=GATHER_SECONDS, a=[10.0], b=[None, None, None, 13.0, 13.0], turns=9)
    assert (pool.admitted, pool.aside) == (["a"], ["b"])


def test_one_that_is_gone_before_it_answers_is_asked_anew_when_it_is_back(
    problem: Problem, device: Device
) -> None:
    """Its answer is collected all the same: nobody waits for workers while there are answers."""
    candidate = Candidate(problem, default_config(problem, device), device)
    pool, notes = Pool({"a": [10.0], "b": []}), list[str]()
    task = Task(kind="compare", candidates=(candidate,))
    muster = Muster(pool, task, notes.append)  # type: ignore[arg-type]
    muster.turn()
    pool.newcomers.remove("b")
    pool.answers["b"] = [None, 10.1]
    muster.turn()
    assert (pool.admitted, pool.answers["b"], pool.asked) == (["a"], [10.1], [])
    pool.newcomers.append("b")
    muster.turn()
    assert (pool.admitted, notes) == (["a", "b"], [])
