"""`flashtune tables`: from the database to a reviewed file and back."""

from pathlib import Path

import click

from flashtune.kernels.backend import backend_of
from flashtune.kernels.config import parse_config, why_invalid
from flashtune.kernels.this_device import named_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.store import Store, default_path
from flashtune.tuning_db.table import TuningTable, read_table, table_from_store, write_table

_FILE = click.Path(dir_okay=False, path_type=Path)
_database = click.option("--db", "database", type=_FILE, help="The database; else the usual one.")


@click.group()
def tables() -> None:
    """Export, import and check tuning tables, one JSON file a device."""


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
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("--compile", "compiles", is_flag=True, help="Cross-compile every config too.")
def check(files: tuple[Path, ...], compiles: bool) -> None:
    """Check tables: schema, every config valid for its problem, renders, and compiles.

    \b
    Example:
      flashtune tables check --compile tuning_db/prebuilt/*.json
    """
    for path in files:
        table = _checked(path)
        if compiles:
            for record in table.records:
                _compile(path, record)
        click.echo(f"{path}: {len(table.records)} records of {table.device}, all good")


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
        reason = why_invalid(config, record.problem, device)
        if reason:
            raise FlashtuneError(f"{where}: {reason}")
        backend_of(device).render(record.problem, config, device)
    return table


def _compile(path: Path, record: Record) -> None:
    device = named_device(record.device)
    try:
        backend_of(device).compile(record.problem, parse_config(record.config), device)
    except Exception as error:
        raise FlashtuneError(
            f"{path}: {record.problem.describe()}: does not compile: {error}"
        ) from error
