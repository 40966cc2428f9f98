"""The command line: it parses, calls and prints.

Each command's work is elsewhere: searches in session.py, tables in tables.py, models in
model_commands.py.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from flashtune.kernels.backends.backend import backend_of
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.host import named_device
from flashtune.kernels.model_folder.folder import read_model
from flashtune.kernels.plans.config import default_config, parse_config
from flashtune.tuner.cli.cost_model import model
from flashtune.tuner.cli.models import cluster, quality
from flashtune.tuner.cli.report import (
    SearchProgress,
    devices_table,
    records_table,
    results_table,
)
from flashtune.tuner.cli.tables import tables
from flashtune.tuner.search.lookup import best_record
from flashtune.tuner.search.proposal import SAMPLERS
from flashtune.tuner.search.session import SearchRequest, Session, result_data, this_device
from flashtune.tuner.search.space import parse_fixed
from flashtune.tuner.workers.remote import RemoteMachine, find_machine
from flashtune.tuner.workers.ssh import PYTHON
from flashtune.tuning_db.device import Device, all_devices
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import Store, default_path


class _Parsed(click.ParamType[Any]):
    """An option read by a function whose FlashtuneError becomes the option's error."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed value; what was parsed before is left alone."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except FlashtuneError as error:
            self.fail(str(error), param, ctx)


class _Failure(click.ClickException):
    """What a person can mend."""

    exit_code = 2


class _Commands(click.Group):
    """Ends a FlashtuneError as one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except FlashtuneError as error:
            raise _Failure(str(error)) from error


SHAPE = _Parsed("shape", parse_shape)
MODEL = _Parsed("folder", read_model)
DEVICE = _Parsed("device", named_device)
FIX = _Parsed("knob=value", parse_fixed)
_database = click.option(
    "--db",
    "database",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The database; else $FLASHTUNE_DB, else the user's data folder.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flashtune")
def cli() -> None:
    """FlashHead decode kernels, tuned for your device.

    \b
    Examples:
      flashtune devices
      flashtune search --device orin --shape qwen3-vl-2b
      flashtune best --device h200 --shape gemma-3-1b
    """


cli.add_command(tables)
cli.add_command(model)
cli.add_command(cluster)
cli.add_command(quality)


@cli.command()
@click.option("--device", type=DEVICE, help="Device to search for; else this machine's.")
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="A preset or key=value pairs.")
@click.option("--model", "models", type=MODEL, multiple=True, help="A FlashHead model folder.")
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=150,
    show_default=True,
    help="Configs to evaluate for each shape, earlier runs counted in.",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), help="Seconds for the whole run."
)
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=len(os.sched_getaffinity(0)),
    show_default="a processor each",
    help="Compilers at a time.",
)
@click.option("--fix", "fixed", type=FIX, multiple=True, help="Search only where KNOB=VALUE.")
@click.option("--remote", metavar="DESTINATION", help="Measure there, over ssh.")
@click.option(
    "--remote-python",
    metavar="PYTHON",
    show_default="python3",
    help="The Python there that has torch and Triton.",
)
@_database
@_json
def search(
    device: Device | None,
    shapes: Sequence[Problem],
    models: Sequence[Problem],
    trials: int,
    timeout: float | None,
    sampler: str,
    seed: int,
    jobs: int,
    fixed: Sequence[tuple[str, Any]],
    remote: str | None,
    remote_python: str | None,
    database: Path | None,
    as_json: bool,
) -> None:
    """Search for the fastest kernel of each shape on a device.

    On the device itself every config is verified and measured. For a device that is not here,
    configs are cross-compiled and their times predicted, and records say so. With --remote
    they are measured on the machine that ssh reaches under that name; it needs Python, torch
    and Triton. Run the same command again to go on where an interrupted search was.

    \b
    Examples:
      flashtune search --device orin --shape qwen3-vl-2b
      flashtune search --shape vocab=151936,hidden=2048,clusters=9496,probes=512 --trials 300
      flashtune search --model ./my-model --timeout 120 --json
      flashtune search --shape qwen3-0.6b --fix plan=staged --fix selection=in_gather
      flashtune search --device orin --remote user@jetson --shape qwen3-vl-2b
    """
    problems = list(dict.fromkeys([*shapes, *models]))
    if not problems:
        raise click.UsageError("give at least one --shape or --model")
    if remote_python is not None and remote is None:
        raise click.UsageError("--remote-python is about another machine: give --remote too")
    machine = _connect(remote, device, remote_python or PYTHON) if remote is not None else None
    request = SearchRequest(
        device=machine.device if machine else device or this_device(),
        problems=problems,
        trials=trials,
        timeout_s=timeout,
        sampler=sampler,
        seed=seed,
        jobs=jobs,
        fixed=dict(fixed),
        remote=machine,
    )
    with Store(database or default_path()) as store:
        session = Session(request, store)
        if not as_json and session.provenance is Provenance.PREDICTED:
            click.echo(
                f"{request.device.title} is not this machine's device: times are PREDICTED by "
                "a cost model, none is measured.",
                err=True,
            )
        with SearchProgress(request.device, session.provenance) as progress:
            results = session.run(progress)
    if as_json:
        click.echo(json.dumps(result_data(request.device, session.provenance, results), indent=1))
    else:
        Console().print(results_table(results, request.device, session.provenance))
    if session.cancelled:
        raise click.exceptions.Exit(130)


def _connect(destination: str, device: Device | None, python: str) -> RemoteMachine:
    click.echo(f"connecting to {destination}", err=True)
    try:
        machine = find_machine(destination, device, python)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    click.echo(machine.describe(), err=True)
    return machine


@cli.command()
@_json
def devices(as_json: bool) -> None:
    """List the known devices, and say which is this machine's.

    \b
    Example:
      flashtune devices
    """
    here = {this_device(), this_cpu()}
    known = [*all_devices(), *sorted(here - set(all_devices()), key=lambda device: device.name)]
    if as_json:
        rows = [
            {
                "name": device.name,
                "title": device.title,
                "arch": device.arch,
                "sm_count": device.sm_count,
                "memory_bandwidth": device.memory_bandwidth,
                "l2_bytes": device.l2_bytes,
                "aliases": device.aliases,
                "source": device.source,
                "here": device in here,
            }
            for device in known
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    Console().print(devices_table(known, here))


@cli.command()
@click.option("--device", type=DEVICE, help="Only this device's records.")
@click.option("--shape", "problem", type=SHAPE, help="Only this shape's records.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@_database
@_json
def show(
    device: Device | None,
    problem: Problem | None,
    limit: int,
    database: Path | None,
    as_json: bool,
) -> None:
    """Show records, the fastest of each device and shape first.

    \b
    Example:
      flashtune show --device h200 --shape qwen3-vl-2b --limit 5
    """
    with Store(database or default_path(), read_only=True) as store:
        records = store.records(device=device.name if device else None, problem=problem)
    if as_json:
        click.echo(json.dumps([record.data() for record in records[:limit]], indent=1))
        return
    Console().print(records_table(records[:limit]))
    click.echo(f"{min(limit, len(records))} of {len(records)} records")


@cli.command()
@click.option("--device", type=DEVICE, required=True)
@click.option("--shape", "problem", type=SHAPE, required=True)
@_database
@_json
def best(device: Device, problem: Problem, database: Path | None, as_json: bool) -> None:
    """Show the best record of a shape on a device, of the database or a shipped table.

    \b
    Example:
      flashtune best --device h200 --shape qwen3-vl-2b --json
    """
    record = best_record(device, problem, database)
    if record is None:
        raise FlashtuneError(
            f"no record for {problem.describe()} on {device.name}: run `flashtune search`"
        )
    if as_json:
        click.echo(json.dumps(record.data(), indent=1))
    else:
        Console().print(records_table([record]))


@cli.command()
@click.option("--record", "key", help="The beginning of a record's key.")
@click.option("--device", type=DEVICE, help="With --shape: render the default config.")
@click.option("--shape", "problem", type=SHAPE)
@_database
def render(
    key: str | None, device: Device | None, problem: Problem | None, database: Path | None
) -> None:
    """Print the generated source of a record, or of the default config.

    \b
    Examples:
      flashtune render --record 3f2a
      flashtune render --device h200 --shape qwen3-vl-2b
    """
    if key is not None:
        with Store(database or default_path(), read_only=True) as store:
            record = store.get(key)
        device, problem = named_device(record.device), record.problem
        config = parse_config(record.config)
    elif device is not None and problem is not None:
        config = default_config(problem, device)
    else:
        raise click.UsageError("give --record, or --device and --shape")
    click.echo(backend_of(device).render(problem, config, device), nl=False)
