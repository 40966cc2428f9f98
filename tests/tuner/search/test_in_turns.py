"""Several searches side by side: when workers' replies are read, and when they are waited for."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from flashtune.tuner.search import session
from flashtune.tuner.search.session import in_turns


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only steps take."""
    now = [0.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def steps(now: list[float], took: float, *waits: float) -> Iterator[float]:
    for wait in waits:
        now[0] += took
        yield wait


def test_workers_are_waited_for_once_all_searches_wait(now) -> None:
    under_way = [steps(now, 0.0, 0.5, 0.5), steps(now, 0.0, 0.3, 0.0)]
    assert list(in_turns(under_way)) == [0.3]
    assert list(in_turns(under_way)) == [0.0]


def test_replies_are_read_between_steps_that_take_long_and_not_between_short_ones(now) -> None:
    long, short = 2 * session.UNREAD_SECONDS, 0.4 * session.UNREAD_SECONDS
    assert list(in_turns([steps(now, long, 0.5) for _ in range(3)])) == [0.0, 0.0, 0.5]
    assert list(in_turns([steps(now, short, 0.5) for _ in range(7)])) == [0.0, 0.0, 0.5]


def test_a_search_that_has_ended_is_removed_and_others_do_not_wait(now) -> None:
    under_way = [steps(now, 0.0), lasting := steps(now, 0.0, 0.5)]
    assert list(in_turns(under_way)) == [0.0]
    assert under_way == [lasting]
    assert list(in_turns([steps(now, 0.0)])) == []
