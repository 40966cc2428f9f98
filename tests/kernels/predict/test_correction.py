"""What a probe corrects: the model's constants, the device's bandwidth, and what was predicted."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from loaded import loaded

from flashtune.kernels.predict import correction
from flashtune.kernels.predict.correction import corrected, corrected_records, expected_figures
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.tuner.predict.calibration import SHIPPED, read_calibration
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.probe import Figures, Probe
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.table import prebuilt_table

ROOT = Path(__file__).parents[3]
ORIN = find_device("orin")
MODEL = shipped_model()
LATER = "2026-11-01T00:00:00Z"


def probe_of(figures: Figures, device: str = ORIN.name) -> Probe:
    return Probe(device=device, conditions={}, figures=figures, seconds=0.5, created=LATER)


def scaled(figures: Figures, **factors: float) -> Figures:
    values = asdict(figures)
    return Figures(**{**values, **{name: values[name] * each for name, each in factors.items()}})


def shipped(device: str) -> list[Record]:
    table = prebuilt_table(device)
    assert table is not None
    return list(table.records)


def test_what_is_as_expected_changes_nothing() -> None:
    model, device = corrected(MODEL, ORIN, expected_figures(MODEL, ORIN))
    assert device.memory_bandwidth == pytest.approx(ORIN.memory_bandwidth)
    for name, value in asdict(MODEL.constants).items():
        assert getattr(model.constants, name) == pytest.approx(value)
    assert corrected(MODEL, ORIN, Figures()) == (MODEL, ORIN)


@pytest.mark.parametrize(
    ("figure", "constants"),
    [
        ("launch_us", {"launch", "sort"}),
        ("overlapped_us", {"overlapped"}),
        ("load_us", {"load", "turn"}),
        ("barrier_us", {"barrier", "end", "arrival"}),
    ],
)
def test_each_figure_scales_what_it_stands_for(figure: str, constants: set[str]) -> None:
    measured = scaled(expected_figures(MODEL, ORIN), **{figure: 1.5})
    model, device = corrected(MODEL, ORIN, measured)
    before, after = asdict(MODEL.constants), asdict(model.constants)
    assert {name for name in before if after[name] != pytest.approx(before[name])} == constants
    assert all(after[name] == pytest.approx(1.5 * before[name]) for name in constants)
    assert device.memory_bandwidth == pytest.approx(ORIN.memory_bandwidth)


def test_by_a_reference_what_every_probe_misses_drops_out() -> None:
    h100 = find_device("h100")
    misses = {each.name: 1.3 for each in fields(Figures)}
    reference = probe_of(scaled(expected_figures(MODEL, h100), **misses), "nvidia-h100")
    measured = scaled(expected_figures(MODEL, ORIN), **misses)
    model, device = corrected(MODEL, ORIN, measured, reference)
    assert model.constants.launch == pytest.approx(MODEL.constants.launch)
    assert device.memory_bandwidth == pytest.approx(ORIN.memory_bandwidth)
    model, _ = corrected(MODEL, ORIN, scaled(measured, launch_us=0.5), reference)
    assert model.constants.launch == pytest.approx(MODEL.constants.launch / 2)


def test_a_reference_is_read_where_one_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "REFERENCE_FILE", tmp_path / "probe.json")
    correction.reference_probe.cache_clear()
    try:
        assert correction.reference_probe() is None
        correction.reference_probe.cache_clear()
        probe = probe_of(Figures(bandwidth=3e12, launch_us=1.0), "nvidia-h100")
        (tmp_path / "probe.json").write_text(json.dumps(probe.data()))
        assert correction.reference_probe() == probe
    finally:
        correction.reference_probe.cache_clear()


def test_half_the_bandwidth_makes_predictions_slower_and_says_so() -> None:
    records = shipped(ORIN.name)
    figures = scaled(expected_figures(MODEL, ORIN), bandwidth=0.5)
    found = corrected_records(records, ORIN, probe_of(figures))
    assert len(found) == len(records) > 100
    for before, after in zip(records, found, strict=True):
        assert (after.key, after.provenance) == (before.key, Provenance.CORRECTED)
        assert after.created == LATER
        ratio = (after.measurement.median_us or 0) / (before.measurement.median_us or 1)
        assert 1.0 < ratio <= 2.0
        assert (after.measurement.spread_us or 0) == pytest.approx(
            (before.measurement.spread_us or 0) * ratio
        )


def test_where_launches_cost_more_fewer_launches_are_ranked_first() -> None:
    name = "nvidia-a100"
    records = [each for each in shipped(name) if each.problem.n_tokens == 1]
    by_plan = {}
    for factor in (1.0, 4.0):
        figures = scaled(
            expected_figures(MODEL, find_device(name)), launch_us=factor, overlapped_us=factor
        )
        found = corrected_records(records, find_device(name), probe_of(figures, name))
        times: dict[str, float] = {}
        for each in found:
            plan = str(each.config["plan"])
            times[plan] = times.get(plan, 0.0) + (each.measurement.median_us or 0)
        by_plan[factor] = times["staged"] / times["persistent"]
    assert by_plan[4.0] > 1.05 * by_plan[1.0]


def test_what_is_measured_or_failed_is_left_as_it_is() -> None:
    measured = shipped("nvidia-h200")[0]
    [predicted] = shipped(ORIN.name)[:1]
    crash = replace(
        predicted.measurement, outcome=Outcome.CRASH, median_us=None, spread_us=None, error="x"
    )
    records = [measured, replace(predicted, measurement=crash)]
    records.append(replace(predicted, config={"plan": "staged", "of_another_version": 1}))
    probe = probe_of(scaled(expected_figures(MODEL, ORIN), bandwidth=0.5))
    assert corrected_records(records, ORIN, probe) == []


@pytest.fixture(scope="module")
def judged() -> Any:
    """How shortlists do where published figures are wrong by 30 %, and once a probe helped."""
    script = loaded(ROOT / "benchmarks" / "wrong_figures.py")
    calibration = read_calibration(SHIPPED)
    problems = script.by_problem(calibration)
    few = list(problems)[::3]
    kept = tuple(each for each in calibration.samples if each.problem in few)
    return list(script.results(replace(calibration, samples=kept), 0.3))


def test_figures_that_are_30_percent_wrong_are_set_right(judged: Any) -> None:
    (_, published), *rest = judged
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    assert len(pairs) == 4
    for _, (name, right) in pairs:
        assert name == "the same, corrected"
        assert right[1] <= 0.05, "the best of the shortlist"
        assert right[0] <= published[0] + 0.02, "the first choice is as good as ever"
        assert right[2] <= published[2] + 0.03, "and so are times"
    assert max(wrong[2] for (_, wrong), _ in pairs) > 3 * published[2]
