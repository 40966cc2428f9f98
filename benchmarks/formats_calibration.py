"""Turns results of `screens.py` into a calibration file, which `flashtune model check` predicts.

    python benchmarks/formats_calibration.py RESULT… --out FILE

Every row of ours that was timed alone becomes a sample: its problem, its config, and the resources
of its kernels, compiled here for the results' device. Nothing is fitted to the file.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.plans.candidate import PLANS
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.plans.knob import knobs
from flashtune.tuner.predict.calibration import calibrate, write_calibration
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.transport import here
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import (
    ConfigData,
    Measurement,
    Outcome,
    Provenance,
    Record,
)

_PROBLEM = re.compile(r"(\d+)x(\d+) c(\d+) p(\d+)(?: t(\d+))?")


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a row: its shape, as in `Problem.describe`, in its contender's formats."""
    found = _PROBLEM.fullmatch(row["problem"])
    if found is None:
        raise FlashtuneError(f"no problem: {row['problem']!r}")
    keys = ("vocab", "hidden", "clusters", "probes", "tokens")
    sizes = zip(keys, found.groups(default="1"), strict=True)
    plain = parse_shape(",".join(f"{key}={size}" for key, size in sizes))
    if row["contender"] == "16-bit in place":
        return replace(plain, in_place=True)
    kind, _, name = row["contender"].partition(" ")
    if kind == "dense":
        return Screen.parse(f"{name}:0").problem(plain)
    return Screen.parse(name).problem(plain) if kind == "screen" else plain


def config_of(text: str) -> ConfigData:
    """A config as `short_config` writes it: the plan, and the knobs that differ."""
    plan, *pairs = text.split()
    known = knobs(PLANS[plan].config)
    values = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        values[name] = next(each for each in known[name]["choices"] if str(each) == value)
    return config_data(PLANS[plan].config(**values))


def records_of(results: Sequence[Path]) -> Iterator[Record]:
    """The rows of ours that were timed."""
    for path in results:
        data = json.loads(path.read_text("utf-8"))
        device = find_device(data["device"])
        for row in data["rows"]:
            if not row["config"] or row["alone_us"] is None:
                continue
            yield Record(
                device=device.name,
                toolchain=Toolchain(triton=toolchain(device).triton),
                problem=problem_of(row),
                config=config_of(row["config"]),
                provenance=Provenance.MEASURED,
                measurement=Measurement(
                    outcome=Outcome.OK, median_us=row["alone_us"], spread_us=0.0, policy="screens"
                ),
                created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )


@click.command()
@click.argument(
    "results",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(results: Sequence[Path], out: Path) -> None:
    """Compile the configs of the results and write the file."""
    records = list(records_of(results))
    with WorkerPool(here(1)) as pool:
        calibration = calibrate(records, find_device(records[0].device), pool)
    write_calibration(out, calibration)
    click.echo(f"{out}: {len(calibration.samples)} of {len(records)} rows")


if __name__ == "__main__":
    main()
