"""Probes in the database, and databases that are older than they are."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.probe import Figures, Probe
from flashtune.tuning_db.record import Provenance, Record
from flashtune.tuning_db.store import Store

MODE = {"power mode": "25W", "highest clock": "1020 MHz"}
PROBE = Probe(
    device="orin-nano-super",
    conditions=MODE,
    figures=Figures(bandwidth=8.5e10, launch_us=2.5, load_us=0.7),
    seconds=0.4,
    created="2026-11-01T00:00:00Z",
)


def test_a_probe_reads_back_as_it_was_and_the_next_replaces_it(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        for seconds in (0.9, 0.4):
            store.keep_probe(Probe(**{**fields_of(PROBE), "seconds": seconds}))
        assert store.probe(PROBE.device, dict(reversed(MODE.items()))) == PROBE
        assert store.probe(PROBE.device, {"power mode": "25W"}) is None
        assert store.probe("nvidia-h100", MODE) is None


def fields_of(probe: Probe) -> dict[str, Any]:
    return {name: getattr(probe, name) for name in probe.__dataclass_fields__}


@pytest.mark.parametrize(
    "change",
    [
        {"figures": "{}"},
        {"figures": json.dumps({**json.loads("{}"), "bandwidth": 1})},
        {"figures": "[" * 1000},
        {"figures": '{"bandwidth": -1, "launch_us": null, "overlapped_us": null,'
                    ' "load_us": null, "barrier_us": null}'},
    ],
)  # fmt: skip
def test_a_row_that_is_no_probe_counts_for_none(change: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Store(path) as store:
        store.keep_probe(PROBE)
    with sqlite3.connect(path) as connection:
        for name, value in change.items():
            connection.execute(f"UPDATE probes SET {name} = ?", (value,))
    connection.close()
    with Store(path, read_only=True) as store:
        assert store.probe(PROBE.device, MODE) is None


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e9, True, "1"])
def test_figures_are_those_of_a_device(value: Any) -> None:
    with pytest.raises(FlashtuneError, match="launch_us of a probe must be more than 0"):
        Figures(launch_us=value)


def test_a_database_of_before_is_read_and_brought_up_to_date(
    tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    path = tmp_path / "old.db"
    with Store(path) as store:
        store.add(make_record(5.0))
    with sqlite3.connect(path) as connection:  # as version 1 had it
        connection.execute("DROP TABLE probes")
        for table in ("records", "measurements"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN joules")
        connection.execute("DELETE FROM _sqlite_migrations WHERE name LIKE 'm002%'")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    with Store(path, read_only=True) as store:
        assert store.records() == [make_record(5.0)]
        assert store.probe(PROBE.device, MODE) is None
    with Store(path) as store:
        store.keep_probe(PROBE)
        store.add(make_record(4.0, joules=0.002))
        assert store.probe(PROBE.device, MODE) == PROBE
        [record] = store.records()
    assert (record.measurement.median_us, record.measurement.joules) == (4.0, 0.002)


def test_a_corrected_record_goes_before_a_predicted_and_after_a_measured(
    tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    assert [each.value for each in Provenance] == ["measured", "corrected", "predicted"]
    measured, corrected, predicted = (
        make_record(time_us, provenance=each, config={"plan": "staged", "rows": rows})
        for each, time_us, rows in zip(Provenance, (9.0, 8.0, 7.0), (1, 2, 3), strict=True)
    )
    with Store(tmp_path / "a.db") as store:
        store.add(predicted)
        assert store.best(predicted.device, predicted.problem) == predicted
        store.add(corrected)
        assert store.best(predicted.device, predicted.problem) == corrected
        store.add(measured)
        assert store.best(predicted.device, predicted.problem) == measured


@pytest.mark.parametrize("first", list(Provenance))
@pytest.mark.parametrize("second", list(Provenance))
def test_the_more_trusted_time_of_one_config_is_kept(
    first: Provenance, second: Provenance, tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    with Store(tmp_path / "a.db") as store:
        for each, time_us in ((first, 1.0), (second, 2.0)):
            store.add(make_record(time_us, provenance=each, created="2026-01-31T12:00:00Z"))
        [kept] = store.records()
    assert kept.measurement.median_us == (2.0 if second.rank <= first.rank else 1.0)
