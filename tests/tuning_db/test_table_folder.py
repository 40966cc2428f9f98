"""The folder that FLASHTUNE_TABLES names: what of it is a table, and what becomes of the rest."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.table import TuningTable, write_table
from flashtune.tuning_db.table_folder import AddedTables, added_paths, added_tables

MakeRecord = Callable[..., Record]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path))
    return tmp_path


def write(path: Path, *records: Record) -> None:
    write_table(path, TuningTable(device="nvidia-h200", records=records))


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHTUNE_TABLES", raising=False)
    assert added_paths() == []
    assert added_tables() == AddedTables()


def test_every_table_of_the_folder_is_read_whatever_its_name(
    folder: Path, make_record: MakeRecord
) -> None:
    """As a mounted one has them, with links into hidden folders."""
    one, other = make_record(1.0), make_record(2.0, config={"plan": "staged"})
    (folder / "..data").mkdir()
    write(folder / "..data" / "b.json", other)
    (folder / "b.json").symlink_to("..data/b.json")
    write(folder / "a.json", one)
    write_table(folder / "c.json", TuningTable(device="gb10", records=()))
    (folder / "README.md").write_text("no table")
    (folder / "._a.json").write_bytes(b"\0")
    assert [path.name for path in added_paths()] == ["a.json", "b.json", "c.json"]
    found = added_tables()
    assert found.of("nvidia-h200") == found.of() == [one, other]
    assert found.of("gb10") == []
    assert found.left_out == ""


def test_a_broken_one_is_left_out_with_a_count_and_read_again_once_it_changed(
    folder: Path, make_record: MakeRecord, caplog: pytest.LogCaptureFixture
) -> None:
    record = make_record(1.0)
    write(folder / "good.json", record)
    (folder / "bad.json").write_text("[]")
    os.mkfifo(folder / "pipe.json")
    (folder / "link.json").symlink_to("nowhere")
    for _ in range(2):
        found = added_tables()
        assert found.of() == [record]
        assert found.left_out.startswith("skipped 3 of 4 tables that cannot be used (the first: ")
        assert "bad.json" in found.left_out
    assert [line.getMessage() for line in caplog.records] == [found.left_out]
    for name in ("pipe.json", "link.json"):
        (folder / name).unlink()
    write(folder / "bad.json", make_record(3.0, config={"plan": "dense"}))
    assert added_tables().left_out == ""
    assert len(added_tables().of()) == 2


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_folder_that_is_none_says_what_to_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path / name))
    with pytest.raises(FlashtuneError, match="set FLASHTUNE_TABLES to another"):
        added_paths()
    found = added_tables()
    assert found.tables == () and "set FLASHTUNE_TABLES" in found.left_out
