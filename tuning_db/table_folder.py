"""The folder of tables that FLASHTUNE_TABLES names, used besides the shipped tables.

Usage:
    added = added_tables()
    added.of("nvidia-h200")    # the records of one device; without a name, of all
    added.left_out             # one line on files that could not be read; empty if all were

A table is any file `*.json` directly in the folder; a device may have several. A file is read
again after it changed.
"""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from flashtune.tuning_db import environment
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.table import TuningTable, read_table

LOG = logging.getLogger("flashtune")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTables:
    """The readable tables of the folder, sorted by file name."""

    tables: tuple[TuningTable, ...] = ()
    left_out: str = ""

    def of(self, device: str | None = None) -> list[Record]:
        """The records of a device (by name, not alias), or of all devices."""
        return [
            record
            for table in self.tables
            if device in (None, table.device)
            for record in table.records
        ]


def added_paths() -> list[Path]:
    """The folder's tables, by name; none unless FLASHTUNE_TABLES is set.

    Raises FlashtuneError if there is no such folder, or it cannot be read.
    """
    folder = environment.tables_folder()
    if folder is None:
        return []
    try:
        names = os.listdir(folder)
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FlashtuneError(
            f"cannot read the folder of tables {folder} ({why}): set FLASHTUNE_TABLES to another "
            "folder"
        ) from error
    return [
        folder / name
        for name in sorted(names)
        if name.endswith(".json") and not name.startswith(".")
    ]


def added_tables() -> AddedTables:
    """Every table of the folder. One warning per process says how many cannot be read."""
    try:
        found = [_read(path, *_state(path)) for path in added_paths()]
        broken = [each for each in found if isinstance(each, str)]
        left_out = ""
        if broken:
            left_out = (
                f"skipped {len(broken)} of {len(found)} tables that cannot be used (the first: "
                f"{broken[0]})"
            )
    except FlashtuneError as error:
        found, left_out = [], str(error)
    if left_out:
        _warn(left_out)
    tables = tuple(each for each in found if isinstance(each, TuningTable))
    return AddedTables(tables=tables, left_out=left_out)


def _state(path: Path) -> tuple[int, int]:
    """A file's state, which changes with its content."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0  # reading it will explain why
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=256)
def _read(path: Path, changed_ns: int, size: int) -> TuningTable | str:
    """A table, or why there is none; read once per state of the file."""
    try:
        return read_table(path)
    except FlashtuneError as error:
        return str(error)


@functools.cache
def _warn(text: str) -> None:
    """Once per process: a head looks for each number of tokens."""
    LOG.warning("%s", text)
