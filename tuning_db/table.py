"""Tuning tables: a device's records as reviewed, diff-friendly JSON; prebuilt ones ship.

Usage:
    table = table_from_store(store, "nvidia-h200")
    write_table(Path("nvidia-h200.json"), table)
    prebuilt_table("nvidia-h200")  # None if there is none

The text is canonical: records are sorted by problem, config and toolchain, so that a new
measurement changes only its own lines, and `dumps_table(loads_table(text)) == text`. A problem has
one measured record, its winner, or a shortlist of several predicted or corrected ones.
"""

import functools
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import parse_json, read_text
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.policy import is_final, taken_behind
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import (
    YOUNGER,
    Measurement,
    Outcome,
    Provenance,
    Record,
    config_key,
    when_made,
)
from flashtune.tuning_db.shortlist import MOST, shortlist
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.whole_file import write_whole

TABLE_VERSION = 1
_JOULE_DIGITS = 9
_TIME_DIGITS = 3  # a nanosecond: finer than any timer of a measurement
_PREBUILT = resources.files("flashtune.tuning_db") / "prebuilt"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningTable:
    """The records of one registered device.

    Raises FlashtuneError if the device is unknown, a record is of another device, or two records
    have the same key.
    """

    schema_version: int = TABLE_VERSION
    device: str
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        """Check the invariants of every table."""
        if find_device(self.device).name != self.device:
            raise FlashtuneError(f"{self.device!r} is an alias: write the device's own name")
        keys = set()
        for record in self.records:
            if record.device != self.device:
                raise FlashtuneError(f"a table of {self.device} has a record of {record.device}")
            if record.key in keys:
                raise FlashtuneError(f"the record {record.key} occurs twice")
            keys.add(record.key)


def dumps_table(table: TuningTable) -> str:
    """The table's canonical JSON: times to the nanosecond, a newline at the end."""
    data = {
        "schema_version": table.schema_version,
        "device": table.device,
        "records": [_record_data(record) for record in sorted(table.records, key=_place)],
    }
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def loads_table(text: str, *, origin: str) -> TuningTable:
    """Read a table from JSON; `origin` names the text in errors.

    Raises FlashtuneError for anything that `dumps_table` would not have written.
    """
    try:
        return _read_table(parse_json(text, exact=True))
    except (FlashtuneError, ValueError) as error:
        raise FlashtuneError(f"cannot use the tuning table {origin}: {error}") from error


def read_table(path: Path) -> TuningTable:
    """Read a table's file; raises FlashtuneError if it is missing, unreadable or invalid."""
    try:
        text = read_text(path)
    except FlashtuneError as error:
        raise FlashtuneError(f"cannot read the tuning table {error}") from error
    return loads_table(text, origin=str(path))


def write_table(path: Path, table: TuningTable) -> None:
    """Write a table's file whole or not at all; raises FlashtuneError and keeps the old file."""
    text = dumps_table(table)
    loads_table(text, origin=str(path))  # never write a file that we would refuse to read
    write_whole(path, text.encode())


@functools.cache
def prebuilt_devices() -> tuple[str, ...]:
    """The devices with a shipped prebuilt table, sorted."""
    if not _PREBUILT.is_dir():
        return ()
    names = (entry.name for entry in _PREBUILT.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def prebuilt_paths() -> list[Path]:
    """The files of the prebuilt tables, in the order of `prebuilt_devices`."""
    return [Path(str(_PREBUILT / f"{name}.json")) for name in prebuilt_devices()]


@functools.cache
def prebuilt_table(device_name: str) -> TuningTable | None:
    """The shipped table of this device (by name, not alias), or None; read once."""
    if device_name not in prebuilt_devices():
        return None
    entry = _PREBUILT / f"{device_name}.json"
    table = loads_table(entry.read_text("utf-8"), origin=f"prebuilt/{device_name}.json")
    if table.device != device_name:
        raise FlashtuneError(
            f"prebuilt/{device_name}.json is a table of {table.device}: rename it"
        )
    return table


def table_from_store(
    store: Store, device: str, *, measured: int = 1, predicted: int = MOST
) -> TuningTable:
    """The device's records that are worth shipping, as a table.

    For each problem, the best `measured` records that were measured; if none was, a shortlist of
    `predicted` ones, those corrected by a probe first. Times of different toolchains or cost
    models are not comparable, so only the newest toolchain counts, and for predictions only the
    newest record's cost model.
    """
    by_problem = defaultdict(list)
    for record in store.records(device=device, ok_only=True):
        by_problem[record.problem].append(record)
    chosen: list[Record] = []
    for records in by_problem.values():
        best = min((record.provenance for record in records), key=lambda each: each.rank)
        known = [record for record in records if record.provenance is best]
        newest = max(known, key=toolchain_age)
        rivals = [each for each in known if each.toolchain == newest.toolchain]
        if best is Provenance.MEASURED:
            chosen += sorted(rivals, key=rank)[:measured]
        else:
            policy = newest.measurement.policy
            same = [record for record in rivals if record.measurement.policy == policy]
            chosen += shortlist(same, predicted)
    return TuningTable(device=device, records=tuple(sorted(chosen, key=_place)))


def toolchain_age(record: Record) -> tuple[list[list[int]], str]:
    """Orders records by their toolchain's versions, as numbers, then by date."""
    chain = record.toolchain
    versions = [
        [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]
        for text in (chain.triton, chain.torch, chain.driver)
    ]
    return versions, when_made(record.created)


def rank(record: Record) -> tuple[int, bool, bool, float, str]:
    """Orders OK records, the best first."""
    measurement = record.measurement
    return (
        record.provenance.rank,
        not taken_behind(measurement.policy),
        not is_final(measurement.policy),
        measurement.median_us if measurement.median_us is not None else math.inf,
        config_key(record.config),
    )


def _place(record: Record) -> tuple[Problem, str, Toolchain]:
    """Orders a file's records by their identity, never by their measurements."""
    return record.problem, config_key(record.config), record.toolchain


def _record_data(record: Record) -> dict[str, Any]:
    data = record.data()
    del data["key"], data["device"]
    for name in ("median_us", "spread_us"):
        data["measurement"][name] = _rounded(data["measurement"][name])
    if "joules" in data["measurement"]:
        data["measurement"]["joules"] = round(data["measurement"]["joules"], _JOULE_DIGITS)
    return data


def _rounded(time_us: float | None) -> float | None:
    return None if time_us is None else round(float(time_us), _TIME_DIGITS)


def _check_keys(data: Any, names: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise FlashtuneError(f"{what} must be an object")
    if set(data) != names:
        unknown, missing = sorted(set(data) - names), sorted(names - set(data))
        raise FlashtuneError(f"{what} has unknown keys {quoted(unknown)} and lacks {missing}")


def _read_table(data: Any) -> TuningTable:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > TABLE_VERSION:
        raise FlashtuneError(
            f"it was made by a newer flashtune (schema {version}, this one knows "
            f"{TABLE_VERSION}): upgrade flashtune"
        )
    _check_keys(data, {"schema_version", "device", "records"}, "a table")
    if type(version) is not int or version != TABLE_VERSION:
        raise FlashtuneError(f"schema_version must be {TABLE_VERSION}, not {quoted(version)}")
    device, rows = data["device"], data["records"]
    if not isinstance(device, str):
        raise FlashtuneError(f"device must be text, not {quoted(device)}")
    if not isinstance(rows, list):
        raise FlashtuneError("records must be a list")
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(_read_record(device, row))
        except (FlashtuneError, ValueError) as error:
            raise FlashtuneError(f"record {number}: {error}") from error
    return TuningTable(device=device, records=tuple(records))


def _read_record(device: str, data: Any) -> Record:
    names = {field.name for field in fields(Record)} - {"device"}
    _check_keys(data, names, "a record")
    return Record(
        device=device,
        toolchain=Toolchain.from_json(data["toolchain"]),
        problem=Problem.from_json(data["problem"]),
        config=data["config"],
        provenance=_read_choice(Provenance, data["provenance"], "provenance"),
        measurement=_read_measurement(data["measurement"]),
        created=data["created"],
    )


def _read_measurement(data: Any) -> Measurement:
    names = {field.name for field in fields(Measurement)}
    known = names - YOUNGER | (set(data) & YOUNGER if isinstance(data, dict) else set())
    _check_keys(data, known, "a measurement")
    return Measurement(**{**data, "outcome": _read_choice(Outcome, data["outcome"], "outcome")})


def _read_choice(kind: Any, value: Any, what: str) -> Any:
    choices = [member.value for member in kind]
    if value not in choices:
        raise FlashtuneError(f"{what} must be one of {', '.join(choices)}, not {quoted(value)}")
    return kind(value)
