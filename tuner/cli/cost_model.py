"""`flashtune model`: calibrate, fit and check the cost model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flashtune.kernels.backends.host import named_device
from flashtune.tuner.predict.calibration import (
    CALIBRATIONS,
    calibrate,
    read_calibration,
    write_calibration,
)
from flashtune.tuner.predict.check import (
    LEAST_CORRELATION,
    MOST_ERROR,
    MOST_LOSS,
    SHORTLIST,
    Report,
    check_model,
)
from flashtune.tuner.predict.cost_model import MODEL_FILE, read_model_file
from flashtune.tuner.predict.fit import fit_model, read_fit, write_fit
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuning_db.store import Store

_FILE = click.Path(dir_okay=False, path_type=Path)
_calibration = click.option(
    "--calibration", type=_FILE, help="The calibration; else the H200's, which ships."
)
_SHIPPED = CALIBRATIONS / "nvidia-h200.json.gz"


@click.group()
def model() -> None:
    """Calibrate, fit and check the cost model that predicts times.

    \b
    Example:
      flashtune model check
    """


@model.command("calibrate")
@click.option("--device", "name", required=True, help="The device whose records to take.")
@click.option("--output", type=_FILE, required=True, help="The file to write.")
@click.option(
    "--db",
    "databases",
    type=_FILE,
    multiple=True,
    required=True,
    help="A database; may be given several times. Of one config's records the first counts.",
)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True)
def calibrate_(name: str, output: Path, databases: tuple[Path, ...], jobs: int) -> None:
    """Compile measured configs and keep their times with what their kernels need.

    Compiled kernels stay in Triton's cache: after Ctrl-C the same command is quick to come back
    to where it was.

    \b
    Example:
      flashtune model calibrate --device h200 --db tuning.db --output nvidia-h200.json.gz
    """
    device = named_device(name)
    records = []
    for database in databases:
        with Store(database, read_only=True) as store:
            records += store.records(device=device.name)
    with WorkerPool(jobs) as pool, _progress("compiling") as on_compiled:
        calibration = calibrate(records, device, pool, on_compiled)
    write_calibration(output, calibration)
    click.echo(f"{output}: {len(calibration.samples)} of {len(records)} records of {device.name}")


@model.command()
@_calibration
@click.option("--output", type=_FILE, required=True, help="The file to write.")
def fit(calibration: Path | None, output: Path) -> None:
    """Fit the model's constants to a calibration, and again without some of its shapes.

    \b
    Example:
      flashtune model fit --output cost-model.json
    """
    found = read_calibration(calibration or _SHIPPED)
    with _progress("fitting") as on_fit:
        fitted = fit_model(found, named_device(found.device), on_fit)
    write_fit(output, fitted)
    click.echo(f"{output}: fitted to {len(found.samples)} records of {found.device}")


@model.command()
@_calibration
@click.option("--model", "file", type=_FILE, help="A model's file; else the one that ships.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def check(calibration: Path | None, file: Path | None, as_json: bool) -> None:
    """Check the model on shapes that it never saw, and on published times of other devices.

    Prints how predictions are ranked, how much is lost by trusting them, how often measurements
    lie in their interval, and how far published times are off. Compiles and fits nothing.

    \b
    Example:
      flashtune model check --json
    """
    found = read_calibration(calibration or _SHIPPED)
    fitted = read_fit(read_model_file(file or MODEL_FILE))
    report = check_model(fitted, found, named_device(found.device))
    if as_json:
        click.echo(json.dumps(report.data(), indent=1))
        return
    console = Console()
    console.print(splits_table(report), problems_table(report), figures_table(report))
    click.echo("\n".join(verdicts(report)))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; its `(done, total)` is told how far things are."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left")
    return table


def splits_table(report: Report) -> Table:
    """A line for each set of shapes held out."""
    table = _table(
        f"{report.device}: {report.samples} measured configs, shapes held out of the fit",
        "held out",
        "rank correlation",
        f"best of {SHORTLIST}",
        "in the 80 % interval",
    )
    for split in report.splits:
        table.add_row(
            " + ".join(split.held_out) + (" *" if split is report.headline else ""),
            f"{split.rank_correlation:.2f}",
            f"+{split.loss:.1%}",
            f"{split.inside:.0%}",
        )
    return table


def problems_table(report: Report) -> Table:
    """A line for each problem of the split that was fixed beforehand."""
    table = _table(
        "* fixed beforehand",
        "problem",
        "configs",
        "rank correlation",
        f"best of {SHORTLIST}",
        "in the interval",
    )
    for each in report.headline.results:
        table.add_row(
            each.problem.describe(),
            str(each.samples),
            f"{each.rank_correlation:.2f}",
            f"+{each.loss:.1%}",
            f"{each.inside:.0%}",
        )
    return table


def figures_table(report: Report) -> Table:
    """A line for each published time and number of probes."""
    table = _table(
        "published times of other devices, microseconds",
        "device",
        "step",
        "probes",
        "published",
        "predicted",
        "error",
    )
    for each in report.figures:
        table.add_row(
            each.device,
            "fused gather" if each.fused else "framework",
            str(each.n_probes),
            f"{each.published_us:.0f}",
            f"{each.predicted_us:.0f}",
            f"{each.error:+.0%}",
        )
    return table


def verdicts(report: Report) -> list[str]:
    """What was asked of the model, and whether it holds."""
    passed: dict[str, Any] = report.data()["passed"]
    asked = [
        (f"rank correlation of at least {LEAST_CORRELATION}", passed["rank_correlation"]),
        (f"best of {SHORTLIST} within {MOST_LOSS:.0%}", passed["loss"]),
        *(
            (f"published times within {MOST_ERROR:.0%} at {probes} probes", holds)
            for probes, holds in passed["error"].items()
        ),
    ]
    return [f"{'passed' if holds else 'FAILED'}: {what}" for what, holds in asked]
