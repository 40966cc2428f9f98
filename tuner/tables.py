"""Tables of tuned kernels: from the database to a reviewed file and back.

Usage:
    flashtune.tables.export("h200", "nvidia-h200.json")
    flashtune.tables.check("nvidia-h200.json")
    flashtune.tables.show("nvidia-h200.json")
    flashtune.tables.import_("nvidia-h200.json", db="other.db")
    flashtune.tables.merge("nvidia-h200.json", "mine.json", out="merged.json")
    flashtune.tables.diff("nvidia-h200.json", "mine.json")

A device is given by name or alias; `db` is the database (default: $FLASHTUNE_DB, else the user's).
A faulty file raises a FlashtuneError of one line.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.evidence import why_less_trusted
from flashtune.tuning_db.merge import compare_tables
from flashtune.tuning_db.merge import merge as merged_tables
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance, Record
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.store import Store, default_path
from flashtune.tuning_db.table import (
    TuningTable,
    prebuilt_paths,
    rank,
    read_table,
    table_from_store,
    write_table,
)
from flashtune.tuning_db.table_folder import added_paths

AnyPath: TypeAlias = str | os.PathLike[str]


class TableData(TypedDict):
    """A table's file, its device, and its numbers of records and shapes.

    measured, corrected, predicted: the number of such records. less_trusted: why predictions for
    the device are trusted less than others, if published figures contradict them.
    """

    file: str
    device: str
    records: int
    shapes: int
    measured: int
    corrected: int
    predicted: int
    less_trusted: str | None


class ShapeRows(TypedDict):
    """One shape of a table: its problem, records, the sources of their times and of the best's."""

    problem: dict[str, Any]
    records: int
    provenance: str
    median_us: float | None
    toolchain: dict[str, str]


class TableContents(TableData):
    """A table with its shapes, in the order of the file."""

    contents: list[ShapeRows]


class MergedData(TypedDict):
    """The written file, its device, its number of records, and the decisions that were made."""

    out: str
    device: str
    records: int
    conflicts: list[dict[str, Any]]


def export(
    device: str | Device,
    out: AnyPath,
    *,
    keep: int = 1,
    shortlist: int = MOST,
    db: AnyPath | None = None,
) -> TableData:
    """Write a device's best records to a table.

    Args:
        device: The device whose records to export.
        out: The file to write.
        keep: Measured configs to keep for each shape.
        shortlist: Predicted configs to keep for each shape without measurements.
        db: The database. Default: $FLASHTUNE_DB, else the user's.

    Raises:
        FlashtuneError: If there is no record of a config that worked, or the file cannot be
            written.
    """
    if not isinstance(device, Device):
        from flashtune.tuner.here import device_named  # loads torch, which others don't need

        device = device_named(device)
    with Store(Path(db) if db else default_path(), read_only=True) as store:
        table = table_from_store(store, device.name, measured=keep, predicted=shortlist)
    if not table.records:
        raise FlashtuneError(f"no record of {device.name} that worked: run `flashtune search`")
    write_table(Path(out), table)
    return _data(Path(out), table)


def import_(*files: AnyPath, db: AnyPath | None = None) -> list[TableData]:
    """Check tables, then add their records to the database: all or none."""
    from flashtune.tuner.table_check import checked_table

    checked = [(path, checked_table(path)) for path in map(Path, files)]
    with Store(Path(db) if db else default_path()) as store:
        store.add(*(record for _, table in checked for record in table.records))
    return [_data(path, table) for path, table in checked]


def check(
    *files: AnyPath,
    compiles: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[TableData]:
    """Check tables: configs must be valid and render, and the text as `export` writes it.

    Args:
        files: Tables. Default: the shipped ones and those in FLASHTUNE_TABLES.
        compiles: Cross-compile every config too.
        on_step: Called with the number of configs compiled so far, and the total.

    Raises:
        FlashtuneError: For the first fault found.
    """
    from flashtune.tuner.table_check import check_form, checked_table, compile_record

    paths = [Path(each) for each in files] or [*prebuilt_paths(), *added_paths()]
    checked = {path: checked_table(path) for path in paths}
    for path, table in checked.items():
        check_form(path, table)
    if compiles:
        pairs = [(path, record) for path, table in checked.items() for record in table.records]
        for done, (path, record) in enumerate(pairs, start=1):
            compile_record(path, record)
            on_step(done, len(pairs))
    return [_data(path, table) for path, table in checked.items()]


def show(*files: AnyPath) -> list[TableContents]:
    """The contents of tables, one row per shape; without files, of shipped and added tables.

    Raises FlashtuneError for a file that cannot be read.
    """
    paths = [Path(each) for each in files] or [*prebuilt_paths(), *added_paths()]
    found: list[TableContents] = []
    for path in paths:
        table = read_table(path)
        by_problem: dict[Problem, list[Record]] = {}
        for record in table.records:
            by_problem.setdefault(record.problem, []).append(record)
        rows = [_shape_rows(records) for records in by_problem.values()]
        found.append({**_data(path, table), "contents": rows})
    return found


def merge(*files: AnyPath, out: AnyPath) -> MergedData:
    """Merge a device's tables into one, and say where they disagree (docs/tables.md).

    Raises:
        FlashtuneError: If there are fewer than two files, or tables of several devices.
    """
    from flashtune.tuner.table_check import checked_table

    if len(files) < 2:
        raise FlashtuneError("give at least two tables to merge")
    merged = merged_tables([(str(path), checked_table(Path(path))) for path in files])
    write_table(Path(out), merged.table)
    conflicts = [
        {
            "problem": conflict.problem.data(),
            "taken_from": conflict.taken_from,
            "why": conflict.why,
            "taken": conflict.taken.data(),
            "left": conflict.left.data(),
        }
        for conflict in merged.conflicts
    ]
    return {
        "out": str(out),
        "device": merged.table.device,
        "records": len(merged.table.records),
        "conflicts": conflicts,
    }


def diff(a: AnyPath, b: AnyPath) -> dict[str, Any]:
    """How table B differs from table A: `changed`, `only_a`, `only_b`, and how many are `same`.

    Of the changed shapes, the one with the largest change of time comes first.
    """
    return compare_tables(read_table(Path(a)), read_table(Path(b)))


def _data(path: Path, table: TuningTable) -> TableData:
    problems = {record.problem for record in table.records}
    counts = Counter(record.provenance for record in table.records)
    return {
        "file": str(path),
        "device": table.device,
        "records": len(table.records),
        "shapes": len(problems),
        "measured": counts[Provenance.MEASURED],
        "corrected": counts[Provenance.CORRECTED],
        "predicted": counts[Provenance.PREDICTED],
        "less_trusted": why_less_trusted(table.device) or None,
    }


def _shape_rows(records: list[Record]) -> ShapeRows:
    best = min(records, key=rank)
    return {
        "problem": best.problem.data(),
        "records": len(records),
        "provenance": best.provenance.value,
        "median_us": best.measurement.median_us,
        "toolchain": asdict(best.toolchain),
    }
