"""Foreign files: read whole and decoded, with a one-line error for every way that can fail.

Usage:
    data = parse_json(text)                # FlashtuneError says what is wrong with the text
    data = read_json(path)                 # and in which file
    table = read_json(path, exact=True)    # our own format, read strictly
    data = members(table, "a table", ["device", "records"])     # exactly these members
    number(data["time"], "its time", 0.0, 1e9)

The result is plain: whole numbers of at most 64 bits, text that can be encoded, and no nesting so
deep that walking it could fail.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import quoted

MOST_BYTES = 2**26  # decoded JSON takes some twenty times as much memory
MOST_DEPTH = 64
_MOST_DIGITS, _MOST_SHOWN = 20, 50
_INTEGERS = range(-(2**63), 2**63)


def read_file(path: Path) -> bytes:
    """A file's content. Raises FlashtuneError if it is absent, not a file, or over 64 MiB.

    A pipe or a device is not a file: reading it may never end.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FlashtuneError(f"{path}: is not a file")
            if found.st_size > MOST_BYTES:
                raise FlashtuneError(
                    f"{path}: is larger than {MOST_BYTES} bytes: check that it is the right file"
                )
            return file.read(MOST_BYTES)
    except OSError as error:
        raise FlashtuneError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise FlashtuneError(f"{path}: cannot be the name of a file") from error


def check_file(path: Path) -> None:
    """Raises FlashtuneError unless there is a file: for callers that open it themselves."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise FlashtuneError(f"{path}: {(error.strerror or '').lower()}") from error
    except ValueError as error:
        raise FlashtuneError(f"{path}: cannot be the name of a file") from error
    if not stat.S_ISREG(found.st_mode):
        raise FlashtuneError(f"{path}: is not a file")


def read_text(path: Path) -> str:
    """A file's text. Raises FlashtuneError as `read_file` does, and if it is not UTF-8."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FlashtuneError(f"{path}: is not UTF-8") from error


def read_json(path: Path, *, exact: bool = False) -> Any:
    """A file's JSON; see `parse_json`. Raises FlashtuneError that names the file."""
    text = read_text(path)
    try:
        return parse_json(text, exact=exact)
    except FlashtuneError as error:
        raise FlashtuneError(f"{path}: {error}") from error


def parse_json(text: str, *, exact: bool = False) -> Any:
    """Decoded JSON. Raises FlashtuneError for anything else.

    exact: reject NaN, infinities, whole numbers of more than 64 bits and duplicate keys. Otherwise
    the last of duplicate keys counts, and a number that large is a float, perhaps infinite.
    """
    try:
        data = json.loads(
            text,
            parse_int=_exact_integer if exact else _integer,
            parse_float=_exact_float if exact else None,
            parse_constant=_refuse_constant if exact else None,
            object_pairs_hook=_exact_object if exact else None,
        )
    except ValueError as error:
        raise FlashtuneError(f"not JSON: {error}") from error
    except RecursionError:
        raise FlashtuneError(f"nested more than {MOST_DEPTH} deep") from None
    _check(data)
    return data


def members(data: Any, what: str, names: Iterable[str]) -> dict[str, Any]:
    """An object that has exactly these members; raises FlashtuneError, which names it `what`."""
    names = list(names)
    if not isinstance(data, dict) or set(data) != set(names):
        raise FlashtuneError(f"{what} must be an object with exactly the keys {', '.join(names)}")
    return data


def items(data: Any, what: str) -> list[Any]:
    """A list; raises FlashtuneError."""
    if not isinstance(data, list):
        raise FlashtuneError(f"{what} must be a list, not {quoted(data)}")
    return data


def text(value: Any, what: str, most: int) -> str:
    """A text of at most `most` characters; raises FlashtuneError."""
    if not isinstance(value, str) or len(value) > most:
        raise FlashtuneError(f"{what} must be text of at most {most} characters")
    return value


def number(value: Any, what: str, least: float, most: float) -> float:
    """A number in a range; raises FlashtuneError."""
    if type(value) not in (int, float) or not least <= value <= most:
        raise FlashtuneError(
            f"{what} must be a number from {least:g} to {most:g}, not {quoted(value)}"
        )
    return float(value)


def count(value: Any, what: str, least: int, most: int) -> int:
    """A whole number in a range; raises FlashtuneError."""
    if type(value) is not int or not least <= value <= most:
        raise FlashtuneError(
            f"{what} must be a whole number from {least} to {most}, not {quoted(value)}"
        )
    return value


def _open(name: str, flags: int) -> int:
    """Open without waiting for a pipe's writer."""
    return os.open(name, flags | os.O_NONBLOCK)


def _integer(digits: str) -> int | float:
    if len(digits) > _MOST_DIGITS or int(digits) not in _INTEGERS:
        return float(digits)
    return int(digits)


def _exact_integer(digits: str) -> int:
    found = _integer(digits)
    if isinstance(found, float):
        shown = digits if len(digits) < _MOST_SHOWN else f"{len(digits)} digits"
        raise FlashtuneError(f"a whole number of more than 64 bits: {shown}")
    return found


def _exact_float(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise FlashtuneError(f"{quoted(digits)} is too large a number")
    return found


def _refuse_constant(name: str) -> Any:
    raise FlashtuneError(f"{name} is not a finite number")


def _exact_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = sorted(key for key, _ in pairs)
        raise FlashtuneError(f"an object has a duplicate key: {quoted(names)}")
    return data


def _check(data: Any) -> None:
    """Raises FlashtuneError for a lone surrogate, and for nesting that is too deep."""
    level = [data]
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each
                below += each.values()
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str):
                _check_text(each)
        if not below:
            return
        level = below
    raise FlashtuneError(f"nested more than {MOST_DEPTH} deep")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FlashtuneError(f"half a character (a lone surrogate) in {quoted(text)}") from error
