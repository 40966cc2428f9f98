import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashtune.tuning_db import table as table_module
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import (
    TABLE_VERSION,
    TuningTable,
    dumps_table,
    loads_table,
    prebuilt_devices,
    prebuilt_table,
    read_table,
    table_from_store,
    write_table,
)

MakeRecord = Callable[..., Record]
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def table(make_record: MakeRecord, problem: Problem) -> TuningTable:
    wide = dataclasses.replace(problem, hidden_size=1024)
    return TuningTable(
        device="nvidia-h200",
        records=(
            make_record(12.34567, problem=wide, policy="final"),
            make_record(9, config={"plan": "staged", "slack": 0.1, "pdl": True, "evict": "x"}),
            make_record(3.0, provenance=Provenance.PREDICTED, config={"plan": "guess"}),
            make_record(None, config={"plan": "bad"}, created="2026-02-01T00:00:00+00:00"),
        ),
    )


@pytest.fixture
def data(table: TuningTable) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(dumps_table(table))
    return decoded


def test_the_text_is_stable(table: TuningTable) -> None:
    text = dumps_table(table)
    assert dumps_table(loads_table(text, origin="here")) == text
    backwards = dataclasses.replace(table, records=table.records[::-1])
    assert dumps_table(backwards) == text
    assert text.endswith("}\n") and not text.endswith("\n\n")


def test_the_text_is_read_back_but_for_what_no_timer_resolves(table: TuningTable) -> None:
    read = loads_table(dumps_table(table), origin="here")
    assert read.device == table.device
    assert read.schema_version == TABLE_VERSION
    by_key = {record.key: record for record in read.records}
    assert len(by_key) == 4
    for record in table.records[1:]:
        assert by_key[record.key] == record
    rounded = by_key[table.records[0].key].measurement
    assert (rounded.median_us, rounded.policy) == (12.346, "final")


def test_measuring_again_changes_only_that_line(table: TuningTable) -> None:
    first, *rest = table.records
    again = dataclasses.replace(
        first, measurement=dataclasses.replace(first.measurement, median_us=1.0)
    )
    old = dumps_table(table).splitlines()
    new = dumps_table(dataclasses.replace(table, records=(*rest, again))).splitlines()
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    assert changed == [('    "median_us": 12.346,', '    "median_us": 1.0,')]


def record_of(data: dict[str, Any], number: int = 1) -> Any:
    return data["records"][number - 1]


def set_in(*path: Any, to: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        place: Any = data
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return edit


def drop(*path: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        place: Any = data
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return edit


FIRST = ("records", 0)
OK_TIME = ("records", 0, "measurement", "median_us")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("extra", to=1), r"a table has unknown keys \['extra'\]"),
        (drop("device"), r"lacks \['device'\]"),
        (set_in("schema_version", to=0), "schema_version must be 1, not 0"),
        (set_in("schema_version", to=True), "schema_version must be 1, not True"),
        (set_in("schema_version", to="1"), "schema_version must be 1, not '1'"),
        (set_in("schema_version", to=TABLE_VERSION + 1), "newer flashtune .*upgrade"),
        (set_in("device", to=7), "device must be text"),
        (set_in("device", to="h900"), "unknown device 'h900'"),
        (set_in("device", to="h200"), "'h200' is an alias"),
        (set_in("records", to={}), "records must be a list"),
        (set_in(*FIRST, to=[]), "record 1: a record must be an object"),
        (set_in(*FIRST, "device", to="nvidia-h100"), r"unknown keys \['device'\]"),
        (drop(*FIRST, "provenance"), r"record 1: .*lacks \['provenance'\]"),
        (set_in(*FIRST, "provenance", to="guessed"), "provenance must be one of"),
        (set_in(*FIRST, "provenance", to=[]), "provenance must be one of"),
        (set_in(*FIRST, "created", to="2026-01-31"), "created must be UTC"),
        (set_in(*FIRST, "created", to="2026-02-30T00:00:00Z"), "record 1: .*day"),
        (set_in(*FIRST, "created", to=3), "created must be UTC"),
        (drop(*FIRST, "toolchain", "torch"), "a toolchain must have"),
        (set_in(*FIRST, "toolchain", "torch", to=2), "versions must be text"),
        (set_in(*FIRST, "problem", "rows", to=2), "a problem must have"),
        (set_in(*FIRST, "problem", "n_probes", to=True), "n_probes must be"),
        (set_in(*FIRST, "problem", "n_probes", to=8.0), "n_probes must be"),
        (set_in(*FIRST, "problem", "weight_dtype", to={}), "weight_dtype must be"),
        (set_in(*FIRST, "problem", "epilogue", to=[]), "epilogue must be"),
        (set_in(*FIRST, "config", to=[]), "config must be an object"),
        (set_in(*FIRST, "config", to={}), "config must name its plan"),
        (set_in(*FIRST, "config", "plan", to=3), "config must name its plan"),
        (set_in(*FIRST, "config", "Warps", to=3), "config has a key 'Warps'"),
        (set_in(*FIRST, "config", "rows\n", to=3), "config has a key"),
        (set_in(*FIRST, "config", "rows", to=None), "rows in config must be"),
        (set_in(*FIRST, "config", "rows", to=[1]), "rows in config must be"),
        (set_in(*FIRST, "measurement", to=None), "a measurement must be an object"),
        (drop(*FIRST, "measurement", "error"), r"lacks \['error'\]"),
        (set_in(*FIRST, "measurement", "outcome", to="fine"), "outcome must be one of"),
        (set_in("records", 1, "measurement", "median_us", to=1.0), "record 2: .*outcome crash"),
        (set_in(*OK_TIME, to=None), "outcome ok"),
        (set_in(*OK_TIME, to=-1.0), "median_us must be microseconds"),
        (set_in(*OK_TIME, to=True), "median_us must be microseconds"),
        (set_in(*OK_TIME, to="9"), "median_us must be microseconds"),
        (set_in(*OK_TIME, to=float("nan")), "NaN is not a finite number"),
        (set_in(*OK_TIME, to=float("-inf")), "-Infinity is not a finite number"),
        (set_in(*FIRST, "measurement", "spread_us", to=-0.5), "spread_us must be"),
        (set_in(*FIRST, "measurement", "samples", to=-1), "samples must be a count"),
        (set_in(*FIRST, "measurement", "samples", to=True), "samples must be a count"),
        (set_in(*FIRST, "measurement", "samples", to=2**40), "samples must be a count"),
        (set_in(*FIRST, "measurement", "samples", to=10**20), "more than 64 bits"),
        (set_in(*FIRST, "measurement", "error", to=None), "error must be text"),
        (set_in(*FIRST, "measurement", "policy", to=""), "policy must be text"),
    ],
)
def test_whatever_is_wrong_is_named(data: dict[str, Any], edit: Edit, message: str) -> None:
    edit(data)
    with pytest.raises(FlashtuneError, match=message) as caught:
        loads_table(json.dumps(data), origin="my.json")
    assert str(caught.value).startswith("cannot use the tuning table my.json: ")
    assert "\n" not in str(caught.value)


def test_a_time_too_large_for_a_float(table: TuningTable) -> None:
    text = dumps_table(table)
    assert '"median_us": 9.0' in text
    with pytest.raises(FlashtuneError, match="'1e999' is too large a number"):
        loads_table(text.replace('"median_us": 9.0', '"median_us": 1e999'), origin="x")
    with pytest.raises(FlashtuneError, match="'1e999' is too large a number"):
        loads_table(text.replace('"slack": 0.1', '"slack": 1e999'), origin="x")


def test_the_same_record_twice(data: dict[str, Any]) -> None:
    data["records"].append(record_of(data, 2))
    with pytest.raises(FlashtuneError, match="occurs twice"):
        loads_table(json.dumps(data), origin="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "a table must be an object"),
        ("null", "a table must be an object"),
        ('{"a": 1, "a": 2}', "a duplicate key"),
        ("[" * 100_000, "nested more than 64 deep"),
    ],
)
def test_text_that_is_no_table(text: str, message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        loads_table(text, origin="x")


def test_a_table_is_of_one_device(make_record: MakeRecord) -> None:
    with pytest.raises(FlashtuneError, match="a table of nvidia-h200 has a record of nvidia-a40"):
        TuningTable(device="nvidia-h200", records=(make_record(device="nvidia-a40"),))


def test_files_are_written_and_read(tmp_path: Path, table: TuningTable) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write_table(link, table)
    assert link.is_symlink()
    assert path.read_text("utf-8") == dumps_table(table)
    assert dumps_table(read_table(path)) == dumps_table(table)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_a_full_disk_keeps_the_old_file(
    tmp_path: Path, table: TuningTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FlashtuneError, match=r"No space left on device.*left unchanged"):
        write_table(path, table)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_could_not_be_read_is_not_written(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "a.json"
    bad = TuningTable(device="nvidia-h200", records=(), schema_version=7)
    with pytest.raises(FlashtuneError, match="schema 7"):
        write_table(path, bad)
    assert not path.exists()


def test_files_that_cannot_be_read_or_written(tmp_path: Path, table: TuningTable) -> None:
    with pytest.raises(FlashtuneError, match=r"cannot read .*No such file"):
        read_table(tmp_path / "none.json")
    with pytest.raises(FlashtuneError, match=r"cannot read .*directory"):
        read_table(tmp_path)
    with pytest.raises(FlashtuneError, match=r"cannot write .*No such file"):
        write_table(tmp_path / "none" / "a.json", table)
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(FlashtuneError, match=r"latin\.json: is not UTF-8"):
        read_table(tmp_path / "latin.json")


def test_a_time_taken_behind_a_kernel_is_exported_before_a_shorter_one_that_was_not(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    behind = make_record(5.0, policy="search-behind", config={"plan": "a"})
    with Store(tmp_path / "a.db") as store:
        store.add(make_record(4.0, policy="final", config={"plan": "b"}))
        store.add(behind)
        assert table_from_store(store, "nvidia-h200").records == (behind,)


def test_a_store_s_best_become_a_table(
    tmp_path: Path, make_record: MakeRecord, problem: Problem
) -> None:
    other = dataclasses.replace(problem, n_tokens=2)
    final = make_record(5.0, policy="final", config={"plan": "a"})
    fast = make_record(4.0, config={"plan": "b"})
    guess = make_record(1.0, provenance=Provenance.PREDICTED, config={"plan": "d"})
    lone_guess = dataclasses.replace(guess, problem=other)
    with Store(tmp_path / "a.db") as store:
        for record in (
            guess,
            lone_guess,
            make_record(6.0, config={"plan": "c"}),
            make_record(None, config={"plan": "e"}),
            make_record(1.0, device="nvidia-a40"),
            fast,
            final,
        ):
            store.add(record)
        usual = table_from_store(store, "nvidia-h200")
        assert usual.records == (final, lone_guess)
        assert loads_table(dumps_table(usual), origin="x") == usual
        many = table_from_store(store, "nvidia-h200", measured=9)
        assert [record.config["plan"] for record in many.records] == ["a", "b", "c", "d"]
        assert many.records[3].problem == other  # a prediction is not kept beside a measurement
        assert table_from_store(store, "gb10").records == ()


def test_predictions_become_a_shortlist_of_one_cost_model(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    def guess(median_us: float, number: int, policy: str, created: str) -> Record:
        return make_record(
            median_us,
            provenance=Provenance.PREDICTED,
            policy=policy,
            config={"plan": "a", "n": number},
            created=created,
        )

    new = [guess(9.0 + n, n, "roofline-2", "2026-02-01T00:00:00Z") for n in range(12)]
    old = [guess(1.0, 50, "roofline-1", "2026-01-01T00:00:00Z")]
    with Store(tmp_path / "a.db") as store:
        for record in [*old, *new]:
            store.add(record)
        table = table_from_store(store, "nvidia-h200")
        assert {record.config["n"] for record in table.records} == set(range(8))
        assert loads_table(dumps_table(table), origin="x") == table
        few = table_from_store(store, "nvidia-h200", predicted=2)
        assert {record.config["n"] for record in few.records} == {0, 1}


def test_the_newest_toolchain_that_measured_counts(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    chains = [Toolchain(triton=version) for version in ("3.9.0", "3.10.0+git5", "3.11.0")]
    old, new = (make_record(time, toolchain=chains[n]) for n, time in enumerate((1.0, 2.0)))
    guess = make_record(0.5, toolchain=chains[2], provenance=Provenance.PREDICTED)
    with Store(tmp_path / "a.db") as store:
        for record in (old, new, guess):
            store.add(record)
        assert table_from_store(store, "nvidia-h200", measured=5).records == (new,)


@pytest.fixture
def prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(table_module, "_PREBUILT", tmp_path / "prebuilt")
    prebuilt_devices.cache_clear()
    prebuilt_table.cache_clear()
    yield tmp_path / "prebuilt"
    prebuilt_devices.cache_clear()
    prebuilt_table.cache_clear()


def prebuilt_tables() -> dict[str, TuningTable]:
    """Every prebuilt table by device name."""
    tables = ((name, prebuilt_table(name)) for name in prebuilt_devices())
    return {name: table for name, table in tables if table is not None}


def test_prebuilt_tables_are_found_by_name(prebuilt: Path, table: TuningTable) -> None:
    prebuilt.mkdir()
    (prebuilt / "notes.txt").write_text("not a table")
    write_table(prebuilt / "nvidia-h200.json", table)
    empty = TuningTable(device="gb10", records=())
    write_table(prebuilt / "gb10.json", empty)
    assert prebuilt_devices() == ("gb10", "nvidia-h200")
    assert prebuilt_tables()["gb10"] == empty
    found = prebuilt_table("nvidia-h200")
    assert found is not None and dumps_table(found) == dumps_table(table)
    assert prebuilt_table("nvidia-h200") is found
    assert prebuilt_table("../prebuilt/gb10") is None


def test_only_the_asked_table_is_read(prebuilt: Path) -> None:
    prebuilt.mkdir()
    write_table(prebuilt / "gb10.json", TuningTable(device="gb10", records=()))
    write_table(prebuilt / "thor.json", TuningTable(device="agx-thor", records=()))
    (prebuilt / "broken.json").write_text("{")
    assert prebuilt_table("gb10") is not None
    with pytest.raises(FlashtuneError, match=r"prebuilt/broken\.json"):
        prebuilt_table("broken")
    with pytest.raises(FlashtuneError, match="is a table of agx-thor"):
        prebuilt_table("thor")


def test_without_a_prebuilt_folder_there_are_none(prebuilt: Path) -> None:
    assert prebuilt_devices() == ()
    assert prebuilt_tables() == {}
    assert prebuilt_table("nvidia-h200") is None


def test_what_ships_is_canonical() -> None:
    """Also that the package's own folder is found, once it holds tables."""
    shipped = prebuilt_tables()
    assert tuple(shipped) == prebuilt_devices()
    for name, found in shipped.items():
        text = (table_module._PREBUILT / f"{name}.json").read_text("utf-8")
        assert dumps_table(found) == text


def test_a_measurement_keeps_its_whole_error(make_record: MakeRecord) -> None:
    crash = Measurement(outcome=Outcome.CRASH, error='line 1\n"é" \\ \u2028')
    kept = TuningTable(device="nvidia-h200", records=(make_record(measurement=crash),))
    assert loads_table(dumps_table(kept), origin="x") == kept
