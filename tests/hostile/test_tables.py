"""Mutated tables: refused in one line with nothing changed, or good for all that follows."""

import copy
import io
import json
import logging
import os
import random
import sqlite3
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.kernels.runtime.records import best_choice
from flashtune.tuner.cli.report import print_records
from flashtune.tuner.cli.tables import import_
from flashtune.tuner.here import device_named
from flashtune.tuner.search.lookup import known_records
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.merge import compare_tables, merge
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table, read_table, table_from_store, write_table
from hostile.mutation import MARK, TEXTS, dumped, mutate, spoil

COUNT = 250


def state(database: Path) -> list[str]:
    connection = sqlite3.connect(database)
    lines = list(connection.iterdump())
    connection.close()
    return lines


def shipped() -> dict[str, Any]:
    table = prebuilt_table("nvidia-h200")
    assert table is not None
    data = [record.data() for record in table.records[:40:13]]
    for each in data:
        del each["key"], each["device"]
    return {"schema_version": 1, "device": table.device, "records": data}


def use(path: Path, database: Path, folder: Path) -> None:
    """What a user does next with what was imported."""
    table, ours = read_table(path), prebuilt_table("nvidia-h200")
    assert ours is not None
    known = known_records(None, None, database)
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
    with redirect_stdout(shown):
        print_records(known)
    shown.seek(0)
    assert all(line.isprintable() for line in shown.read().split("\n"))
    json.dumps([each.record.data() for each in known], allow_nan=False).encode()
    for each in known:
        device = device_named(each.record.device)
        source = Candidate(each.record.problem, parse_config(each.record.config), device).source
        assert MARK not in source
        assert "54444439" not in source
    with Store(database, read_only=True) as store:
        write_table(folder / "out.json", table_from_store(store, table.device))
    merge([("a", table), ("b", ours)])
    json.dumps(compare_tables(table, ours), allow_nan=False)


def test_mutated_tables_are_refused_whole_or_good(tmp_path: Path) -> None:
    r, database, path = random.Random(5), tmp_path / "a.db", tmp_path / "t.json"
    table, accepted = shipped(), 0
    path.write_bytes(dumped(table))
    with redirect_stdout(io.StringIO()):
        import_.callback((path,), database)  # type: ignore[misc]
    before = state(database)
    for number in range(COUNT):
        data = copy.deepcopy(table)
        if number % 4:
            mutate(r, data)
        else:  # text, most of which is as good as any
            record = r.choice(data["records"])
            place = record["toolchain"] if r.random() < 0.5 else record["measurement"]
            place[r.choice([name for name in place if type(place[name]) is str])] = r.choice(TEXTS)
        path.write_bytes(dumped(data) if number % 3 else spoil(r, dumped(table)))
        try:
            with redirect_stdout(io.StringIO()):
                import_.callback((path,), database)  # type: ignore[misc]
        except FlashtuneError as error:
            assert str(error).isprintable()
            assert state(database) == before
        else:
            accepted += 1
            use(path, database, tmp_path)
            before = state(database)
    assert COUNT / 20 < accepted < COUNT / 2


@pytest.mark.parametrize("good_first", [True, False])
def test_of_several_tables_all_are_imported_or_none(tmp_path: Path, good_first: bool) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    table = shipped()
    good.write_bytes(dumped(table))
    table["records"][-1]["problem"]["vocab_size"] = 10**400
    bad.write_bytes(dumped(table))
    with pytest.raises(FlashtuneError, match="401 digits"):
        import_.callback((good, bad) if good_first else (bad, good), tmp_path / "a.db")  # type: ignore[misc]
    assert not (tmp_path / "a.db").exists()


NAMES = ("a.json", "b\n\x1b[2J.json", "c[b].json", "x" * 240 + ".json", ".d.json", "e.JSON")


def test_a_folder_of_tables_is_used_but_for_what_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r, device, problem = random.Random(6), find_device("h200"), parse_shape("qwen3-vl-2b")
    caplog.set_level(logging.WARNING, logger="flashtune")
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("FLASHTUNE_TABLES", str(folder))
        for name in NAMES:
            data = copy.deepcopy(shipped())
            mutate(r, data)
            text = dumped(data) if r.random() < 0.8 else spoil(r, dumped(data))
            (folder / name).write_bytes(text)
        (folder / os.fsdecode(b"\xff.json")).write_text("{}")
        os.mkfifo(folder / "pipe.json")
        (folder / "folder.json").mkdir()
        for name, target in (("zero", "/dev/zero"), ("loop", "loop.json"), ("gone", "nothing")):
            (folder / f"{name}.json").symlink_to(target)
        (folder / "good.json").write_bytes(dumped(shipped()))
        troubles: list[str] = []
        choice = best_choice(problem, device, Toolchain(), troubles)
        json.dumps(choice.explain(), allow_nan=False)
        assert all(line.isprintable() for line in troubles)
        known = {each.record.key for each in known_records(device, None, None)}
        assert {each.key for each in read_table(folder / "good.json").records} <= known
    assert all(line.isprintable() for line in caplog.messages)
