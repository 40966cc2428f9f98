"""`flashtune model`: calibrate, fit and check the cost model."""

from pathlib import Path

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import say, say_json
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.store import Store

_calibration = click.option(
    "--calibration",
    type=options.FILE,
    help="The calibration. Default: the shipped one, of the H200.",
)
FAILED = 1


@click.group()
def model() -> None:
    """Calibrate, fit and check the cost model that predicts times.

    \b
    Example:
      flashtune model check
    """


@model.command("calibrate")
@options.device("The device whose records to use.", required=True)
@options.out("The file to write.")
@options.databases
@click.option(
    "--add-to",
    "known",
    type=options.FILE,
    help="A calibration of this device: its configs are kept, and not compiled again.",
)
@options.jobs
def calibrate_(
    device: Device, out: Path, databases: tuple[Path, ...], known: Path | None, jobs: int
) -> None:
    """Compile measured configs, and write their times and their kernels' resource use to a file.

    Compiled kernels stay in Triton's cache, so after Ctrl-C the same command quickly gets back to
    where it was.

    \b
    Example:
      flashtune model calibrate --device h200 --db tuning.db --out nvidia-h200.json.gz
    """
    from flashtune.tuner.predict.calibration import (
        calibrate,
        read_calibration,
        write_calibration,
    )
    from flashtune.tuner.progress import StepProgress
    from flashtune.tuner.workers.pool import WorkerPool
    from flashtune.tuner.workers.transport import here

    added = read_calibration(known) if known else None
    records = []
    for database in databases:
        with Store(database, read_only=True) as store:
            records += store.records(device=device.name)
    with WorkerPool(here(jobs)) as pool, StepProgress("compiling", len(records)) as progress:
        calibration = calibrate(records, device, pool, progress.show_of, added)
    write_calibration(out, calibration)
    source = f"{len(records)} records" + (f" and {known}" if known else "")
    say(f"{out}: {len(calibration.samples)} configs of {device.name}, from {source}")


@model.command()
@_calibration
@options.out("The file to write.")
def fit(calibration: Path | None, out: Path) -> None:
    """Fit the model's constants to a calibration, and again with some shapes held out.

    \b
    Example:
      flashtune model fit --out cost-model.json
    """
    from flashtune.tuner.here import device_named
    from flashtune.tuner.predict.calibration import SHIPPED, read_calibration
    from flashtune.tuner.predict.fit import fit_model, write_fit
    from flashtune.tuner.progress import StepProgress

    found = read_calibration(calibration or SHIPPED)
    with StepProgress("fitting") as progress:
        fitted = fit_model(found, device_named(found.device), progress.show_of)
    write_fit(out, fitted)
    say(f"{out}: fitted to {len(found.samples)} records of {found.device}")


@model.command()
@_calibration
@click.option(
    "--cost-model",
    "file",
    cls=options.Option,
    old=("--model",),
    type=options.FILE,
    help="What `flashtune model fit` wrote. Default: the shipped model.",
)
@options.as_json
def check(calibration: Path | None, file: Path | None, as_json: bool) -> None:
    """Check the model on shapes that it never saw, and on other devices and formats.

    Prints how well predictions rank configs, how much time is lost by trusting them, how often
    measurements lie in their interval, and how far off published times are, and times of formats
    and plans that no fit has seen. Compiles and fits nothing. The exit code is 1 if a check fails.

    \b
    Example:
      flashtune model check --json
    """
    from flashtune.kernels.predict.cost_model import MODEL_FILE, read_model_file
    from flashtune.tuner.cli.cost_model_report import print_report, verdicts
    from flashtune.tuner.here import device_named
    from flashtune.tuner.predict.calibration import SHIPPED, read_calibration
    from flashtune.tuner.predict.check import check_model
    from flashtune.tuner.predict.fit import read_fit

    found = read_calibration(calibration or SHIPPED)
    fitted = read_fit(read_model_file(file or MODEL_FILE))
    report = check_model(fitted, found, device_named(found.device))
    if as_json:
        say_json(report.data())
    else:
        print_report(report)
    if not all(holds for _, holds in verdicts(report)):
        raise click.exceptions.Exit(FAILED)
