"""Known data: `flashtune devices`, `show`, `best`, `render`, `report`, `studies`, `forget`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import say, say_json
from flashtune.tuning_db.device import Device, all_devices
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store, default_path
from flashtune.tuning_db.table import read_table

_record = click.option(
    "--record", "key", help="The start of a record's key, as `flashtune show` prints it."
)


@click.command()
@click.option(
    "--probe",
    "probes",
    is_flag=True,
    help="Probe this machine's devices, and compare the measured figures with the expected ones.",
)
@options.database
@options.as_json
def devices(probes: bool, database: Path | None, as_json: bool) -> None:
    """List the known devices, and mark those of this machine.

    With --probe, this machine's devices measure what their predictions depend on: how fast memory
    is read, and what a launch, a dependent load and a barrier of the whole grid take. Predicted
    times are corrected by that. The probe and the corrected records are kept in the database.

    \b
    Examples:
      flashtune devices
      flashtune devices --probe --json
    """
    from flashtune.kernels.backends.host import devices_here
    from flashtune.tuner.cli.report import device_data, print_devices, print_probes
    from flashtune.tuner.probe import probe_here

    if probes:
        with Store(database or default_path()) as store:
            found = probe_here(store)
        if as_json:
            say_json([each.data() for each in found])
        else:
            print_probes(found)
        return
    here = set(devices_here())
    known = [*all_devices(), *sorted(here - set(all_devices()), key=lambda device: device.name)]
    if as_json:
        say_json([device_data(each, each in here) for each in known])
    else:
        print_devices(known, here)


@click.command()
@options.device("Only this device's records.")
@options.shape("Only this shape's records.")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Records to show."
)
@options.read_database
@options.as_json
def show(
    device: Device | None,
    problem: Problem | None,
    limit: int,
    database: Path | None,
    as_json: bool,
) -> None:
    """Show the database's records, the fastest of each device and shape first.

    With --device or --shape, matching records of tables follow: first of the tables in
    $FLASHTUNE_TABLES, then of those that ship.

    \b
    Example:
      flashtune show --device h200 --shape qwen3-vl-2b --limit 5
    """
    from flashtune.tuner.cli.report import print_records
    from flashtune.tuner.search.lookup import known_records

    known = known_records(device, problem, database)
    if not known:
        raise FlashtuneError(
            "no records: run `flashtune search`, or give --device to see what ships for it"
        )
    shown = known[:limit]
    if as_json:
        say_json([each.data() for each in shown])
        return
    print_records(shown)
    say(f"{len(shown)} of {len(known)} records shown")


@click.command()
@options.device("The device to look up.", required=True)
@options.shape(required=True)
@click.option(
    "--require", is_flag=True, help="Fail unless this shape was measured on this device."
)
@options.read_database
@options.as_json
def best(
    device: Device, problem: Problem, require: bool, database: Path | None, as_json: bool
) -> None:
    """Show the best record of a shape on a device, from the database or a table.

    With --require, the exit code is 2 unless exactly this shape was measured on this device.

    \b
    Examples:
      flashtune best --device h200 --shape qwen3-vl-2b --json
      flashtune best --device h200 --shape qwen3-vl-2b --require
    """
    from flashtune.tuner.cli.report import print_records
    from flashtune.tuner.search.lookup import best_record, measured_record

    find = measured_record if require else best_record
    found = find(device, problem, database)
    if as_json:
        say_json(found.data())
    else:
        print_records([found])


@click.command()
@_record
@options.device("With --shape: render the default config.")
@options.shape("With --device: render the default config.")
@options.read_database
def render(
    key: str | None, device: Device | None, problem: Problem | None, database: Path | None
) -> None:
    """Print the generated source of a record, or of the default config.

    \b
    Examples:
      flashtune render --record 3f2a
      flashtune render --device h200 --shape qwen3-vl-2b
    """
    from flashtune.kernels.backends.target import default_config
    from flashtune.kernels.plans.candidate import Candidate
    from flashtune.kernels.plans.config import parse_config
    from flashtune.tuner.here import device_named

    if key is not None:
        with Store(database or default_path(), read_only=True) as store:
            record = store.get(key)
        device, problem = device_named(record.device), record.problem
        config = parse_config(record.config)
    elif device is not None and problem is not None:
        config = default_config(problem, device)
    else:
        raise click.UsageError("give --record, or --device and --shape")
    click.echo(Candidate(problem, config, device).source, nl=False)


@click.command()
@options.device("Only this device's searches.")
@options.only_shapes
@options.out("The HTML file to write.", "-o")
@click.option(
    "--before",
    type=options.FILE,
    help="An earlier table of a device, to compare its records in the database with.",
)
@options.read_database
def report(
    device: Device | None,
    shapes: Sequence[Problem],
    out: Path,
    before: Path | None,
    database: Path | None,
) -> None:
    """Write the recorded searches as a page for a browser.

    For each search it shows the time against the byte floor, the trials with the best so far,
    which knobs matter and which of their choices were tried, what failed and why, which config a
    head would run and what that costs it. Shapes of one device are compared with each other's
    winners. The page is one file that needs no network.

    \b
    Examples:
      flashtune report --device h200 -o report.html
      flashtune report --shape gemma-3-1b --shape qwen3-0.6b -o report.html
      flashtune report --device h200 --before last-month.json -o report.html
    """
    from flashtune.tuner.report.comparison import changes
    from flashtune.tuner.report.content import read_sections
    from flashtune.tuner.report.figure import require_plotly
    from flashtune.tuner.report.page import write_report

    require_plotly()
    path = database or default_path()
    changed = None
    if before is not None:
        table = read_table(before)
        with Store(path, read_only=True) as store:
            changed = changes(table, store)
    sections = read_sections(path, device, shapes)
    write_report(out, path, sections, changed)
    trials = sum(len(each.search.evaluated) for each in sections)
    say(f"{out}: {len(sections)} searches, {trials} trials")


@click.group()
def studies() -> None:
    """Export recorded searches as Optuna studies.

    \b
    Example:
      flashtune studies export --storage sqlite:///studies.db
    """


@studies.command("export")
@click.option(
    "--storage",
    metavar="URL",
    required=True,
    help="The Optuna storage, such as sqlite:///studies.db.",
)
@options.device("Only this device's searches.")
@options.only_shapes
@options.read_database
def export_studies_(
    storage: str, device: Device | None, shapes: Sequence[Problem], database: Path | None
) -> None:
    """Write each search as a study to an Optuna storage, for optuna-dashboard.

    \b
    Example:
      flashtune studies export --storage sqlite:///studies.db --device h200
    """
    from flashtune.tuner.search.study import export_studies, searches

    path = database or default_path()
    with Store(path, read_only=True) as store:
        found = searches(store, device.name if device else None, shapes)
    if not found:
        raise FlashtuneError(f"no such record in {path}: run `flashtune search`")
    written = export_studies(found, storage)
    for name, trials in written:
        say(f"{name}: {trials} trials")
    if len(written) < len(found):
        left = len(found) - len(written)
        say(
            f"left out: {left} searches on devices that only their own machine can describe; "
            "export those there"
        )


@click.command()
@_record
@options.device("Only this device's records.")
@options.shape("Only this shape's records.")
@click.option("--failed", is_flag=True, help="Only records of configs that failed.")
@options.yes
@options.read_database
def forget(
    key: str | None,
    device: Device | None,
    problem: Problem | None,
    failed: bool,
    yes: bool,
    database: Path | None,
) -> None:
    """Remove records and their measurements from the database, after showing them and asking.

    \b
    Examples:
      flashtune forget --device orin --failed
      flashtune forget --record 3f2a --yes
    """
    from flashtune.kernels.runtime.choice import USER
    from flashtune.tuner.cli.report import print_records
    from flashtune.tuner.search.lookup import KnownRecord

    if key is None and device is None and problem is None and not failed:
        raise click.UsageError(
            "say which records to remove: give --record, --device, --shape or --failed"
        )
    path = database or default_path()
    with Store(path, read_only=True) as store:
        found = [store.get(key)] if key is not None else store.records()
    found = [
        record
        for record in found
        if (device is None or record.device == device.name)
        and (problem is None or record.problem == problem)
        and not (failed and record.measurement.outcome in (Outcome.OK, Outcome.PRUNED))
    ]
    if not found:
        say(f"no such record in {path}")
        return
    print_records([KnownRecord(record, USER) for record in found])
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"removing {len(found)} records needs confirmation: give --yes")
        click.confirm(f"remove these {len(found)} records from {path}?", abort=True, err=True)
    with Store(path) as store:
        store.remove([record.key for record in found])
    say(f"{path}: {len(found)} records removed")
