"""The records that are known of a problem: in the user's database, and in the shipped tables.

Usage:
    found = best_record(device, problem, database=None)
    found.record, found.shipped
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import default_path, open_existing
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A record, and whether it is of a shipped table and not of the database."""

    record: Record
    shipped: bool


def best_record(device: Device, problem: Problem, database: Path | None) -> KnownRecord | None:
    """The user's best record, or the shipped one where that is measured and the user's is not.

    Raises FlashtuneError when the database or the table cannot be read.
    """
    own = None
    store = open_existing(database or default_path())
    if store is not None:
        with store:
            own = store.best(device.name, problem)
    shipped = best_shipped(device, problem)
    measured = [each for each in (own, shipped) if _is_measured(each)]
    best = next(iter(measured), own or shipped)
    return None if best is None else KnownRecord(best, shipped=best is not own)


def best_shipped(device: Device, problem: Problem) -> Record | None:
    """The best record of the device's shipped table: measured before predicted, then by time."""
    return min(_shipped([device.name], problem), key=_rank, default=None)


def known_records(
    device: Device | None, problem: Problem | None, database: Path | None
) -> list[KnownRecord]:
    """The database's records; then, of a device or problem that is given, those shipped.

    Each part by device and problem, the fastest first and failures last; what ships and is in the
    database, too, is the database's. Raises FlashtuneError when the database or a table cannot be
    read.
    """
    own: list[Record] = []
    shipped: list[Record] = []
    name = device.name if device else None
    store = open_existing(database or default_path())
    if store is not None:
        with store:
            own = store.records(device=name, problem=problem)
    if name or problem:
        keys = {record.key for record in own}
        every = _shipped([name] if name else prebuilt_devices(), problem)
        shipped = [record for record in every if record.key not in keys]
    shipped.sort(key=lambda record: (record.device, record.problem.key, _rank(record)))
    return [
        *(KnownRecord(record, shipped=False) for record in own),
        *(KnownRecord(record, shipped=True) for record in shipped),
    ]


def _shipped(devices: Iterable[str], problem: Problem | None) -> list[Record]:
    tables = [prebuilt_table(device) for device in devices]
    return [
        record
        for table in tables
        for record in (table.records if table else ())
        if record.measurement.outcome is Outcome.OK and problem in (None, record.problem)
    ]


def _is_measured(record: Record | None) -> bool:
    return record is not None and record.provenance is Provenance.MEASURED


def _rank(record: Record) -> tuple[bool, float]:
    return not _is_measured(record), record.measurement.median_us or 0.0
