"""Predicted tables for absent devices: shortlists for the presets.

    python benchmarks/predicted_tables.py FOLDER [--device NAME]… [--preset NAME]… --db FILE

For each registered GPU without measured records, each preset and 256 and 512 probes, the cost
model ranks the space with estimated resources; the most promising configs are cross-compiled and
predicted with their actual resources, and the shortlist of the best is written to FOLDER. The same
is done for the usual screens, at each preset's own number of probes and with fewer configs.
Problems with predictions of this model in the database are skipped, so that an interrupted run can
continue. To predict only problems that a shipped table lacks, first import it (`flashtune tables
import`).
"""

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import click

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.predict.cost_model import VERSION, shipped_model
from flashtune.tuner.cli.options import DEVICE, SHAPE
from flashtune.tuner.predict.calibration import CALIBRATIONS, read_calibration
from flashtune.tuner.search.evaluate import PredictingEvaluator
from flashtune.tuner.search.ranking import promising
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.transport import here
from flashtune.tuning_db.device import Device, Toolchain, all_devices
from flashtune.tuning_db.problem import PRESETS, Problem, parse_shape
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table, table_from_store, write_table

PROBES = (256, 512)
SCREENS = ("int8", "int4/int8", "int4")
SCREENED_PROBES = {"gemma-3-1b": 512, "gemma-3-270m": 512}  # for the others, the first of PROBES
NEAR = 40  # measured configs of the same problem, from the calibration


def plain_problems(presets: Sequence[str]) -> list[Problem]:
    """The 16-bit heads."""
    return [parse_shape(f"{preset},probes={probes}") for preset in presets for probes in PROBES]


def screened_problems(presets: Sequence[str]) -> list[Problem]:
    """The heads with a screen."""
    plain = [
        parse_shape(f"{preset},probes={SCREENED_PROBES.get(preset, PROBES[0])}")
        for preset in presets
    ]
    return [Screen.parse(screen).problem(problem) for problem in plain for screen in SCREENS]


def is_measured(device: Device) -> bool:
    """Whether the device's shipped table was measured."""
    table = prebuilt_table(device.name)
    records = table.records if table else ()
    return any(record.provenance is Provenance.MEASURED for record in records)


def measured_near(problem: Problem) -> list[Config]:
    """The fastest configs for this problem on the calibration's device."""
    samples = [
        sample
        for path in CALIBRATIONS.iterdir()
        if path.name.endswith(".json.gz")
        for sample in read_calibration(path).samples
        if sample.problem == problem
    ]
    return [sample.config for sample in sorted(samples, key=lambda each: each.time_us)[:NEAR]]


def predict_problem(
    problem: Problem,
    device: Device,
    tools: Toolchain,
    near: Sequence[Config],
    compilers: WorkerPool,
    store: Store,
    most: int,
) -> int:
    """Predict the promising configs of one problem; returns how many of them work."""
    space = Space(problem, device)
    wanted = promising(space, shipped_model(), most=most, seed=0, near=near)
    working = 0
    for evaluation in PredictingEvaluator(problem, device, compilers).each(wanted):
        working += evaluation.measurement.outcome is Outcome.OK
        store.add(
            Record(
                device=device.name,
                toolchain=tools,
                problem=problem,
                config=config_data(evaluation.config),
                provenance=Provenance.PREDICTED,
                measurement=evaluation.measurement,
                created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
        )
    return working


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--device", "devices", type=DEVICE, multiple=True, help="Else all but measured ones."
)
@click.option("--preset", "presets", type=click.Choice(list(PRESETS)), multiple=True)
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="Instead of presets.")
@click.option("--db", "database", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--most", default=12, help="Configs to compile for each 16-bit problem.")
@click.option("--most-screened", default=5, help="Configs to compile for each with a screen.")
@click.option("--jobs", default=len(os.sched_getaffinity(0)), help="Compilers at a time.")
def main(
    folder: Path,
    devices: Sequence[Device],
    presets: Sequence[str],
    shapes: Sequence[Problem],
    database: Path,
    most: int,
    most_screened: int,
    jobs: int,
) -> None:
    """Predict and write the tables of devices that are not here."""
    others = [each for each in all_devices() if not is_measured(each)]
    presets = presets or list(PRESETS)
    wanted = {problem: most for problem in shapes or plain_problems(presets)}
    if not shapes:
        wanted |= {problem: most_screened for problem in screened_problems(presets)}
    near = {problem: measured_near(problem) for problem in wanted}
    start = time.monotonic()
    with Store(database) as store, WorkerPool(here(jobs)) as compilers:
        for device in devices or others:
            tools = Toolchain(triton=toolchain(device).triton)
            for problem, number in wanted.items():
                known = store.records(device=device.name, toolchain=tools, problem=problem)
                if not any(each.measurement.policy == VERSION for each in known):
                    working = predict_problem(
                        problem, device, tools, near[problem], compilers, store, number
                    )
                    spent = time.monotonic() - start
                    what = f"{device.name} {problem.describe()}"
                    click.echo(f"{what}: {working} predicted, {spent:.0f} s", err=True)
                    if not working:  # this Triton may not know the architecture
                        break
            table = table_from_store(store, device.name)
            if table.records:
                write_table(folder / f"{device.name}.json", table)
            click.echo(f"{device.name}: {len(table.records)} records")


if __name__ == "__main__":
    main()
