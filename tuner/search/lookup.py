"""The known records of a problem, from the user's database and from tables.

Usage:
    found = best_record(device, problem, database=None)
    found.record, found.source      # FlashtuneError if there is none
    measured_record(device, problem, database=None)     # FlashtuneError if none is measured
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.kernels.runtime.choice import ADDED, PREBUILT, USER
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import default_path, open_existing
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table, rank
from flashtune.tuning_db.table_folder import added_tables

_SOURCES = (USER, ADDED, PREBUILT)  # in the order in which a head looks them up


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A record, and its source: `USER`, `ADDED` or `PREBUILT`."""

    record: Record
    source: str

    @property
    def shipped(self) -> bool:
        """Whether it comes from a shipped table."""
        return self.source == PREBUILT

    def data(self) -> dict[str, Any]:
        """The record as plain data, with its source."""
        return {**self.record.data(), "source": self.source, "shipped": self.shipped}


def best_record(device: Device, problem: Problem, database: Path | None) -> KnownRecord:
    """The best record: by most trusted provenance, then source: user's, added tables, shipped.

    Raises FlashtuneError if there is none, or the database or a shipped table cannot be read.
    """
    best = _best(_of_problem(device, problem, database))
    if best is None:
        raise FlashtuneError(
            f"no record for {problem.describe()} on {device.name}: run `flashtune search`"
        )
    return best


def measured_record(device: Device, problem: Problem, database: Path | None) -> KnownRecord:
    """The best record of exactly this problem on this device that is measured and can run there.

    Raises FlashtuneError if there is none, and as `best_record` does.
    """
    found = _of_problem(device, problem, database)
    measured = [each for each in found if each.record.provenance is Provenance.MEASURED]
    best = _best(each for each in measured if why_not_run(each.record, device) is None)
    if best is not None:
        return best
    why = "it was only predicted" if found else "there is no record"
    if measured:
        why = f"the measured config cannot run: {why_not_run(measured[0].record, device)}"
    raise FlashtuneError(
        f"no measured record of {problem.describe()} on {device.name} ({why}): run `flashtune "
        "search` on that device, or set FLASHTUNE_TABLES to a folder with its table"
    )


def why_not_run(record: Record, device: Device) -> str | None:
    """Why this version of flashtune would not run a record's config; None if it would."""
    try:
        config = parse_config(record.config)
    except FlashtuneError as error:
        return str(error)
    return Candidate(record.problem, config, device).why_invalid()


def best_shipped(device: Device, problem: Problem) -> Record | None:
    """The best record of the device's shipped table: measured before predicted, then by time."""
    return min(_shipped([device.name], problem), key=rank, default=None)


def known_records(
    device: Device | None, problem: Problem | None, database: Path | None
) -> list[KnownRecord]:
    """The database's records; then, if a device or problem is given, those of tables.

    Added tables come before shipped ones. Each part is sorted by device and problem, the fastest
    first and failures last; a record counts for the first part that has it. Raises FlashtuneError
    if the database or a shipped table cannot be read.
    """
    known: dict[str, KnownRecord] = {}
    for each in _all_records(device, problem, database):
        known.setdefault(each.record.key, each)
    return list(known.values())


def _all_records(
    device: Device | None, problem: Problem | None, database: Path | None
) -> list[KnownRecord]:
    """As `known_records`, but a record in several sources is returned from each."""
    own: list[Record] = []
    added: list[Record] = []
    shipped: list[Record] = []
    name = device.name if device else None
    store = open_existing(database or default_path())
    if store is not None:
        with store:
            own = store.records(device=name, problem=problem)
    if name or problem:
        added = _that_work(added_tables().of(name), problem)
        shipped = _shipped([name] if name else prebuilt_devices(), problem)
    for records in (added, shipped):
        records.sort(key=lambda record: (record.device, record.problem.key, rank(record)))
    return [
        KnownRecord(record, source)
        for source, records in zip(_SOURCES, (own, added, shipped), strict=True)
        for record in records
    ]


def _of_problem(device: Device, problem: Problem, database: Path | None) -> list[KnownRecord]:
    """The records of a problem on a device whose configs worked."""
    every = _all_records(device, problem, database)
    return [each for each in every if each.record.measurement.outcome is Outcome.OK]


def _best(known: Iterable[KnownRecord]) -> KnownRecord | None:
    return min(known, key=_place, default=None)


def _place(known: KnownRecord) -> tuple[int, int, tuple[int, bool, bool, float, str]]:
    trust = known.record.provenance.rank
    return trust, _SOURCES.index(known.source), rank(known.record)


def _shipped(devices: Iterable[str], problem: Problem | None) -> list[Record]:
    tables = [prebuilt_table(device) for device in devices]
    records = (record for table in tables for record in (table.records if table else ()))
    return _that_work(records, problem)


def _that_work(records: Iterable[Record], problem: Problem | None) -> list[Record]:
    return [
        record
        for record in records
        if record.measurement.outcome is Outcome.OK and problem in (None, record.problem)
    ]
