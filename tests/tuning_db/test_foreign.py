"""Files and JSON of others: plain data, or one line."""

import os
from pathlib import Path

import pytest

from flashtune.tuning_db import foreign
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import check_file, parse_json, read_file, read_json, read_text
from flashtune.tuning_db.one_line import one_line, quoted, spelled

DEEP = 50_000


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("{", "not JSON"),
        ("[1] 2", "not JSON"),
        ("\ufeff{}", "not JSON: .*BOM"),
        ("[" * DEEP + "]" * DEEP, "nested more than 64 deep"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ('[[["\\ud800\\u0041"]]]', "half a character"),
    ],
)
def test_what_nothing_can_be_made_of(text: str, message: str, exact: bool) -> None:
    with pytest.raises(FlashtuneError, match=message) as told:
        parse_json(text, exact=exact)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "more than 64 bits"),
        ("[1" + "0" * 400 + "]", "more than 64 bits"),
        (str(2**63), "more than 64 bits"),
        (str(-(2**63) - 1), "more than 64 bits"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e999", "'1e999' is too large a number"),
        ('{"a": 1, "a": 1}', "a duplicate key"),
    ],
)
def test_what_only_formats_of_others_may_hold(text: str, message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        parse_json(text, exact=True)
    parse_json(text)


def test_numbers_are_never_larger_than_64_bits() -> None:
    most = 2**63 - 1
    assert parse_json(str(most), exact=True) == parse_json(str(most)) == most
    assert parse_json(str(-(2**63)), exact=True) == -(2**63)
    assert parse_json("1" + "0" * 30) == 1e30
    assert parse_json("-1" + "0" * 5000) == float("-inf")
    assert type(parse_json("1" + "0" * 30)) is float


def test_nesting_and_whole_characters_are_fine() -> None:
    assert parse_json("[" * 60 + "]" * 60)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "absent", "long", "null", "loop"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "null":
        path = tmp_path / "x\0y"
    elif kind == "loop":
        path.symlink_to(path)
    for read in (read_file, read_text, read_json, check_file):
        with pytest.raises(FlashtuneError) as told:
            read(path)
        assert str(tmp_path) in str(told.value)


def test_a_file_is_read_whole_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes('{"ä": 1}'.encode())
    check_file(path)
    assert read_json(path) == {"ä": 1}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FlashtuneError, match="file: is not UTF-8"):
        read_text(path)
    path.write_text("[1,")
    with pytest.raises(FlashtuneError, match="file: not JSON"):
        read_json(path)
    monkeypatch.setattr(foreign, "MOST_BYTES", 2)
    with pytest.raises(FlashtuneError, match="larger than 2 bytes"):
        read_file(path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä, 漢", "plain, ä, 漢"),
        (" a\r\n\tb ", "a b"),
        ("\x1b[2J\x9b31m\x07\x7f", "\\x1b[2J\\x9b31m\\x07\\x7f"),
        ("\u202eabc\u2028", "\\u202eabc"),
        ("\ud800\0", "\\ud800\\x00"),
        ("[/b] [link=file:///x]", "[/b] [link=file:///x]"),
        (r"already \x1b", r"already \x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled(text: str, shown: str) -> None:
    assert one_line(text) == shown == one_line(one_line(text))
    assert spelled(text).isprintable()
    assert str(FlashtuneError(text)) == shown


def test_long_text_is_cut_in_the_middle() -> None:
    assert one_line("a" * 5000 + "z" * 5000, 11) == "aaaa … zzzz"
    assert len(str(FlashtuneError("x" * 10**6))) <= 2000
    assert quoted("a\n" * 1000).startswith(r"'a\na\na")
    assert len(quoted(["x" * 10**5])) <= 100
    assert quoted(10**60) == "a whole number of more than 50 digits"
    assert quoted([10**5000]) == "a list too long to show"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert quoted(nested) == "a list too long to show"
    while nested:  # else taking it down would be as deep
        (nested,) = nested  # type: ignore[assignment]
