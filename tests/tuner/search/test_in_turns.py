"""Several searches side by side: when workers' replies are read, and when they are waited for."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flashtune.tuner.search import session
from flashtune.tuner.search.search import Budget
from flashtune.tuner.search.session import SearchRequest, Session, in_turns
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.store import Store


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


PROBLEMS = [parse_shape(f"qwen3-0.6b,tokens={tokens}") for tokens in (1, 2, 4)]


def searched(
    now: list[float], monkeypatch: pytest.MonkeyPatch, store: Store, timeout_s: float | None
) -> tuple[list[tuple[int, float | None]], session.SessionResult]:
    """Which searches began, by tokens, with how much time, and the result.

    Each tries ten configs, one a second, but nothing runs before the workers have started, at 18.
    """
    begun: list[tuple[int, float | None]] = []
    known = dict.fromkeys((1, 2, 4), 0)

    class Search:
        def __init__(
            self, space: Space, evaluator: object, store: object, budget: Budget, **_: Any
        ):
            self.tokens, self.timeout_s = space.problem.n_tokens, budget.timeout_s
            begun.append((self.tokens, self.timeout_s))
            self.timed_out, self.proposals = False, SimpleNamespace(known=())

        def steps(self) -> Iterator[float]:
            end = now[0] + (self.timeout_s or 1e9)
            now[0] = min(end, max(now[0], 18.0))
            done = int(min(10 - known[self.tokens], end - now[0]))
            now[0] += done
            known[self.tokens] += done
            self.timed_out = known[self.tokens] < 10
            yield from ()

        def result(self) -> SimpleNamespace:
            return SimpleNamespace(tokens=self.tokens, configs=known[self.tokens])

    monkeypatch.setattr(session, "Search", Search)
    request = SearchRequest(
        device=find_device("orin"), problems=PROBLEMS, trials=10, timeout_s=timeout_s
    )
    display: Any = SimpleNamespace(note=print, start=lambda *_: print)
    return begun, Session(request, store).run(display)


def test_time_that_is_left_continues_what_was_cut_short(now, monkeypatch, store: Store) -> None:
    begun, outcome = searched(now, monkeypatch, store, 60.0)
    assert begun == [(1, 20.0), (2, 20.0), (4, 30.0), (1, 20.0)], "its workers had just started"
    found = [(each.tokens, each.configs) for each in outcome.results]  # type: ignore[attr-defined]
    assert found == [(1, 10), (2, 10), (4, 10)], "one result for each, in order"


def test_without_time_left_or_without_a_limit_nothing_is_continued(
    now, monkeypatch, store: Store
) -> None:
    assert [tokens for tokens, _ in searched(now, monkeypatch, store, 33.0)[0]] == [1, 2, 4]
    assert searched([0.0], monkeypatch, store, None)[0] == [(1, None), (2, None), (4, None)]


def test_what_knows_the_fewest_configs_is_continued_first(store: Store) -> None:
    request = SearchRequest(device=find_device("orin"), problems=PROBLEMS, trials=10)
    own = Session(request, store)
    for place, (count, timed_out) in enumerate([(7, True), (9, False), (2, True)]):
        search: Any = SimpleNamespace(
            timed_out=timed_out, proposals=SimpleNamespace(known=range(count))
        )
        own._searches[place] = search
    least = session.SHORTEST_SECONDS
    assert own._cut_short(3 * least) == own._cut_short(2 * least) == [2, 0]
    assert own._cut_short(1.9 * least) == [2]
    assert own._cut_short(0.9 * least) == own._cut_short(-1.0) == []
    own._searches = {1: own._searches[1]}
    assert own._cut_short(math.inf) == []
