"""How well a probe corrects wrong published figures of a device, judged by measured configs.

    python benchmarks/wrong_figures.py [--calibration FILE] [--off 0.3]

Pretends that the bandwidth and the costs of launches and barriers of the measured device were off
by this share, up or down; ranks its measured configs by the model with these figures, and by the
model as a probe corrects it. The probe is simulated: it finds the device's figures, off by noise
and by as much as a reference probe is. Nothing runs on a device.
"""

import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import click

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.predict.correction import STANDS_FOR, corrected, expected_figures
from flashtune.kernels.predict.cost_model import CostModel, shipped_model
from flashtune.tuner.predict.calibration import SHIPPED, Calibration, Sample, read_calibration
from flashtune.tuner.predict.check import losses
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.probe import Figures, Probe
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.shortlist import MOST, near_of

NOISE = 0.05  # of a simulated probe's figures, up or down
MISSES = 1.2  # factor by which every probe exceeds the constants, the reference's too
Judged = tuple[float, float, float]
ON_CHIP = ("launch_us", "overlapped_us", "barrier_us")


def by_problem(calibration: Calibration) -> dict[Problem, list[Sample]]:
    """The samples of each problem."""
    found = defaultdict(list)
    for sample in calibration.samples:
        found[sample.problem].append(sample)
    return dict(found)


def judged(problems: dict[Problem, list[Sample]], model: CostModel, device: Device) -> Judged:
    """How much slower the first choice and the best of the shortlist are than the best of all.

    As measured, at the worst problem; and the median error of times.
    """
    first, best, errors = [], [], []
    for samples in problems.values():
        guesses = [
            model.predict(Candidate(each.problem, each.config, device), each.uses).time_us
            for each in samples
        ]
        times = [each.time_us for each in samples]
        configs = [config_data(each.config) for each in samples]
        found = losses(guesses, times, configs, near=near_of(device.name))
        first.append(found[0])
        best.append(found[1])
        errors += [abs(guess / time - 1) for guess, time in zip(guesses, times, strict=True)]
    return max(first), max(best), statistics.median(errors)


def wrong(
    model: CostModel, device: Device, bandwidth: float, on_chip: float
) -> tuple[CostModel, Device]:
    """The model and the device with figures that are wrong by these factors."""
    names = [name for figure in ON_CHIP for name in STANDS_FOR[figure]]
    constants = {name: getattr(model.constants, name) * on_chip for name in names}
    return (
        replace(model, constants=replace(model.constants, **constants)),
        replace(device, memory_bandwidth=device.memory_bandwidth * bandwidth),
    )


def probed(truth: Figures, generator: random.Random, noise: float) -> Figures:
    """The figures that a simulated probe finds."""
    found = {
        each.name: getattr(truth, each.name) * MISSES * (1 + noise * generator.uniform(-1, 1))
        for each in fields(Figures)
    }
    return Figures(**found)


def cases(off: float) -> Iterator[tuple[float, float]]:
    """Factors of bandwidth and on-chip costs."""
    yield from itertools.product((1 - off, 1 + off), repeat=2)


def results(calibration: Calibration, off: float) -> Iterator[tuple[str, Judged]]:
    """Each case with its result.

    The reference is a device for which the model's constants are correct.
    """
    model, device = shipped_model(), find_device(calibration.device)
    problems = by_problem(calibration)
    truth = expected_figures(model, device)
    yield "published figures", judged(problems, model, device)
    generator = random.Random(0)
    for bandwidth, on_chip in cases(off):
        name = f"bandwidth x {bandwidth:.1f}, launches and barriers x {on_chip:.1f}"
        wrong_model, wrong_device = wrong(model, device, bandwidth, on_chip)
        yield name, judged(problems, wrong_model, wrong_device)
        reference = Probe(
            device=device.name,
            conditions={},
            figures=probed(expected_figures(wrong_model, device), generator, 0.0),
            seconds=0.0,
            created="2026-01-01T00:00:00Z",
        )
        measured = probed(truth, generator, NOISE)
        set_right = corrected(wrong_model, wrong_device, measured, reference)
        yield "the same, corrected", judged(problems, *set_right)


@click.command()
@click.option("--calibration", type=click.Path(dir_okay=False, path_type=Path), default=None)
@click.option("--off", type=click.FloatRange(0, 0.9), default=0.3, show_default=True)
def main(calibration: Path | None, off: float) -> None:
    """Print a table in Markdown."""
    found = read_calibration(calibration or SHIPPED)
    click.echo(f"{found.device}: {len(found.samples)} measured configs; a simulated probe\n")
    click.echo(f"| figures | first choice | best of {MOST} | median error of times |")
    click.echo("|---|---|---|---|")
    for name, (first, best, error) in results(found, off):
        click.echo(f"| {name} | +{first:.1%} | +{best:.1%} | {error:.0%} |")


if __name__ == "__main__":
    main()
