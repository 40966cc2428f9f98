"""Foreign text made safe to show: one line of bounded length, without control characters.

Usage:
    one_line("no such\\nfile \\x1b[2J")     # "no such file \\\\x1b[2J"
    quoted(value)                         # its repr, cut in the middle if it is long

A terminal obeys control characters, and shows right-to-left text in another order; a lone
surrogate can't be encoded at all. All these are escaped as Python does.
"""

import re
from typing import Any

MOST_CHARACTERS = 2000
_MOST_QUOTED = 100
_DIGITS = 50  # of a whole number; Python refuses to convert thousands


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text with white space as single spaces and unprintable characters escaped."""
    return _cut(spelled(" ".join(text.split())), most)


def spelled(text: str) -> str:
    """The text with unprintable characters as `\\x1b`, `\\u202e` or `\\U000e0001`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _spelled(each) for each in text)


def quoted(value: Any) -> str:
    """A value's repr, for a message."""
    if type(value) is int and not -(10**_DIGITS) < value < 10**_DIGITS:
        return f"a whole number of more than {_DIGITS} digits"
    try:
        return _cut(re.sub(r"\s+", " ", repr(value)), _MOST_QUOTED)
    except (ValueError, RecursionError):  # contains a huge number; nested too deep
        return f"a {type(value).__name__} too long to show"


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, most: int) -> str:
    """Cut the middle: messages begin with the place and end with the remedy."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]} … {text[-half:]}"
