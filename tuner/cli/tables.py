"""`flashtune tables`: from the database to a reviewed file and back."""

from pathlib import Path
from typing import Any

import click

from flashtune.tuner import tables as tables_of
from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import print_rows, say, say_json
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.shortlist import MOST


@click.group()
def tables() -> None:
    """Export, import, check, show, merge and compare tuning tables: one JSON file per device."""


@tables.command()
@options.device("The device whose records to export.", required=True)
@options.out("The file to write.")
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Measured configs to keep for each shape, the fastest first.",
)
@click.option(
    "--shortlist",
    type=click.IntRange(1),
    default=MOST,
    show_default=True,
    help="Predicted configs to keep for each shape without measurements.",
)
@options.read_database
def export(device: Device, out: Path, keep: int, shortlist: int, database: Path | None) -> None:
    """Write a device's best records to a table.

    For shapes that were only predicted it keeps a shortlist: the fastest of each kind of kernel
    that is about as fast as the best, then fast configs that differ from those. The runtime races
    them on the device.

    \b
    Example:
      flashtune tables export --device h200 --out nvidia-h200.json
    """
    found = tables_of.export(device, out, keep=keep, shortlist=shortlist, db=database)
    say(f"{out}: {found['records']} records of {found['device']}, {found['shapes']} shapes")


@tables.command("import")
@click.argument("files", type=options.FILE, nargs=-1, required=True)
@options.database
def import_(files: tuple[Path, ...], database: Path | None) -> None:
    """Add tables' records to the database: all of them, or none.

    \b
    Example:
      flashtune tables import nvidia-h200.json
    """
    for row in tables_of.import_(*files, db=database):
        say(f"{row['file']}: {row['records']} records of {row['device']}")


@tables.command()
@click.argument("files", type=options.FILE, nargs=-1)
@click.option("--compile", "compiles", is_flag=True, help="Also cross-compile every config.")
@options.as_json
def check(files: tuple[Path, ...], compiles: bool, as_json: bool) -> None:
    """Check tables: the schema, and that every config is valid and renders.

    Without files it checks the shipped tables and those in $FLASHTUNE_TABLES. Tables must also be
    formatted as `tables export` writes them, and must not contain configs that failed.

    \b
    Examples:
      flashtune tables check
      flashtune tables check --compile nvidia-h200.json
    """
    from flashtune.tuner.progress import StepProgress

    if compiles:
        with StepProgress("compiling") as progress:
            rows = tables_of.check(*files, compiles=True, on_step=progress.show_of)
    else:
        rows = tables_of.check(*files)
    if as_json:
        say_json({"compiled": compiles, "tables": rows})
        return
    for row in rows:
        say(f"{row['file']}: {_held(row)}, all valid")
        if row["less_trusted"]:
            say(f"{row['file']}: {row['less_trusted']}")


@tables.command()
@click.argument("files", type=options.FILE, nargs=-1)
@options.as_json
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Show what tables contain: for each shape its records, where their times come from, the best.

    Without files, the shipped ones and those of $FLASHTUNE_TABLES. A time is measured on the
    device, or predicted from its published figures, or corrected: predicted from what a probe
    measured on the device.

    \b
    Example:
      flashtune tables show nvidia-h200.json
    """
    from flashtune.tuner.cli.report import number

    found = tables_of.show(*files)
    if as_json:
        say_json(found)
        return
    for each in found:
        rows = [
            (
                Problem.from_json(row["problem"]).describe(),
                str(row["records"]),
                row["provenance"],
                number(row["median_us"]),
                ", ".join(
                    f"{tool} {version}" for tool, version in row["toolchain"].items() if version
                ),
            )
            for row in each["contents"]
        ]
        headings = ("problem", ">records", "provenance", ">best us", "tools")
        notes = [each["less_trusted"]] if each["less_trusted"] else []
        print_rows(f"{each['file']}: {_held(each)}", headings, rows, notes=notes)


def _held(table: tables_of.TableData) -> str:
    """How many records a table has, and where their times come from."""
    counts = {
        "measured": table["measured"],
        "corrected": table["corrected"],
        "predicted": table["predicted"],
    }
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{table['records']} records of {table['device']} ({parts or 'none'})"


@tables.command("merge")
@click.argument("files", type=options.FILE, nargs=-1, required=True)
@options.out("The file to write.", "-o")
@options.as_json
def merge_(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Merge a device's tables into one, and list where they disagree.

    For each shape, the records of one table are taken: measured before corrected before predicted,
    then the newer toolchain, then times taken behind another kernel, then the faster one if its
    lead exceeds the noise, else the table named first. Predictions of the same cost model form a
    new shortlist.

    \b
    Example:
      flashtune tables merge nvidia-h200.json mine.json -o nvidia-h200.json
    """
    if len(files) < 2:
        raise click.UsageError("give at least two tables to merge")
    merged = tables_of.merge(*files, out=out)
    if as_json:
        say_json(merged)
        return
    for conflict in merged["conflicts"]:
        name = Problem(**conflict["problem"]).describe()
        say(f"{name}: {conflict['taken_from']}: {conflict['why']}")
    say(f"{out}: {merged['records']} records of {merged['device']}")


@tables.command()
@click.argument("a", type=options.FILE)
@click.argument("b", type=options.FILE)
@options.as_json
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show how table B differs from table A: times, configs, tools, then shapes only one has.

    The largest change of time comes first.

    \b
    Example:
      flashtune tables diff nvidia-h200.json mine.json
    """
    found = tables_of.diff(a, b)
    if as_json:
        say_json(found)
        return
    say(
        f"{len(found['changed'])} shapes changed, {len(found['only_a'])} only in {a}, "
        f"{len(found['only_b'])} only in {b}, {found['same']} the same"
    )
    for change in found["changed"]:
        say(f"{Problem(**change['problem']).describe()}: {_changed_line(change)}")
    for name, path in (("only_a", a), ("only_b", b)):
        for problem in found[name]:
            say(f"{Problem(**problem).describe()}: only in {path}")


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
