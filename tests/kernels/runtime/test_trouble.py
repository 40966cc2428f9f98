"""Troubles as lines, and exceptions that are none of a kernel's."""

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashtune.kernels.runtime.trouble import is_of_a_signal


class Alarm(Exception):
    """What somebody's handler raises."""


def function(*_: Any) -> None:
    raise Alarm


class Handler:
    def method(self, *_: Any) -> None:
        raise Alarm

    def __call__(self, *_: Any) -> None:
        self.method()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "handler",
    [function, Handler().method, Handler(), functools.partial(function, 1), lambda *_: function()],
)
def test_what_a_handler_raises_is_known_by_it(handler: Callable[..., None]) -> None:
    signal.signal(signal.SIGALRM, handler)
    with pytest.raises(Alarm) as raised:
        signal.raise_signal(signal.SIGALRM)
    assert is_of_a_signal(raised.value)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert not is_of_a_signal(raised.value)


def test_other_errors_are_of_no_signal() -> None:
    signal.signal(signal.SIGALRM, function)
    for call in (lambda: signal.Signals(10**6), lambda: [][0]):
        with pytest.raises(Exception) as raised:
            call()
        assert not is_of_a_signal(raised.value)
