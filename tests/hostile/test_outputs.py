"""Outputs that are no place for a file: one line, or written, and nothing else is touched."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashtune.tuner.cli.main import cli
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_paths, prebuilt_table

DEVICES = ("/dev/null", "/dev/full")
STORAGES = (
    "", "x", "sqlite://", "sqlite:////dev/full", "file:///etc/passwd", "\x1b[2J", "sqlite:///%00",
    "sqlite:///" + "x" * 5000, "mysql://user:word@127.0.0.1:1/x",
)  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "a.db"
    table = prebuilt_table("nvidia-h200")
    assert table is not None
    with Store(path) as store:
        store.add(*table.records[:6])
    return path


def run(*words: object) -> None:
    found = CliRunner().invoke(cli, [str(each) for each in words])
    assert found.exception is None or isinstance(found.exception, SystemExit), words
    errors = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (found.exit_code == 2), words
    assert all(line.isprintable() for line in found.output.splitlines())


def kinds(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for each in folder.iterdir():
        state = each.lstat()
        found[each.name] = (state.st_mode, state.st_ino)
    return found


def test_outputs_that_are_no_files(database: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "file").write_text("mine")
    before = kinds(tmp_path)
    devices = [os.stat(each) for each in DEVICES]
    inside = [tmp_path / name for name in (*before, "x" * 300, "nowhere/file")]
    inside[inside.index(tmp_path / "file")] = tmp_path / "file" / "below"
    table = prebuilt_paths()[0]
    for out in (*inside, *DEVICES, "", "/"):
        run("tables", "export", "--device", "h200", "--db", database, "--out", out)
        run("tables", "merge", table, table, "--out", out)
        run("report", "--db", database, "--out", out)
    assert kinds(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"
    for path, old in zip(DEVICES, devices, strict=True):
        new = os.stat(path)
        assert (new.st_mode, new.st_rdev, new.st_ino) == (old.st_mode, old.st_rdev, old.st_ino)


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff.html"), "a\nb.html", "[b].html", "y" * 250])
def test_odd_names_are_as_good_as_any(database: Path, tmp_path: Path, name: str) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    copy = odd / "a.db"
    copy.write_bytes(database.read_bytes())
    run("report", "--db", copy, "--out", odd / name)
    assert (odd / name).read_bytes().startswith(b"<!DOCTYPE html>")
    left = {each.name for each in odd.iterdir()} - {"a.db-shm", "a.db-wal"}  # SQLite's own
    assert left == {"a.db", name}


@pytest.mark.parametrize("storage", STORAGES)
def test_storages_that_are_none(database: Path, storage: str) -> None:
    run("studies", "export", "--db", database, "--storage", storage)
