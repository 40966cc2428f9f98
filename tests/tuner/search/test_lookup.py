"""The best record: the user's own, unless only one of a table is measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from flashtune.kernels.runtime.choice import ADDED, PREBUILT, USER
from flashtune.tuner.search.lookup import (
    KnownRecord,
    best_record,
    known_records,
    measured_record,
)
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import (
    TuningTable,
    prebuilt_devices,
    prebuilt_table,
    write_table,
)

H200 = find_device("h200")
QWEN = parse_shape("qwen3-vl-2b")


def test_without_a_database_the_shipped_record_is_found(tmp_path: Path) -> None:
    found = best_record(H200, QWEN, tmp_path / "none.db")
    table = prebuilt_table(H200.name)
    assert found.shipped
    assert table is not None and found.record in table.records
    assert found.record.problem == QWEN
    with pytest.raises(FlashtuneError, match=r"no record for .* p300 on nvidia-h200: run"):
        best_record(H200, replace(QWEN, n_probes=300), tmp_path / "none.db")


def test_a_measured_record_goes_before_a_predicted_one_and_the_users_before_a_shipped_one(
    tmp_path: Path,
) -> None:
    known = best_record(H200, QWEN, tmp_path / "none.db")
    shipped = known.record
    slow = replace(shipped.measurement, median_us=99.0)
    measured = replace(shipped, measurement=slow)
    predicted = replace(measured, provenance=Provenance.PREDICTED)
    for name, own, expected in (("p", predicted, shipped), ("m", measured, measured)):
        with Store(tmp_path / name) as store:
            store.add(own)
        assert best_record(H200, QWEN, tmp_path / name) == KnownRecord(
            expected, PREBUILT if expected is shipped else USER
        )


def test_what_ships_is_shown_after_the_users_own_records_once(tmp_path: Path) -> None:
    [first, *others] = known_records(H200, QWEN, tmp_path / "none.db")
    assert first.shipped and all(each.shipped for each in others)
    slow = replace(first.record, measurement=replace(first.record.measurement, median_us=99.0))
    with Store(tmp_path / "own.db") as store:
        store.add(slow)
    assert known_records(H200, QWEN, tmp_path / "own.db") == [
        KnownRecord(slow, USER),
        *others,
    ]
    everywhere = known_records(None, QWEN, tmp_path / "none.db")
    assert {each.record.device for each in everywhere} == {*prebuilt_devices()}
    assert known_records(None, None, tmp_path / "none.db") == []


def test_an_added_table_is_looked_into_after_the_database_and_before_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = best_record(H200, QWEN, tmp_path / "none.db")
    slow = replace(shipped.record.measurement, median_us=77.0)
    added = replace(shipped.record, measurement=slow)
    write_table(tmp_path / "h200.json", TuningTable(device=H200.name, records=(added,)))
    monkeypatch.setenv("FLASHTUNE_TABLES", str(tmp_path))
    assert best_record(H200, QWEN, tmp_path / "none.db") == KnownRecord(added, ADDED)
    known = known_records(H200, QWEN, tmp_path / "none.db")
    assert known == [KnownRecord(added, ADDED)], "the same record ships, and is shown once"
    assert known_records(None, None, tmp_path / "none.db") == []
    own = replace(added, measurement=replace(slow, median_us=99.0))
    with Store(tmp_path / "own.db") as store:
        store.add(own)
    assert best_record(H200, QWEN, tmp_path / "own.db") == KnownRecord(own, USER)


def test_a_measured_record_is_of_just_this_problem_and_can_run(tmp_path: Path) -> None:
    known = measured_record(H200, QWEN, tmp_path / "none.db")
    assert known.shipped
    with pytest.raises(FlashtuneError, match=r"\(there is no record\): run `flashtune search`"):
        measured_record(H200, replace(QWEN, n_probes=300), tmp_path / "none.db")
    with pytest.raises(FlashtuneError, match="only predicted"):
        measured_record(find_device("orin"), QWEN, tmp_path / "none.db")
    other = replace(QWEN, n_probes=300)
    odd = replace(known.record, problem=other, config={"plan": "of-tomorrow"})
    with Store(tmp_path / "odd.db") as store:
        store.add(odd)
    assert best_record(H200, other, tmp_path / "odd.db") == KnownRecord(odd, USER)
    with pytest.raises(FlashtuneError, match=r"cannot run: .*of-tomorrow"):
        measured_record(H200, other, tmp_path / "odd.db")
