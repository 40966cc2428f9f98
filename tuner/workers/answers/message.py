"""The lines between a search and a worker: one JSON object each, and how they are checked.

Usage:
    line = to_line(request, task.data())             # request: a unique name
    request, content = from_line(line)               # at the worker, which trusts its search
    content = answer_to(request, line)               # at the search, which trusts no worker
    data = members(content, "kernel", "programs")

A worker runs candidates, which may crash, lie, or write where replies go; another machine may send
anything. So a search takes a line only if it is JSON of at most `MOST_BYTES` and answers the
request that was made last, and each value only in its type and range. Everything else raises
ReplyError.
"""

import json
import math
from typing import Any, NoReturn

MOST_BYTES = 2**18  # of a line
MOST_CHARACTERS = 500  # of a text that is stored or shown
_MOST_DIGITS = 20


class ReplyError(Exception):
    """The input is not the answer to the request; says why not, in a few words."""


def to_line(request: str, content: Any) -> str:
    """A line, without its newline."""
    return json.dumps({"request": request, "content": content})


def from_line(line: str) -> tuple[str, Any]:
    """The request and content that `to_line` encoded."""
    data = json.loads(line)
    return data["request"], data["content"]


def answer_to(request: str, line: bytes) -> Any:
    """The content of a line that answers the request of that name."""
    try:
        data = json.loads(
            line.decode(),
            object_pairs_hook=_without_repetition,
            parse_int=_short_int,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"not JSON: {clean(str(error), 100)}") from None
    data = members(data, "request", "content")
    if data["request"] != request:
        raise ReplyError("it answers another request")
    return data["content"]


def members(data: Any, *names: str) -> dict[str, Any]:
    """An object that has exactly these members."""
    if not isinstance(data, dict) or set(data) != set(names):
        raise ReplyError(f"not an object with just {', '.join(names)}")
    return data


def whole_number(data: dict[str, Any], name: str, most: int, least: int = 0) -> int:
    """A whole number from `least` to `most`."""
    value = data[name]
    if type(value) is not int or not least <= value <= most:
        raise ReplyError(f"{name} is not a whole number from {least} to {most}")
    return value


def number(data: dict[str, Any], name: str, most: float) -> float:
    """A number from 0 to `most`."""
    value = data[name]
    if type(value) not in (int, float) or not 0 <= value <= most or math.isnan(value):
        raise ReplyError(f"{name} is not a number from 0 to {most:g}")
    return float(value)


def flag(data: dict[str, Any], name: str) -> bool:
    """True or false."""
    value = data[name]
    if not isinstance(value, bool):
        raise ReplyError(f"{name} is neither true nor false")
    return value


def text(data: dict[str, Any], name: str, most: int = MOST_CHARACTERS) -> str:
    """A one-line text that is safe for a terminal, cut after `most` characters."""
    value = data[name]
    if not isinstance(value, str):
        raise ReplyError(f"{name} is not text")
    return clean(value, most)


def items(data: dict[str, Any], name: str, most: int) -> list[Any]:
    """A list of at most `most` items."""
    value = data[name]
    if not isinstance(value, list) or len(value) > most:
        raise ReplyError(f"{name} is not a list of at most {most}")
    return value


def clean(value: str, most: int = MOST_CHARACTERS) -> str:
    """A text in one line, cut, without characters that control a terminal or cannot be encoded."""
    line = " ".join(value[: 10 * most].split())
    return "".join(each if each.isprintable() else "?" for each in line)[:most]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a name occurs twice")
    return data


def _short_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
