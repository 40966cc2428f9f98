"""`flashtune tables`: from the database to a reviewed file and back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from flashtune.kernels.backends.host import named_device
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.merge import compare_tables, merge
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Record
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.store import Store, default_path
from flashtune.tuning_db.table import (
    TuningTable,
    dumps_table,
    prebuilt_paths,
    read_table,
    table_from_store,
    write_table,
)

_FILE = click.Path(dir_okay=False, path_type=Path)
_database = click.option("--db", "database", type=_FILE, help="The database; else the usual one.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group()
def tables() -> None:
    """Export, import, check, merge and compare tuning tables, one JSON file a device."""


@tables.command()
@click.option("--device", "name", required=True, help="The device whose records to export.")
@click.option("--output", type=_FILE, required=True, help="The file to write.")
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Measured configs to keep for each shape, the best first.",
)
@click.option(
    "--shortlist",
    type=click.IntRange(1),
    default=MOST,
    show_default=True,
    help="Predicted configs to keep for each shape that nobody has measured.",
)
@_database
def export(name: str, output: Path, keep: int, shortlist: int, database: Path | None) -> None:
    """Write a device's best records to a table.

    Of shapes that were only predicted it keeps a shortlist: the fastest of each kind of kernel,
    then configs that are fast and unlike those. The runtime races them on the device.

    \b
    Example:
      flashtune tables export --device h200 --output nvidia-h200.json
    """
    device = named_device(name)
    with Store(database or default_path(), read_only=True) as store:
        table = table_from_store(store, device.name, measured=keep, predicted=shortlist)
    if not table.records:
        raise FlashtuneError(f"no record of {device.name} that worked: run `flashtune search`")
    write_table(output, table)
    problems = len({record.problem for record in table.records})
    click.echo(f"{output}: {len(table.records)} records of {device.name}, {problems} shapes")


@tables.command("import")
@click.argument("files", type=_FILE, nargs=-1, required=True)
@_database
def import_(files: tuple[Path, ...], database: Path | None) -> None:
    """Add tables' records to the database, once all of them are checked.

    \b
    Example:
      flashtune tables import nvidia-h200.json
    """
    checked = [(path, _checked(path)) for path in files]
    with Store(database or default_path()) as store:
        for path, table in checked:
            for record in table.records:
                store.add(record)
            click.echo(f"{path}: {len(table.records)} records of {table.device}")


@tables.command()
@click.argument("files", type=_FILE, nargs=-1)
@click.option("--compile", "compiles", is_flag=True, help="Cross-compile every config too.")
@_json
def check(files: tuple[Path, ...], compiles: bool, as_json: bool) -> None:
    """Check tables, else those that ship: schema, every config valid, renders, and compiles.

    They must also be as `tables export` writes them, with nothing that failed.

    \b
    Examples:
      flashtune tables check
      flashtune tables check --compile nvidia-h200.json
    """
    checked = {path: _checked(path) for path in files or prebuilt_paths()}
    for path, table in checked.items():
        _check_form(path, table)
    if compiles:
        pairs = [(path, record) for path, table in checked.items() for record in table.records]
        console = Console(stderr=True)
        for path, record in track(pairs, "compiling", console=console, transient=True):
            _compile(path, record)
    rows = [
        {"file": str(path), "device": table.device, "records": len(table.records)}
        for path, table in checked.items()
    ]
    if as_json:
        click.echo(json.dumps({"compiled": compiles, "tables": rows}, indent=1))
        return
    for row in rows:
        click.echo(f"{row['file']}: {row['records']} records of {row['device']}, all good")


@tables.command("merge")
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=_FILE, required=True, help="The file to write.")
@_json
def merge_(files: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Make one table of a device's several, and list where they disagree.

    Of each shape the records of one table are taken: measured before predicted, then the newer
    toolchain, then the faster by more than the noise, else the table named first. Predictions of
    one cost model make a new shortlist.

    \b
    Example:
      flashtune tables merge nvidia-h200.json mine.json -o nvidia-h200.json
    """
    if len(files) < 2:
        raise click.UsageError("give at least two tables to merge")
    merged = merge([(str(path), _checked(path)) for path in files])
    write_table(output, merged.table)
    count = len(merged.table.records)
    if as_json:
        conflicts = [
            {
                "problem": asdict(conflict.problem),
                "taken_from": conflict.taken_from,
                "why": conflict.why,
                "taken": conflict.taken.data(),
                "left": conflict.left.data(),
            }
            for conflict in merged.conflicts
        ]
        data = {"output": str(output), "records": count, "conflicts": conflicts}
        click.echo(json.dumps(data, indent=1))
        return
    for conflict in merged.conflicts:
        click.echo(f"{conflict.problem.describe()}: {conflict.taken_from}: {conflict.why}")
    click.echo(f"{output}: {count} records of {merged.table.device}")


@tables.command()
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@_json
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show what tells table B from table A: shapes, times, configs, tools.

    \b
    Example:
      flashtune tables diff nvidia-h200.json mine.json
    """
    found = compare_tables(read_table(a), read_table(b))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, path in (("only_a", a), ("only_b", b)):
        for problem in found[name]:
            click.echo(f"{Problem(**problem).describe()}: only in {path}")
    for change in found["changed"]:
        click.echo(f"{Problem(**change['problem']).describe()}: {_changed_line(change)}")
    click.echo(f"{found['same']} shapes are the same")


def _changed_line(change: dict[str, Any]) -> str:
    before, after = change["median_us"]
    parts = [f"{before:.3f} -> {after:.3f} us"]
    if change["ratio"] is not None:
        parts[0] += f" (x {change['ratio']:.3f})"
    pairs = {**change["toolchain"], **change["config"]}
    for name in ("provenance", "records"):
        if change[name][0] != change[name][1]:
            pairs[name] = change[name]
    parts += [f"{name} {one} -> {other}" for name, (one, other) in pairs.items()]
    return ", ".join(parts)


def _checked(path: Path) -> TuningTable:
    """The table, each of whose configs is valid and renders; FlashtuneError names what is not."""
    table = read_table(path)
    device = named_device(table.device)
    for record in table.records:
        where = f"{path}: {record.problem.describe()}"
        try:
            config = parse_config(record.config)
        except FlashtuneError as error:
            raise FlashtuneError(f"{where}: {error}") from error
        candidate = Candidate(record.problem, config, device)
        reason = candidate.why_invalid()
        if reason:
            raise FlashtuneError(f"{where}: {reason}")
        _ = candidate.source  # which must render
    return table


def _check_form(path: Path, table: TuningTable) -> None:
    """What a table that ships must be, beyond being usable."""
    for record in table.records:
        if record.measurement.outcome is not Outcome.OK:
            raise FlashtuneError(
                f"{path}: {record.problem.describe()}: a record whose outcome is "
                f"{record.measurement.outcome.value}: failures stay in databases, remove it"
            )
    if path.read_text("utf-8") != dumps_table(table):
        raise FlashtuneError(
            f"{path} is not written as `tables export` writes: import it and export it again"
        )


def _compile(path: Path, record: Record) -> None:
    device = named_device(record.device)
    try:
        candidate = Candidate(record.problem, parse_config(record.config), device)
        backend_of(candidate).compile(candidate)
    except Exception as error:
        raise FlashtuneError(
            f"{path}: {record.problem.describe()}: does not compile: {error}"
        ) from error
