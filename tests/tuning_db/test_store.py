import contextlib
import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
import pytest

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance, Record, record_key
from flashtune.tuning_db.schema import SCHEMA_VERSION
from flashtune.tuning_db.store import Store, _use_write_ahead_log, open_existing

MakeRecord = Callable[..., Record]
EARLY, LATE = "2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"
OTHER_CHAIN = Toolchain(triton="3.9.0")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as opened:
        yield opened


def test_a_record_reads_back_as_it_was(store: Store, make_record: MakeRecord) -> None:
    config = {"plan": "staged", "rows": 4, "slack": 0.5, "pdl": True, "evict": "first"}
    kept = make_record(12.345678, config=config)
    failed = make_record(None, config={"plan": "fused"})
    store.add(kept)
    store.add(failed)
    assert store.get(kept.key) == kept
    assert store.get(failed.key) == failed
    assert [type(value) for value in store.get(kept.key).config.values()] == [
        type(config[name]) for name in sorted(config)
    ]


def test_what_is_stored_is_there_for_the_next_reader(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    path = tmp_path / "odd name?#%20é.db"
    with Store(path) as store:
        store.add(make_record())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    before = path.read_bytes()
    reader = open_existing(path)
    assert reader is not None
    with reader:
        assert reader.records() == [make_record()]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (("measured", "search", EARLY), ("measured", "search", LATE), 2),
        (("measured", "search", EARLY), ("measured", "search", EARLY), 2),
        (("measured", "search", LATE), ("measured", "search", EARLY), 1),
        (("measured", "search", EARLY), ("measured", "final", LATE), 2),
        (("measured", "final", EARLY), ("measured", "search", LATE), 1),
        (("measured", "final", EARLY), ("measured", "race", LATE), 1),
        (("measured", "final", EARLY), ("measured", "final", LATE), 2),
        (("measured", "final", LATE), ("measured", "search-behind", EARLY), 2),
        (("measured", "search-behind", EARLY), ("measured", "final", LATE), 1),
        (("measured", "final-behind", EARLY), ("measured", "search-behind", LATE), 1),
        (("measured", "search", EARLY), ("predicted", "v1", LATE), 1),
        (("predicted", "v1", LATE), ("measured", "search", EARLY), 2),
        (("predicted", "v1", EARLY), ("predicted", "v2", LATE), 2),
    ],
)
def test_which_measurement_is_the_current_one(
    store: Store,
    make_record: MakeRecord,
    first: tuple[str, str, str],
    second: tuple[str, str, str],
    kept: int,
) -> None:
    records = [
        make_record(float(number), provenance=Provenance(kind), policy=policy, created=created)
        for number, (kind, policy, created) in enumerate((first, second), start=1)
    ]
    for record in records:
        store.add(record)
    assert store.records() == [records[kept - 1]]
    assert store.measurements(records[0].key) == [
        (record.created, record.measurement) for record in records
    ]


def test_a_final_time_survives_a_later_crash_in_a_search(
    store: Store, make_record: MakeRecord
) -> None:
    store.add(make_record(5.0, policy="final"))
    store.add(make_record(None, created=LATE))
    assert store.records(ok_only=True) == [make_record(5.0, policy="final")]


def test_records_are_sorted_with_failures_last(
    store: Store, make_record: MakeRecord, problem: Problem
) -> None:
    wide = dataclasses.replace(problem, hidden_size=128)
    expected = [
        make_record(7.0, device="nvidia-a40", config={"plan": "z"}),
        make_record(3.0, problem=wide),
        make_record(2.0, config={"plan": "b"}),
        make_record(9.0, config={"plan": "a", "n": 1}),
        make_record(9.0, config={"plan": "a", "n": 2}),
        make_record(None, config={"plan": "0"}),
    ]
    for record in reversed(expected):
        store.add(record)
    assert store.records() == expected


def test_records_are_filtered(store: Store, make_record: MakeRecord, problem: Problem) -> None:
    two = dataclasses.replace(problem, n_tokens=2)
    plain = make_record(1.0)
    a40 = make_record(2.0, device="nvidia-a40")
    newer = make_record(3.0, toolchain=OTHER_CHAIN)
    other = make_record(4.0, problem=two)
    guess = make_record(5.0, provenance=Provenance.PREDICTED, config={"plan": "guess"})
    failed = make_record(None, config={"plan": "bad"})
    for record in (plain, a40, newer, other, guess, failed):
        store.add(record)
    assert store.records(device="nvidia-a40") == [a40]
    assert store.records(toolchain=OTHER_CHAIN) == [newer]
    assert store.records(problem=two) == [other]
    assert store.records(provenance=Provenance.PREDICTED) == [guess]
    assert failed not in store.records(ok_only=True)
    assert len(store.records(ok_only=True)) == 5
    assert store.records(device="nvidia-h200", problem=problem, ok_only=True) == [
        plain,
        newer,
        guess,
    ]
    assert store.records(device="gb10") == []
    assert store.problems("nvidia-h200") == [problem, two]
    assert store.problems("gb10") == []


def test_the_best_is_measured_then_behind_a_kernel_then_final_then_fast(
    store: Store, make_record: MakeRecord, problem: Problem
) -> None:
    ranked = [
        make_record(9.0, policy="final-behind", config={"plan": "g"}),
        make_record(8.0, policy="search-behind", config={"plan": "h"}),
        make_record(6.0, policy="final", config={"plan": "a"}),
        make_record(7.0, policy="final", config={"plan": "b"}),
        make_record(4.0, policy="search", config={"plan": "c"}),
        make_record(5.0, policy="race", config={"plan": "d"}),
        make_record(1.0, provenance=Provenance.PREDICTED, config={"plan": "e"}),
    ]
    assert store.best("nvidia-h200", problem) is None
    store.add(make_record(None, config={"plan": "f"}))
    assert store.best("nvidia-h200", problem) is None
    for record in reversed(ranked):
        store.add(record)
        assert store.best("nvidia-h200", problem) == record
    assert store.best("nvidia-a40", problem) is None
    assert store.best("nvidia-h200", problem, toolchain=OTHER_CHAIN) is None
    assert store.best("nvidia-h200", problem, toolchain=ranked[0].toolchain) == ranked[0]


def test_get_takes_the_start_of_a_key(store: Store, make_record: MakeRecord) -> None:
    records = [make_record(config={"plan": "p", "n": n}) for n in range(20)]
    for record in records:
        store.add(record)
    assert store.get(records[3].key[:12].upper()) == records[3]
    firsts = [record.key[0] for record in records]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    with pytest.raises(FlashtuneError, match="ambiguous"):
        store.get(shared)
    missing = record_key("x", OTHER_CHAIN, records[0].problem, {})
    with pytest.raises(FlashtuneError, match="no record's key starts with"):
        store.get(missing)


@pytest.mark.parametrize("prefix", ["", "%", "xyz", "a" * 33, "é"])
def test_get_refuses_what_is_no_key(store: Store, prefix: str) -> None:
    with pytest.raises(FlashtuneError, match="is not a record's key"):
        store.get(prefix)


def test_measurements_of_an_unknown_record_are_none(store: Store) -> None:
    assert store.measurements("0" * 32) == []


@pytest.mark.parametrize("to_come", ["9999-12-31T23:59:59Z", "2199-01-01T00:00:00+00:00"])
def test_a_time_to_come_is_older_than_any(
    to_come: str, store: Store, make_record: MakeRecord
) -> None:
    """Else the record of a wrong clock would stay for ever."""
    store.add(make_record(1.0, policy="final", created=to_come))
    store.add(make_record(25.0, policy="final", created=LATE))
    assert [each.measurement.median_us for each in store.records()] == [25.0]
    store.add(make_record(1.0, policy="final", created=to_come))
    assert [each.measurement.median_us for each in store.records()] == [25.0]
    store.add(make_record(None, policy="final", created=LATE))
    assert store.best("nvidia-h200", make_record().problem) is None


def test_a_failed_add_leaves_nothing_behind(store: Store, make_record: MakeRecord) -> None:
    broken = make_record()
    store.add(broken)
    with sqlite3.connect(store.path) as connection:
        connection.execute(
            "CREATE TRIGGER no_history BEFORE INSERT ON measurements "
            "BEGIN SELECT RAISE(ABORT, 'no history'); END"
        )
    connection.close()
    with pytest.raises(FlashtuneError, match="no history"):
        store.add(make_record(1.0, created=LATE))
    assert store.records() == [broken]
    assert len(store.measurements(broken.key)) == 1


def test_adding_does_not_wait_for_the_disk(store: Store) -> None:
    """A search adds hundreds of records a second. Only with the log is that safe."""
    normal, full = 1, 2
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (normal,)
    with contextlib.closing(sqlite3.connect(":memory:")) as without_log:
        _use_write_ahead_log(without_log)
        assert without_log.execute("PRAGMA synchronous").fetchone() == (full,)


def test_a_reader_cannot_add(tmp_path: Path, make_record: MakeRecord) -> None:
    Store(tmp_path / "a.db").close()
    with (
        Store(tmp_path / "a.db", read_only=True) as reader,
        pytest.raises(FlashtuneError, match="reading only"),
    ):
        reader.add(make_record())


def test_reading_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    assert open_existing(path) is None
    with pytest.raises(FlashtuneError, match="there is no database"):
        Store(path, read_only=True)
    assert not list(tmp_path.iterdir())
    path.touch()
    assert open_existing(path) is None
    with pytest.raises(FlashtuneError, match="no records yet"):
        Store(path, read_only=True)
    assert path.read_bytes() == b""


def test_the_default_folder_is_made_when_something_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "share" / "flashtune"
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda name: str(folder))
    Store(folder / "tuning.db").close()
    assert (folder / "tuning.db").is_file()


def test_migrating_twice_changes_nothing(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "a.db"
    for median_us in (1.0, 2.0):
        with Store(path) as store:
            store.add(make_record(median_us))
    with Store(path) as store:
        assert len(store.measurements(make_record().key)) == 2
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        indexed = [
            row[2] for row in connection.execute("PRAGMA index_info(idx_records_device_problem)")
        ]
    connection.close()
    assert indexed == ["device", "problem"]


def test_reading_loads_none_of_the_heavy_packages(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "a.db"
    with Store(path) as store:
        store.add(make_record())
    code = (
        "import sys; from pathlib import Path\n"
        "from flashtune.tuning_db import store, table\n"
        f"assert len(store.open_existing(Path({str(path)!r})).records()) == 1\n"
        "table.prebuilt_devices()\n"
        "heavy = {'click', 'optuna', 'sqlalchemy', 'sqlite_utils', 'torch', 'triton', 'rich'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
