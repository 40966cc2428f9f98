"""What went wrong on the way to a step, as lines that `explain` shows."""

import functools
import signal
from types import CodeType
from typing import Any

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import spelled


def note(troubles: list[str], trouble: str) -> None:
    """Add a trouble, once."""
    if trouble not in troubles:
        troubles.append(trouble)


def one_line(error: Exception) -> str:
    """The error's first line, printable, with its type if it isn't one of ours."""
    first = spelled(next(iter(str(error).splitlines()), ""))
    return first if isinstance(error, FlashtuneError) else f"{type(error).__name__}: {first}"


def is_of_a_signal(error: BaseException) -> bool:
    """Whether a signal handler raised it, at whatever point: the kernel did not fail.

    A caller that sets an alarm around a call expects its exception, and a normal next call.
    """
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    """The code of a handler: a function, a method, a partial or a callable object."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = vars(type(handler)).get("__call__")
    code = getattr(handler, "__code__", None)
    return code if isinstance(code, CodeType) else None
