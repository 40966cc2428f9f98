"""The database's schema, one migration after another.

Importing this module loads sqlite-utils and with it click: `store` does so only when a database is
opened for writing. Never edit a released migration: add another, and raise
`schema.SCHEMA_VERSION`.
"""

import sqlite3

from sqlite_utils import Database, Migrations

from flashtune.tuning_db.schema import APPLICATION_ID

MIGRATIONS = Migrations("flashtune")

_MEASUREMENT_COLUMNS = {
    "provenance": str,
    "outcome": str,
    "median_us": float,
    "spread_us": float,
    "samples": int,
    "error": str,
    "policy": str,
    "created": str,
}
_MAY_BE_NULL = {"median_us", "spread_us"}


@MIGRATIONS()
def m001_records_and_measurements(db: Database) -> None:
    """Records hold each config's current measurement; measurements hold the full history."""
    records: dict[str, type] = {
        "key": str,
        "device": str,
        "toolchain": str,
        "problem": str,
        "config": str,
        "plan": str,
        **_MEASUREMENT_COLUMNS,
    }
    db.table("records").create(records, pk="key", not_null=set(records) - _MAY_BE_NULL)
    db.table("records").create_index(["device", "problem"])
    measurements: dict[str, type] = {"id": int, "record": str, **_MEASUREMENT_COLUMNS}
    db.table("measurements").create(
        measurements,
        pk="id",
        not_null=set(measurements) - _MAY_BE_NULL,
        foreign_keys=[("record", "records", "key")],
    )
    db.table("measurements").create_index(["record"])


@MIGRATIONS()
def m002_probes_and_joules(db: Database) -> None:
    """Probes of devices, and the energy of a call in addition to its time."""
    probes = {
        "device": str,
        "conditions": str,
        "figures": str,
        "seconds": float,
        "created": str,
    }
    db.table("probes").create(probes, pk=("device", "conditions"), not_null=set(probes))
    for name in ("records", "measurements"):
        db.table(name).add_column("joules", float)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema up to date; the caller holds the write transaction and commits it."""
    MIGRATIONS.apply(Database(connection, execute_plugins=False))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    version = connection.execute("SELECT count(*) FROM _sqlite_migrations").fetchone()[0]
    connection.execute(f"PRAGMA user_version = {version}")
