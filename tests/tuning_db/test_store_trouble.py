"""Each bad state a database can be in: one clear line, and nothing lost."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashtune.tuning_db import environment
from flashtune.tuning_db import store as store_module
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.schema import SCHEMA_VERSION
from flashtune.tuning_db.store import Store, open_existing

MakeRecord = Callable[..., Record]

ADD_MANY = """
import dataclasses, sys
from pathlib import Path
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.stdin.readline()
for number in range(count):
    with Store(path) as store:
        store.add(Record(
            device="nvidia-h200", toolchain=Toolchain(triton="3.6.0"),
            problem=Problem(vocab_size=16, hidden_size=8, n_clusters=4, n_probes=1),
            config={"plan": name, "n": number}, provenance=Provenance.MEASURED,
            measurement=Measurement(outcome=Outcome.OK, median_us=1.0),
            created="2026-01-31T12:00:00Z"))
    print(number, flush=True)
"""


def start(path: Path, name: str, count: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ADD_MANY, str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def open_any(path: Path, read_only: bool) -> None:
    Store(path, read_only=read_only).close()


def assert_refused(path: Path, message: str, read_only: bool) -> None:
    before = path.read_bytes()
    with pytest.raises(FlashtuneError, match=message) as caught:
        open_any(path, read_only)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def filled(path: Path, make_record: MakeRecord, count: int = 1) -> Path:
    with Store(path) as store:
        for number in range(count):
            store.add(make_record(config={"plan": "p", "n": number}))
    return path


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("content", [b"not a database\n", b"\0" * 4096, b"SQLite format 3\0" * 99])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes, read_only: bool) -> None:
    path = tmp_path / "tuning.db"
    path.write_bytes(content)
    assert_refused(path, "not a readable database", read_only)
    with pytest.raises(FlashtuneError, match="FLASHTUNE_DB"):
        open_existing(path)


def test_a_corrupt_page_is_told_when_it_is_met(tmp_path: Path, make_record: MakeRecord) -> None:
    path = filled(tmp_path / "tuning.db", make_record, 200)
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    with (
        pytest.raises(FlashtuneError, match=r"not a readable database .*malformed"),
        Store(path, read_only=True) as store,
    ):
        store.records()
    assert path.read_bytes() == content


DEEP = "[" * 5000 + "]" * 5000
NO_RECORD = {
    "config": ("'[]'", "'null'", "'7'", "x'ff00'", "7", "'{}'", "'{\"plan\": [1]}'", f"'{DEEP}'",
               f"'{'9' * 5000}'", "'{\"plan\": \"a\", \"b\": NaN}'", "'{\"plan\": \"\\ud800\"}'",
               "'{\"plan\": \"a\", \"plan\": \"b\"}'"),
    "problem": ("'{}'", "7", "x'ff'", f"'{DEEP}'", "replace(problem, '64,', '64' || '0' || ',')",
                "replace(problem, '1024', '1' || printf('%0400d', 0))",
                "replace(problem, '\"bf16\"', '[]')", "replace(problem, '\"argmax\"', '{}')"),
    "toolchain": ("'[]'", "x'fe'", "'null'", f"'{DEEP}'"),
    "device": ("x'ff'", "''", "cast(x'ff41' as text)"),
    "median_us": ("'abc'", "-1", "1e999", "x'00'", "9223372036854775807", "NULL", "0"),
    "spread_us": ("'abc'", "-1", "1e999"),
    "samples": ("'x'", "-5", "1e300"),
    "outcome": ("'improved'", "7", "'crash'"),
    "provenance": ("'said'", "7"),
    "policy": ("x'ff'", "''"),
    "error": ("x'ff'",),
    "created": ("7", "x'ff'", "''", "'9999'", "'2026-02-30T00:00:00Z'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"),
    [(column, value) for column, values in NO_RECORD.items() for value in values],
    ids=lambda text: text[:30],
)
def test_a_row_that_is_no_record_is_left_out_and_counted(
    column: str,
    value: str,
    tmp_path: Path,
    make_record: MakeRecord,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = filled(tmp_path / "tuning.db", make_record, 2)
    with Store(path) as store:
        first, second = store.records()
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE records SET {column} = {value} WHERE key = ?", (first.key,))
    connection.close()
    with Store(path, read_only=True) as store:
        assert store.records() == [second]
        assert store.best(second.device, second.problem) in (None, second)
        assert store.left_out.startswith(
            "skipped 1 rows that this version of flashtune cannot read "
        )
        with pytest.raises(FlashtuneError, match=r"tuning\.db holds a row .*upgrade") as told:
            store.get(first.key)
        assert str(told.value).isprintable()
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "tuning.db: skipped" in caplog.text
    with Store(path) as store:  # a good one may take its place
        store.add(first)
        assert first in store.records()


def test_all_records_are_added_or_none(tmp_path: Path, make_record: MakeRecord) -> None:
    records = [make_record(config={"plan": "staged", "n": number}) for number in range(3)]
    with Store(tmp_path / "tuning.db") as store:
        store.add(records[0])
        with sqlite3.connect(store.path) as connection:
            connection.execute(
                "CREATE TRIGGER no_third BEFORE INSERT ON records WHEN NEW.config LIKE '%2,%' "
                "BEGIN SELECT RAISE(ABORT, 'no third'); END"
            )
        connection.close()
        with pytest.raises(FlashtuneError, match="no third"):
            store.add(*records)
        assert store.records() == records[:1]
        assert len(store.measurements(records[0].key)) == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_schema(tmp_path: Path, make_record: MakeRecord, read_only: bool) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    assert_refused(path, "made by a newer flashtune .*upgrade", read_only)


@pytest.mark.parametrize("old", [b"policy", b"records", b"CREATE TABLE", b'"config" TEXT'])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_schema_that_is_no_text_is_one_line(
    tmp_path: Path, make_record: MakeRecord, old: bytes, read_only: bool
) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    content = path.read_bytes()
    path.write_bytes(content.replace(old, b"\xe1" + old[1:]))
    with pytest.raises(FlashtuneError), Store(path, read_only=read_only) as store:
        assert store.records() == []
        assert store.left_out
        raise FlashtuneError("as good")


@pytest.mark.parametrize("read_only", [False, True])
def test_views_are_no_tables(tmp_path: Path, make_record: MakeRecord, read_only: bool) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE records RENAME TO others")
        connection.execute("CREATE VIEW records AS SELECT * FROM others")
    connection.close()
    assert_refused(path, "lacks the tables of a tuning database", read_only)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("column", ["policy", "config", "created"])
def test_a_missing_column_is_one_line(
    tmp_path: Path, make_record: MakeRecord, column: str, read_only: bool
) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    with sqlite3.connect(path) as connection:
        connection.execute(f"ALTER TABLE records RENAME COLUMN {column} TO other")
    connection.close()
    with Store(path, read_only=read_only) as store, contextlib.suppress(FlashtuneError):
        assert store.records() == []
        assert store.left_out
    with Store(path) as store, pytest.raises(FlashtuneError):
        store.add(make_record())


@pytest.mark.parametrize("read_only", [False, True])
def test_another_program_s_database(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "tuning.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    assert_refused(path, "another program's database", read_only)


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FlashtuneError, match="does not exist"):
        Store(tmp_path / "typo" / "tuning.db")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "file"
    folder.write_text("kept")
    with pytest.raises(FlashtuneError, match="does not exist"):
        Store(folder / "tuning.db")
    monkeypatch.setattr(environment, "default_data_folder", lambda: folder)
    with pytest.raises(FlashtuneError, match="cannot create the folder"):
        Store(folder / "tuning.db")
    assert open_existing(folder / "tuning.db") is None
    assert folder.read_text() == "kept"


def test_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FlashtuneError, match="cannot open or write"):
        Store(tmp_path / ("n" * 300))


@pytest.fixture
def locked_folder(make_record: MakeRecord) -> Iterator[Path]:
    """A folder with a database, neither writable, seen as an ordinary user."""
    folder = Path(tempfile.mkdtemp())  # tmp_path's parents are closed to other users
    filled(folder / "tuning.db", make_record)
    (folder / "tuning.db").chmod(0o444)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # to root everything is writable
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_is_not_writable(locked_folder: Path) -> None:
    for name in ("tuning.db", "new.db"):
        with pytest.raises(FlashtuneError, match=r"cannot open or write .*FLASHTUNE_DB"):
            Store(locked_folder / name)
    assert [entry.name for entry in locked_folder.iterdir()] == ["tuning.db"]


def test_a_database_is_readable_where_nothing_is_writable(
    locked_folder: Path, make_record: MakeRecord
) -> None:
    reader = open_existing(locked_folder / "tuning.db")
    assert reader is not None
    with reader:
        assert reader.records() == [make_record(config={"plan": "p", "n": 0})]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_or_a_pipe_in_the_file_s_place(tmp_path: Path, read_only: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FlashtuneError, match="is not a file"):
            open_any(path, read_only)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_what_is_no_log_beside_a_database(
    tmp_path: Path, make_record: MakeRecord, kind: str, suffix: str, read_only: bool
) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    beside = Path(f"{path}{suffix}")
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "folder":
        beside.mkdir()
    else:
        beside.symlink_to(beside if kind == "loop" else "/dev/zero")
    assert_refused(path, f"{suffix} is not a file", read_only)


def test_a_full_disk_loses_nothing(tmp_path: Path, make_record: MakeRecord) -> None:
    path = filled(tmp_path / "tuning.db", make_record)
    with Store(path) as store:
        store._connection.execute("PRAGMA max_page_count = 1")  # no page more than there are
        with pytest.raises(FlashtuneError, match="the disk is full"):
            for number in range(1000):
                store.add(make_record(config={"plan": "q", "n": number}))
        told = len(store.records())
        store._connection.execute("PRAGMA max_page_count = 100000")
        store.add(make_record(config={"plan": "after"}))
        assert len(store.records()) == told + 1
        assert make_record(config={"plan": "p", "n": 0}) in store.records()


def test_a_lock_held_too_long(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.05)
    path = filled(tmp_path / "tuning.db", make_record)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store(path) as store:
        with pytest.raises(FlashtuneError, match=r"locked by another .* than 0\.05 s"):
            store.add(make_record(config={"plan": "q"}))
        assert len(store.records()) == 1  # reading goes on
        other.execute("ROLLBACK")
        store.add(make_record(config={"plan": "q"}))
        assert len(store.records()) == 2
    other.close()


def test_a_new_database_locked_by_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.05)
    path = tmp_path / "tuning.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(FlashtuneError, match="locked by another process"):
        Store(path)
    other.close()


def test_two_processes_add_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    workers = [start(path, name, 40) for name in ("one", "two")]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert (worker.returncode, errors) == (0, "")
    with Store(path, read_only=True) as store:
        records = store.records()
    assert len(records) == 80
    assert {record.config["plan"] for record in records} == {"one", "two"}


def test_a_killed_writer_leaves_what_it_had_added(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    with start(path, "killed", 100_000) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        said = [int(worker.stdout.readline()) for _ in range(20)]
        worker.send_signal(signal.SIGKILL)
        said += [int(line) for line in worker.stdout.read().split("\n")[:-1]]
    with Store(path) as store:
        added = {record.config["n"] for record in store.records()}
        for record in store.records():
            assert len(store.measurements(record.key)) == 1
        (sound,) = store._connection.execute("PRAGMA integrity_check").fetchone()
    assert sound == "ok"
    assert worker.returncode == -signal.SIGKILL
    assert set(said) <= added <= set(range(len(said) + 1))


def test_a_closed_store_is_the_caller_s_mistake(tmp_path: Path) -> None:
    store = Store(tmp_path / "tuning.db")
    store.close()
    store.close()
    with pytest.raises(sqlite3.ProgrammingError):
        store.records()


@pytest.mark.parametrize("message", ["database is locked", "locking protocol", "disk I/O error"])
def test_a_file_system_without_locks_blames_no_other_process(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "tuning.db"
    assert "does not support locks" not in store_module._explain(path, message)
    monkeypatch.setattr(fcntl, "lockf", unknown)
    said = store_module._explain(path, message)
    assert (
        f"the file system of {path} does not support locks" in said and "on a local disk" in said
    )
    assert "another process" not in said
    assert not list(tmp_path.iterdir())
