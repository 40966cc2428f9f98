"""The database of records: one SQLite file that searches write and the runtime reads.

Usage:
    with Store(default_path()) as store:
        store.add(record)
        store.best("nvidia-h200", problem)
    store = open_existing(default_path())  # for reading; None if there is no database yet

Opening for writing creates the file and its schema; reading never changes a file, and loads
neither sqlite-utils nor click. Several processes may read and write at once (write-ahead log).
Any fault of the file raises a FlashtuneError that says what to do, and the file is left unchanged.
Rows that are not valid records, which others may have written, are left out; a warning says how
many. A Store belongs to the thread that opened it.
"""

import functools
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from flashtune.tuning_db import environment
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import parse_json
from flashtune.tuning_db.lock import knows_locks
from flashtune.tuning_db.one_line import one_line, quoted
from flashtune.tuning_db.policy import BEHIND, FINAL, is_final, taken_behind
from flashtune.tuning_db.probe import (
    Figures,
    Probe,
    checked_conditions,
    conditions_key,
)
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import (
    YOUNGER,
    ConfigData,
    Measurement,
    Outcome,
    Provenance,
    Record,
    check_created,
    config_key,
    when_made,
)
from flashtune.tuning_db.schema import APPLICATION_ID, SCHEMA_VERSION

LOG = logging.getLogger("flashtune")
Read = TypeVar("Read")  # the type that a row is read as
BUSY_SECONDS = 10.0

_BESIDE = ("-wal", "-shm", "-journal")  # suffixes that SQLite adds to a database's name

_MEASUREMENT_FIELDS = tuple(field.name for field in fields(Measurement))
_HISTORY_COLUMNS = (*_MEASUREMENT_FIELDS, "provenance", "created")
_RANKS = " ".join(f"WHEN '{each.value}' THEN {each.rank}" for each in Provenance)
_TRUST = f"CASE provenance {_RANKS} END"


def default_path() -> Path:
    """The database's path: FLASHTUNE_DB, else `tuning.db` in the user's data folder."""
    return environment.database_path()


def open_existing(path: Path) -> "Store | None":
    """Open a database for reading; None if there is no file, or an empty one.

    Raises FlashtuneError if the file exists and cannot be used.
    """
    if not os.path.exists(path):
        return None
    try:
        return Store(path, read_only=True)
    except _EmptyDatabaseError:
        return None


def existing(path: Path) -> Path:
    """The path of a database to be read. Raises FlashtuneError if nothing is there.

    Other faults are reported when it is opened.
    """
    if not os.path.exists(path):
        raise FlashtuneError(f"there is no database {path}: run `flashtune search` first")
    return path


class _EmptyDatabaseError(FlashtuneError):
    """A database without a schema yet."""


class Store:
    """An open database; a context manager that closes it.

    Raises FlashtuneError if `path` can't be used: not a database, made by a newer flashtune, no
    such folder, not writable, or, with `read_only`, no such file.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open `path`, creating file and schema unless `read_only`."""
        self.path = path
        self._odd_rows: dict[object, str] = {}
        self._read_only = read_only
        _check_path(path, read_only)
        with _clear_errors(path):
            self._connection, version = _connect(path, read_only)
            try:
                if not read_only:
                    self._prepare(version)
                elif version == 0:
                    raise _EmptyDatabaseError(
                        f"{path} contains no records yet: run `flashtune search` first"
                    )
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> "Store":
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the database."""
        self.close()

    def close(self) -> None:
        """Close the database; closing twice is fine."""
        self._connection.close()
        if self._odd_rows:
            _warn(f"{one_line(str(self.path))}: {self.left_out}")

    @property
    def left_out(self) -> str:
        """How many of the requested rows are not valid records, and why the first is not.

        Empty if all are valid.
        """
        if not self._odd_rows:
            return ""
        first, count = next(iter(self._odd_rows.values())), len(self._odd_rows)
        return (
            f"skipped {count} rows that this version of flashtune cannot read (the first: {first})"
        )

    def add(self, *records: Record) -> None:
        """Add records, all or none, and append their measurements to the history.

        Of two measurements of the same config the newer becomes the record's current one, with two
        exceptions: a prediction never replaces a measurement or a corrected prediction, and only
        another `final` measurement replaces a `final` one. A measurement dated in the future
        counts as older than any.
        """
        with self._transaction():
            for record in records:
                row = _row_of(record)
                found = self._select("SELECT * FROM records WHERE key = ?", (row["key"],))
                before = next(self._those_that_are(found, _record), None)
                if before is None or _standing(record) >= _standing(before):
                    self._put("records", row, "key")
                measured = {name: row[name] for name in _HISTORY_COLUMNS}
                self._put("measurements", {"record": row["key"], **measured})

    def remove(self, keys: Iterable[str]) -> None:
        """Remove records by their full keys, with all their measurements, in one transaction."""
        with self._transaction():
            for key in keys:
                self._connection.execute("DELETE FROM measurements WHERE record = ?", (key,))
                self._connection.execute("DELETE FROM records WHERE key = ?", (key,))

    def records(
        self,
        *,
        device: str | None = None,
        toolchain: Toolchain | None = None,
        problem: Problem | None = None,
        provenance: Provenance | None = None,
        ok_only: bool = False,
    ) -> list[Record]:
        """The matching records by device, problem key, time (failures last) and config key."""
        wanted = {
            "device": device,
            "toolchain": toolchain.key if toolchain else None,
            "problem": problem.key if problem else None,
            "provenance": provenance.value if provenance else None,
            "outcome": Outcome.OK.value if ok_only else None,
        }
        rows = self._matching(
            wanted, "device, problem, median_us IS NULL, median_us, config, toolchain"
        )
        return list(self._those_that_are(rows, _record))

    def best(
        self,
        device: str,
        problem: Problem,
        *,
        toolchain: Toolchain | None = None,
        accept: Callable[[ConfigData], bool] = lambda config: True,
    ) -> Record | None:
        """The record to run, or None; accept: whether a config may be run.

        The most trusted provenance comes first, then what was timed behind another kernel, then a
        search's finalists, then the fastest.
        """
        wanted = {
            "device": device,
            "problem": problem.key,
            "toolchain": toolchain.key if toolchain else None,
            "outcome": Outcome.OK.value,
        }
        order = (
            f"{_TRUST}, policy LIKE '%{BEHIND}' DESC, policy LIKE '{FINAL}%' DESC, "
            "median_us, config, toolchain"
        )
        records = self._those_that_are(self._matching(wanted, order), _record)
        return next((record for record in records if accept(record.config)), None)

    def get(self, key_prefix: str) -> Record:
        """The one record whose key has this prefix; raises FlashtuneError for none or several."""
        prefix = key_prefix.strip().lower()
        if not re.fullmatch("[0-9a-f]{1,32}", prefix):
            raise FlashtuneError(f"{key_prefix!r} is not a record's key: give hex digits")
        rows = self._select(
            "SELECT * FROM records WHERE key >= ? AND key < ? ORDER BY key LIMIT 2",
            (prefix, prefix + "g"),  # "g" sorts after every hex digit
        )
        if not rows:
            raise FlashtuneError(f"no record's key starts with {prefix!r} in {self.path}")
        if len(rows) > 1:
            raise FlashtuneError(
                f"{prefix!r} is ambiguous ({', '.join(str(row['key']) for row in rows)}, …): "
                "give more digits"
            )
        with self._blamed():
            return _record(rows[0])

    def measurements(self, key: str) -> list[tuple[str, Measurement]]:
        """Every measurement of the record with this key, in insertion order, with its date."""
        rows = self._select("SELECT * FROM measurements WHERE record = ? ORDER BY id", (key,))
        return [(created, each) for _, created, each in self._those_that_are(rows, _taken)]

    def first_measurements(self) -> list[tuple[str, str, Measurement]]:
        """The first measurement of each record, in insertion order, with its key and date."""
        rows = self._select("SELECT * FROM measurements ORDER BY id", ())
        first: dict[str, tuple[str, str, Measurement]] = {}
        for taken in self._those_that_are(rows, _taken):
            first.setdefault(taken[0], taken)
        return list(first.values())

    def keep_probe(self, probe: Probe) -> None:
        """Store a probe, replacing the previous one under the same conditions."""
        row = {
            "device": probe.device,
            "conditions": probe.conditions_key,
            "figures": json.dumps(asdict(probe.figures), sort_keys=True),
            "seconds": probe.seconds,
            "created": probe.created,
        }
        with self._transaction():
            self._put("probes", row, "device", "conditions")

    def probe(self, device: str, conditions: Mapping[str, str]) -> Probe | None:
        """The probe of a device under these conditions; None if there is no valid one."""
        if not self._select("SELECT 1 FROM sqlite_master WHERE name = 'probes'", ()):
            return None  # made by an older flashtune
        rows = self._select(
            "SELECT * FROM probes WHERE device = ? AND conditions = ?",
            (device, conditions_key(conditions)),
        )
        with suppress(FlashtuneError, IndexError):
            for row in rows:
                return Probe(
                    device=device,
                    conditions=checked_conditions(_parsed(row["conditions"])),
                    figures=Figures.from_json(_parsed(row["figures"])),
                    seconds=row["seconds"],
                    created=row["created"],
                )
        return None

    def problems(self, device: str) -> list[Problem]:
        """The problems with any record on this device, sorted."""
        return sorted({record.problem for record in self.records(device=device)})

    def _prepare(self, version: int) -> None:
        _use_write_ahead_log(self._connection)
        if version < SCHEMA_VERSION:
            from flashtune.tuning_db.migrations import migrate

            with self._transaction():
                migrate(self._connection)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._read_only:
            raise FlashtuneError(f"{self.path} is open for reading only")
        with _clear_errors(self.path):
            # Immediate: a transaction that reads first could not wait for another's write.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def _put(self, table: str, row: Mapping[str, Any], *keys: str) -> None:
        """Insert a row; one with the same values in the key columns gets the others' new values.

        Written out, since sqlite-utils reads a table's schema for every row.
        """
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        sql = f"INSERT INTO {table} ({names}) VALUES ({values})"
        if keys:
            new = ", ".join(f"{name} = excluded.{name}" for name in row if name not in keys)
            sql += f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {new}"
        self._connection.execute(sql, row)

    def _matching(self, wanted: dict[str, str | None], order: str) -> list[sqlite3.Row]:
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "1"
        return self._select(f"SELECT * FROM records WHERE {where} ORDER BY {order}", given)

    def _select(self, sql: str, values: tuple[str, ...] | dict[str, str]) -> list[sqlite3.Row]:
        with _clear_errors(self.path):
            cursor = self._connection.cursor()
            cursor.row_factory = sqlite3.Row
            return cursor.execute(sql, values).fetchall()

    def _those_that_are(
        self, rows: Iterable[sqlite3.Row], read: "Callable[[sqlite3.Row], Read]"
    ) -> "Iterator[Read]":
        """The values read from rows, without the invalid ones."""
        for row in rows:
            try:
                yield read(row)
            except FlashtuneError as error:
                self._odd_rows.setdefault(_identity(row), str(error))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except (FlashtuneError, ValueError, IndexError) as error:
            raise FlashtuneError(
                f"{self.path} holds a row that this flashtune cannot read ({error}): "
                "upgrade flashtune, or set FLASHTUNE_DB to another file"
            ) from error


def _identity(row: sqlite3.Row) -> object:
    """The identity of a row, of records or of measurements."""
    names = row.keys()
    known = next((name for name in ("key", "id") if name in names), None)
    return (known, row[known]) if known else tuple(row)


def _record(row: sqlite3.Row) -> Record:
    """The record in a row; raises FlashtuneError if it is invalid."""
    try:
        return Record(
            device=row["device"],
            toolchain=_toolchain(row["toolchain"]),
            problem=_problem(row["problem"]),
            config=_parsed(row["config"]),
            provenance=Provenance(row["provenance"]),
            measurement=_measurement(row),
            created=row["created"],
        )
    except (ValueError, IndexError) as error:  # IndexError: a column is missing
        raise FlashtuneError(str(error)) from error


def _taken(row: sqlite3.Row) -> tuple[str, str, Measurement]:
    """The record's key, the date and the measurement in a row of the history."""
    try:
        check_created(row["created"])
        if not isinstance(row["record"], str):
            raise FlashtuneError(f"{quoted(row['record'])} is not a record's key")
        return row["record"], row["created"], _measurement(row)
    except (ValueError, IndexError) as error:  # IndexError: a column is missing
        raise FlashtuneError(str(error)) from error


def _measurement(row: sqlite3.Row) -> Measurement:
    older = set(YOUNGER) - set(row.keys())  # an older flashtune's database lacks them
    values = {name: row[name] for name in _MEASUREMENT_FIELDS if name not in older}
    return Measurement(**{**values, "outcome": Outcome(row["outcome"])})


@functools.lru_cache(maxsize=64)  # most rows share them
def _toolchain(text: Any) -> Toolchain:
    return Toolchain.from_json(_parsed(text))


@functools.lru_cache(maxsize=256)
def _problem(text: Any) -> Problem:
    return Problem.from_json(_parsed(text))


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        raise FlashtuneError(f"{quoted(text)} is not text")
    return parse_json(text, exact=True)


def _row_of(record: Record) -> dict[str, Any]:
    measurement = {name: getattr(record.measurement, name) for name in _MEASUREMENT_FIELDS}
    return {
        "key": record.key,
        "device": record.device,
        "toolchain": record.toolchain.key,
        "problem": record.problem.key,
        "config": config_key(record.config),
        "plan": str(record.config.get("plan", "")),
        "provenance": record.provenance.value,
        **measurement,
        "outcome": record.measurement.outcome.value,
        "created": record.created,
    }


@functools.cache
def _warn(text: str) -> None:
    """Once per process: a head opens the database for each shape."""
    LOG.warning("%s", text)


def _standing(record: Record) -> tuple[int, bool, bool, str]:
    """The rank of a record's measurement: the higher replaces the lower."""
    policy = record.measurement.policy
    made = when_made(record.created)
    return -record.provenance.rank, taken_behind(policy), is_final(policy), made


def _connect(path: Path, read_only: bool) -> tuple[sqlite3.Connection, int]:
    """An open connection and the schema's version."""
    try:
        return _connect_as("mode=ro" if read_only else "mode=rwc", path)
    except sqlite3.OperationalError as error:
        if not (read_only and _lacks_access(str(error))) or os.path.exists(f"{path}-wal"):
            raise
    # In a read-only folder SQLite can't keep its index of the log; there is no log.
    return _connect_as("mode=ro&immutable=1", path)


def _connect_as(mode: str, path: Path) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        connection.text_factory = _text
        connection.execute("PRAGMA trusted_schema = OFF")  # foreign views and triggers
        return connection, _schema_version(connection, path)
    except BaseException:
        connection.close()
        raise


def _text(data: bytes) -> str:
    """A column's text; if it is not UTF-8, it can't be encoded again and no record may have it."""
    return data.decode("utf-8", "surrogateescape")


def _check_path(path: Path, read_only: bool) -> None:
    """Reject paths on which SQLite would hang or fail unclearly; make our own default folder."""
    if os.path.exists(path):  # Path.exists would raise for a name that is too long
        if not path.is_file():
            raise FlashtuneError(
                f"{path} is not a file: name a database file by --db or FLASHTUNE_DB"
            )
        for beside in (f"{path}{suffix}" for suffix in _BESIDE):
            if os.path.lexists(beside) and not os.path.isfile(beside):
                raise FlashtuneError(
                    f"{beside} is not a file, but SQLite needs one there: remove it"
                )
    elif read_only:
        existing(path)
    elif not os.path.isdir(path.parent):
        if path.parent != _own_folder():
            raise FlashtuneError(
                f"the folder {path.parent} does not exist: create it, or set FLASHTUNE_DB"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlashtuneError(
                f"cannot create the folder {path.parent} ({error.strerror}): set FLASHTUNE_DB"
            ) from error


def _own_folder() -> Path | None:
    """The default folder of the database; None for a user without a home folder."""
    with suppress(FlashtuneError):
        return environment.default_data_folder()
    return None


def _schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """The schema's version, 0 for a new database; FlashtuneError for one that isn't ours."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (version or application or tables):
        raise FlashtuneError(
            f"{path} is another program's database: set FLASHTUNE_DB to another file"
        )
    if version > SCHEMA_VERSION:
        raise FlashtuneError(
            f"{path} was made by a newer flashtune (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): upgrade flashtune, or set FLASHTUNE_DB to another file"
        )
    own = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' "
        "AND name IN ('records', 'measurements')"
    ).fetchone()[0]
    if version > 0 and own < 2:
        raise FlashtuneError(
            f"{path} lacks the tables of a tuning database: move it away, or set FLASHTUNE_DB"
        )
    return version


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; SQLite doesn't wait for other processes here.

    With it no transaction need wait for the disk, and none is lost with its process. If the
    machine itself goes down, the last ones may be missing, but no database is damaged.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode == "wal":
                connection.execute("PRAGMA synchronous = NORMAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:  # a closed store or another thread: the caller's mistake
        raise
    except sqlite3.DatabaseError as error:
        raise FlashtuneError(_explain(path, str(error))) from error
    except UnicodeDecodeError as error:  # names in the schema, or SQLite's messages about them
        raise FlashtuneError(_explain(path, "malformed schema")) from error


def _lacks_access(message: str) -> bool:
    return "unable to open" in message or "readonly" in message


def _explain(path: Path, message: str) -> str:
    """What the user can do about SQLite's message, as one line."""
    if "not a database" in message or "malformed" in message:
        return f"{path} is not a readable database ({message}): move it away, or set FLASHTUNE_DB"
    if "is full" in message:
        return f"the disk is full, so {path} was left as it was: free some space and run again"
    if ("lock" in message or "I/O" in message) and not knows_locks(path.parent):
        return (
            f"the file system of {path} does not support locks, which a database needs "
            f"({message}): set FLASHTUNE_DB to a file on a local disk"
        )
    if "locked" in message:
        return (
            f"{path} has been locked by another process for more than {BUSY_SECONDS:g} s: "
            "run again when that one is done"
        )
    if _lacks_access(message):
        return (
            f"cannot open or write {path} ({message}): check that its folder is writable, "
            "or set FLASHTUNE_DB"
        )
    return f"cannot use {path} ({message}): check the disk, or set FLASHTUNE_DB to another file"
