"""The fit finds what made the times, and never looks at what is held out."""

import builtins
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.predict.cost_model import read_model_file, shipped_model
from flashtune.tuner.predict.calibration import Calibration, Sample
from flashtune.tuner.predict.check import check_model, rank_correlation
from flashtune.tuner.predict.fit import (
    Fit,
    Samples,
    fit_constants,
    fit_model,
    intervals,
    read_fit,
    splits,
    write_fit,
)
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.record import Measurement, Outcome

SHAPES = ("qwen3-vl-2b", "qwen3-0.6b", "gemma-3-270m")
NOISE = 0.02  # of log time


@pytest.fixture(scope="module")
def h200() -> Device:
    return find_device("h200")


@pytest.fixture(scope="module")
def made_up(h200: Device) -> Calibration:
    """Times that a model like the shipped one, but twice as slow to launch, would measure."""
    truth = shipped_model()
    constants = replace(truth.constants, overlapped=2 * truth.constants.overlapped)
    slow = replace(truth, constants=constants)
    generator = random.Random(1)
    samples = []
    for shape in SHAPES:
        problem = parse_shape(shape)
        space = Space(problem, h200, {"plan": "staged", "selection": "threshold"})
        configs: list[Config] = [StagedConfig(pdl=True, score_block=512, gather_block=512)]
        while len(configs) < 60:
            configs.append(generator.choice(space.neighbours(generator.choice(configs))))
        for config in configs:
            candidate = Candidate(problem, config, h200)
            uses = tuple(candidate.launches)
            time_us = slow.predict(candidate, uses).time_us
            time_us *= float(np.exp(generator.gauss(0, NOISE)))
            samples.append(
                Sample(
                    problem=problem,
                    config=config,
                    uses=uses,
                    measurement=Measurement(outcome=Outcome.OK, median_us=time_us, samples=10),
                )
            )
    return Calibration(device="nvidia-h200", toolchain=Toolchain(), samples=tuple(samples))


@pytest.fixture(scope="module")
def fitted(made_up: Calibration, h200: Device) -> Fit:
    return fit_model(made_up, h200)


def test_it_predicts_shapes_that_it_never_saw(
    fitted: Fit, made_up: Calibration, h200: Device
) -> None:
    report = check_model(fitted, made_up, h200)
    assert [split.held_out for split in report.splits] == list(splits(SHAPES))
    singles = [split for split in report.splits if len(split.held_out) == 1]
    for split in singles:  # those without pairs are fitted to a single shape
        assert split.rank_correlation > 0.85
        assert split.loss < 4 * NOISE
    assert 0.5 < np.mean([split.inside for split in singles]) < 0.98


def test_what_is_held_out_has_no_say(made_up: Calibration, h200: Device) -> None:
    samples = Samples(made_up.samples, h200)
    changed = [
        replace(each, measurement=replace(each.measurement, median_us=1.0))
        if each.problem == parse_shape(SHAPES[0])
        else each
        for each in made_up.samples
    ]
    held = (SHAPES[0],)
    without = [Samples(each, h200).without(held) for each in (samples.samples, changed)]
    one, other = (fit_constants(each) for each in without)
    assert one == other != fit_constants(Samples(changed, h200))


def test_the_file_goes_round(fitted: Fit, tmp_path: Path) -> None:
    path = tmp_path / "cost-model.json"
    write_fit(path, fitted)
    assert read_fit(read_model_file(path)) == fitted


def test_a_model_of_another_calibration_is_not_checked(
    fitted: Fit, made_up: Calibration, h200: Device
) -> None:
    other = replace(made_up, samples=made_up.samples[1:])
    with pytest.raises(FlashtuneError, match="another calibration"):
        check_model(fitted, other, h200)


def test_intervals_hold_four_fifths_and_skip_rare_families(
    made_up: Calibration, h200: Device
) -> None:
    samples = Samples(made_up.samples, h200)
    misses = np.linspace(-1, 1, len(samples.samples))
    [(family, (low, high))] = intervals(samples, misses).items()
    assert family == "staged/threshold"
    assert np.log([low, high]) == pytest.approx([-0.8, 0.8], abs=0.01)
    few = Samples(made_up.samples[:29], h200)
    with pytest.raises(FlashtuneError, match="measure more"):
        intervals(few, misses[:29])


def test_a_single_shape_cannot_be_held_out(made_up: Calibration, h200: Device) -> None:
    alone = replace(made_up, samples=made_up.samples[:60])
    with pytest.raises(FlashtuneError, match="at least two shapes"):
        fit_model(alone, h200)


def test_without_scipy_it_says_what_to_install(
    made_up: Calibration, h200: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Mapping[str, Any]) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FlashtuneError, match=r"install flashtune\[gp\]"):
        fit_constants(Samples(made_up.samples, h200))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 3 / 10**0.5),
    ],
)
def test_rank_correlation(one: Sequence[float], other: Sequence[float], expected: float) -> None:
    assert rank_correlation(one, other) == pytest.approx(expected)
