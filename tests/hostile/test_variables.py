"""Environment variables and options with what nobody means: one line, or an answer."""

import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashtune.kernels.formats.screen import screen_of
from flashtune.tuner.cli.main import cli
from flashtune.tuning_db import environment
from flashtune.tuning_db.errors import FlashtuneError

SHAPE = "qwen3-vl-2b"
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "FLASHTUNE_DB": (
        ("show",),
        ("best", "--device", "h200", "--shape", SHAPE),
        ("forget", "--device", "h200", "--yes"),
        ("report", "--out", "page.html"),
    ),
    "FLASHTUNE_TABLES": (("best", "--device", "h200", "--shape", SHAPE),),
    "FLASHTUNE_CACHE": (("devices",),),
}
INSIDE = (
    "pipe", "pipe/x", "loop", "loop/x", "dangling", "folder", "empty", "empty/x", "garbage",
    "socket",
)  # fmt: skip
ODD = (
    "", " ", "x" * 300, "x" * 5000, "a/" * 3000, "~nobody-at-all/x", "~", os.fsdecode(b"\xff\x80"),
    "\n", "\x1b[2J", "-", "-oProxyCommand=true", "%s%n", ":memory:", "file:x?mode=memory", "1e400",
    "NaN", "-1", "9" * 5000, "/dev/null", "/dev/full", "/dev/null/x", "/proc/self/x", "=", "٣",
)  # fmt: skip
OPTIONS = (
    ("show", "--limit"), ("show", "--device"), ("show", "--shape"), ("best", "--shape"),
    ("forget", "--record"), ("render", "--record"), ("report", "--shape"), ("report", "--device"),
    ("search", "--trials"), ("search", "--timeout"), ("search", "--seed"), ("search", "--jobs"),
    ("search", "--gpus"), ("search", "--fix"), ("search", "--shape"), ("search", "--sampler"),
    ("tables", "export", "--keep"), ("tables", "export", "--shortlist"),
)  # fmt: skip
SIZES = ("vocab={0},hidden=64,clusters=32,probes=4", "vocab=512,hidden=64,clusters=32,probes={0}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with what is no file and no folder."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/there")
    Path("folder").mkdir()
    os.mkfifo("folder/pipe.json")
    Path("folder/loop.json").symlink_to("loop.json")
    Path("folder/folder.json").mkdir()
    Path("empty").touch()
    Path("garbage").write_bytes(bytes(range(1, 256)) * 20)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    return tmp_path


def run(*words: str) -> None:
    found = CliRunner().invoke(cli, words)
    assert found.exception is None or isinstance(found.exception, SystemExit), words
    assert found.exit_code in (0, 2), words
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (found.exit_code == 2), words
    assert all(line.isprintable() for line in found.output.splitlines()), words


@pytest.mark.parametrize("variable", COMMANDS)
def test_places_that_are_none(
    variable: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, value in enumerate((*(str(folder / name) for name in INSIDE), *ODD)):
        monkeypatch.setenv(variable, value)
        run(*COMMANDS[variable][number % len(COMMANDS[variable])])


@pytest.mark.parametrize(
    "read",
    [
        lambda: screen_of(environment.named_screen()),
        environment.named_probes,
        lambda: environment.named_tune(("race", "never")),
    ],
)
def test_values_that_are_none(read, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0
    for value in (*ODD, "int4:1e400", "int8:nan", "int4:", ":", "int4:-1", "int4:" + "9" * 5000):
        for name in ("FLASHTUNE_SCREEN", "FLASHTUNE_PROBES", "FLASHTUNE_TUNE"):
            monkeypatch.setenv(name, value)
        try:
            read()
        except FlashtuneError:
            refused += 1
    assert refused > len(ODD) / 2


def test_options_that_say_nothing(folder: Path) -> None:
    given = ["--device", "h200", "--shape", SHAPE, "--out", "table.json"]
    for number, (*command, option) in enumerate(OPTIONS):
        own = (
            given if command == ["tables", "export"] else given[:4] if command == ["best"] else []
        )
        for value in ODD[number % 3 :: 3]:
            if not (command == ["search"] and value in ("", " ")):  # a search that would run
                run(*command, *own, option, value)
    for size in SIZES:
        for value in ("1e400", "NaN", "-1", "0", "9" * 4000, "9" * 19, "٣", "", " 512"):
            run("best", "--device", "h200", "--shape", size.format(value))
