"""The records for a head: the user's database, then tables, the added ones first.

Usage:
    choice = best_choice(problem, device, toolchain(device), troubles)
    choice, sources = look(problem, device, toolchain(device), troubles)   # and its sources

Nothing here raises because of a record, a database or a table: what cannot be read is left out,
and `troubles` says so.
"""

from pathlib import Path

from flashtune.kernels.runtime.choice import ADDED, PREBUILT, USER, Choice, Level, Source, choose
from flashtune.kernels.runtime.trouble import note, one_line
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import default_path, open_existing
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table
from flashtune.tuning_db.table_folder import added_tables


def best_choice(problem: Problem, device: Device, tools: Toolchain, troubles: list[str]) -> Choice:
    """The choice for a problem, from all records."""
    return look(problem, device, tools, troubles)[0]


def look(
    problem: Problem,
    device: Device,
    tools: Toolchain,
    troubles: list[str],
    database: Path | None = None,
) -> tuple[Choice, list[Source]]:
    """The choice, and the records that it was made from. database: default: the user's.

    Looks for this problem first; reads all records only if that finds nothing measured.
    """
    sources = read_sources(device, problem, troubles, database)
    choice = choose(problem, device, tools, sources)
    record = choice.record if choice.level is Level.EXACT else None
    if record is None or record.provenance is not Provenance.MEASURED:
        sources = read_sources(device, None, troubles, database)
        choice = choose(problem, device, tools, sources)
    return choice, sources


def read_sources(
    device: Device, problem: Problem | None, troubles: list[str], database: Path | None = None
) -> list[Source]:
    """The records of one problem on this device, or of all problems and devices.

    What cannot be read is left out, and `troubles` says so once.
    """
    sources = []
    name = device.name if problem else None
    try:
        store = open_existing(database or default_path())
        if store is not None:
            with store:
                records = store.records(device=name, problem=problem)
                sources.append(Source(name=USER, records=records, left_out=store.left_out))
    except Exception as error:
        note(troubles, f"the tuning database is not used: {one_line(error)}")
    try:
        added = added_tables()
    except Exception as error:
        note(troubles, f"the added tables are not used: {one_line(error)}")
    else:
        sources.append(Source(name=ADDED, records=added.of(name), left_out=added.left_out))
    for each in [name] if name else prebuilt_devices():
        try:
            table = prebuilt_table(each)
        except Exception as error:
            note(troubles, f"a prebuilt table is not used: {one_line(error)}")
        else:
            sources.append(Source(name=PREBUILT, records=table.records if table else ()))
    return sources
