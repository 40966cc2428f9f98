"""Spoiled databases: commands and heads say one line, and change nothing."""

import json
import random
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashtune.kernels.runtime.records import best_choice
from flashtune.tuner.cli.main import cli
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table
from hostile.mutation import TEXTS, dumped, mutate

COUNT = 60
SHAPE = "qwen3-vl-2b"
READS = (
    ("show",),
    ("show", "--json"),
    ("best", "--device", "h200", "--shape", SHAPE),
    ("forget", "--device", "h200"),
    ("render", "--record", "0"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.db"
    table = prebuilt_table("nvidia-h200")
    assert table is not None
    with Store(path) as store:
        store.add(*table.records[:40])
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path.read_bytes()


def read_everything(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, and as a head does."""
    content = path.read_bytes()
    for words in READS:
        found = CliRunner().invoke(cli, [*words, "--db", str(path)])
        assert found.exception is None or isinstance(found.exception, SystemExit), words
        assert found.exit_code in (0, 2)
        errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == (found.exit_code == 2)
        assert all(line.isprintable() for line in found.output.splitlines())
    monkeypatch.setenv("FLASHTUNE_DB", str(path))
    troubles: list[str] = []
    device = find_device("h200")
    choice = best_choice(parse_shape(SHAPE), device, Toolchain(), troubles)
    assert choice.config.plan != "torch"
    json.dumps(choice.explain(), allow_nan=False)
    assert all(line.isprintable() for line in troubles)
    assert path.read_bytes() == content


def refused_or_done(*words: object) -> bool:
    """Whether a command did what it was told; else it said one line."""
    found = CliRunner().invoke(cli, [str(each) for each in words])
    assert found.exception is None or isinstance(found.exception, SystemExit), words
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (found.exit_code == 2)
    assert all(line.isprintable() for line in found.output.splitlines())
    return found.exit_code == 0


def test_bytes_that_are_changed(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r, path = random.Random(3), tmp_path / "a.db"
    for _ in range(COUNT // 2):
        data = bytearray(good)
        way = r.random()
        if way < 0.5:
            for _ in range(r.choice((1, 20, 200))):
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        elif way < 0.7:
            page = r.randrange(len(data) // 4096) * 4096
            data[page : page + 4096] = r.randbytes(4096)
        else:
            del data[r.choice((0, 15, 100, 4096, r.randrange(len(data)))) :]
        path.write_bytes(data)
        read_everything(path, monkeypatch)


@pytest.mark.parametrize("way", ["garbage", "half", "pages"])
def test_studies_of_a_damaged_database_are_refused_in_one_line(
    good: bytes, tmp_path: Path, way: str
) -> None:
    path, storage = tmp_path / "a.db", f"sqlite:///{tmp_path / 'o.db'}"
    r = random.Random(4)
    half = len(good) // 2
    path.write_bytes(
        {
            "garbage": r.randbytes(5000),
            "half": good[:half],
            "pages": good[:4096] + r.randbytes(len(good) - 4096),
        }[way]
    )
    content = path.read_bytes()
    found = CliRunner().invoke(cli, ["studies", "export", "--db", str(path), "--storage", storage])
    assert found.exit_code == 2
    [line] = found.stderr.splitlines()
    assert line.startswith("Error: ") and line.isprintable()
    assert path.read_bytes() == content
    assert not (tmp_path / "o.db").exists()


def test_rows_that_are_changed(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a record is made of, its plain columns and its JSON."""
    r, path = random.Random(4), tmp_path / "a.db"
    for number in range(COUNT):
        path.write_bytes(good)
        with sqlite3.connect(path) as connection:
            columns = ("config", "problem", "toolchain") if number % 2 else (
                "device", "outcome", "provenance", "policy", "error", "created", "median_us", "key"
            )  # fmt: skip
            column = r.choice(columns)
            rows = connection.execute(f"SELECT rowid, {column} FROM records").fetchall()
            for rowid, old in r.sample(rows, len(rows) // 2):
                new: object = r.choice((*TEXTS, 7, -1.5, 10**12, float("inf"), b"\xff"))
                if number % 2:
                    data = json.loads(old)
                    mutate(r, data)
                    new = dumped(data)
                    new = new.decode("utf-8", "replace") if r.random() < 0.9 else new
                elif isinstance(new, str):
                    new = new.encode("utf-8", "surrogatepass")
                kind = "TEXT" if isinstance(new, str | bytes) and r.random() < 0.9 else "BLOB"
                kind = kind if isinstance(new, str | bytes) else "NUMERIC"
                connection.execute(
                    f"UPDATE OR IGNORE records SET {column} = CAST(? AS {kind}) WHERE rowid = ?",
                    (new, rowid),
                )
        connection.close()
        read_everything(path, monkeypatch)


TIMES = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-02-30T00:00:00Z", "", 7, None)


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_histories_that_are_changed(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    """What reports and studies are made of: every measurement there was, and when."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    r, path, page = random.Random(5), tmp_path / "a.db", tmp_path / "a.html"
    made = 0
    try:
        for number in range(COUNT // 6):
            path.write_bytes(good)
            with sqlite3.connect(path) as connection:
                column, new = r.choice(
                    (
                        ("created", r.choice(TIMES)),
                        ("record", r.choice((7, b"\xff"))),
                        ("outcome", r.choice(("crash", "pruned", "said"))),
                        ("median_us", r.choice((-1, "x", 1e300, None))),
                        (r.choice(("error", "policy", "created")), r.choice(TEXTS)),
                    )
                )
                if isinstance(new, str):
                    new = new.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
                for table in ("measurements", "records"):  # a few are enough to be drawn
                    connection.execute(f"DELETE FROM {table} WHERE rowid > 4")
                with suppress(sqlite3.IntegrityError):  # NULL
                    connection.execute(
                        f"UPDATE measurements SET {column} = ? WHERE rowid % ? = 0",
                        (new, r.choice((1, 2))),
                    )
            connection.close()
            before = path.read_bytes()
            storage = f"sqlite:///{tmp_path}/{number}.db"
            made += refused_or_done("report", "--db", path, "--out", page)
            refused_or_done("studies", "export", "--db", path, "--storage", storage)
            assert path.read_bytes() == before
    finally:
        monkeypatch.undo()
        time.tzset()
    assert made > COUNT / 12
