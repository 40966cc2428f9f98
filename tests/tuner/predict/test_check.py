"""The model that ships: what is said of it is what its check finds."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.predict.cost_model import MODEL_FILE, VERSION, CostModel, read_model_file
from flashtune.tuner.cli.main import cli
from flashtune.tuner.predict.calibration import CALIBRATIONS, read_calibration
from flashtune.tuner.predict.check import MOST_ERROR, MOST_LOSS, Report, check_model
from flashtune.tuner.predict.fit import (
    Samples,
    fit_constants,
    held_out_misses,
    intervals,
    read_fit,
    rounded,
)
from flashtune.tuner.predict.published import (
    FIGURES,
    PROBES,
    published_prediction,
    published_rates,
)
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.evidence import published_evidence, why_less_trusted
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.shortlist import NEAR_FITTED, shortlisted
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table

DOCUMENT = Path(__file__).parents[3] / "docs" / "cost-model.md"


@pytest.fixture(scope="module")
def report() -> Report:
    calibration = read_calibration(CALIBRATIONS / "nvidia-h200.json.gz")
    fit = read_fit(read_model_file(MODEL_FILE))
    return check_model(fit, calibration, find_device("h200"))


def test_the_document_has_the_checks_tables(report: Report) -> None:
    text = DOCUMENT.read_text("utf-8")
    rows = [
        f"| {' + '.join(split.held_out)}{' *' if split is report.headline else ''} "
        f"| {split.rank_correlation:.2f} | +{split.loss:.1%} | {split.inside:.0%} |"
        for split in report.splits
    ]
    rows += [
        f"| {each.problem.describe()} | {each.samples} | {each.rank_correlation:.2f} "
        f"| +{each.first:.1%} | +{each.loss:.1%} | {each.inside:.0%} | {each.error:+.0%} |"
        for results in (report.headline, *report.cards)
        for each in results.results
    ]
    rows += [
        f"| {each.device} | {'fused gather' if each.fused else 'framework'} | {each.n_probes} "
        f"| {each.published_us:.0f} | {each.predicted_us:.0f} | {each.error:+.0%} |"
        for each in report.figures
    ]
    rows += [
        f"| {each.device} | {each.model} | {each.body} | {each.published_us:.0f} "
        f"| {each.rounding:.0%} | {each.predicted_us:.0f} | {each.error:+.0%} "
        f"| {each.fewer_probes_error:+.0%} |"
        for each in report.rates
    ]
    rows += [
        f"| {each.device} | {each.problem.describe()} | {each.plan} | {each.measured_us:.1f} "
        f"| {each.predicted_us:.1f} | {each.error:+.0%} | {'yes' if each.inside else 'no'} |"
        for each in report.formats
    ]
    assert [row for row in rows if row not in text] == []
    assert f"holds {report.samples:,} measured" in text


def test_formats_and_streamed_are_checked_on_what_was_measured(report: Report) -> None:
    assert {"streamed", "batched", "dense"} <= {each.plan for each in report.formats}
    assert {"int8", "int4"} <= {each.problem.weight_dtype for each in report.formats}
    assert {each.device for each in report.formats} == {"nvidia-h100"}
    for each in report.formats:
        assert each.error == pytest.approx(each.predicted_us / each.measured_us - 1)


def test_another_devices_configs_are_ranked_by_a_fit_that_never_saw_it(report: Report) -> None:
    card, _ = report.cards
    assert (report.device, card.device) == ("nvidia-h200", "nvidia-h100")
    shapes = {each.shape for each in card.results}
    assert shapes - {shape for split in report.splits for shape in split.held_out} == {
        "llama-3.1-8b", "cosmos-reason2-8b", "cosmos-reason2-32b",
        "qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b",
    }, "shapes that no fit has seen on any device"  # fmt: skip
    calibration = read_calibration(CALIBRATIONS / "nvidia-h100.json.gz")
    fit, device = read_fit(read_model_file(MODEL_FILE)), find_device("h100")
    result = next(each for each in card.results if each.problem.describe().endswith("p256"))
    own = [each for each in calibration.samples if each.problem == result.problem]
    found = [
        fit.model.predict(Candidate(each.problem, each.config, device), each.uses)
        for each in own
    ]  # fmt: skip
    times = [each.time_us for each in own]
    guesses, configs = [each.time_us for each in found], [config_data(each.config) for each in own]
    at = shortlisted(guesses, configs, near=NEAR_FITTED)
    assert result.loss == pytest.approx(min(times[one] for one in at) / min(times) - 1)
    assert result.first == pytest.approx(times[at[0]] / min(times) - 1)
    inside = [each.low_us <= time <= each.high_us for each, time in zip(found, times, strict=True)]
    assert result.inside == pytest.approx(sum(inside) / len(inside))
    assert result.samples == len(own) and result.loss <= result.first
    assert report.data()["passed"]["cards"]["nvidia-h100"] == (card.loss <= MOST_LOSS)


def test_what_was_measured_since_the_fit_is_checked(report: Report) -> None:
    _, later = report.cards
    assert (later.device, later.records) == (report.device, "nvidia-h200-later")
    fitted = read_calibration(CALIBRATIONS / "nvidia-h200.json.gz")
    assert not {each.problem for each in later.results} & {each.problem for each in fitted.samples}
    assert "int4" in {each.problem.weight_dtype for each in later.results}
    assert report.data()["passed"]["cards"]["nvidia-h200-later"] == (later.loss <= MOST_LOSS)


def test_the_document_has_the_constants() -> None:
    text = DOCUMENT.read_text("utf-8")
    constants = read_model_file(MODEL_FILE)["model"]["constants"]
    rows = [f"| `{name}` | {value} |" for name, value in constants.items()]
    assert [row for row in rows if row not in text] == []


def test_the_constants_are_those_of_the_fit(report: Report) -> None:
    # Solvers differ in the last digits: what counts is what the constants say.
    calibration = read_calibration(CALIBRATIONS / "nvidia-h200.json.gz")
    samples = Samples(calibration.samples, find_device("h200"))
    held = report.headline.held_out
    fit = read_fit(read_model_file(MODEL_FILE))
    again = fit_constants(samples.without(held), fit.model.constants)
    shipped, fresh = (samples.log_predictions(each) for each in (fit.held_out[held], again))
    assert abs(shipped - fresh).max() < 0.01
    singles = {shapes[0]: each for shapes, each in fit.held_out.items() if len(shapes) == 1}
    assert fit.model.intervals == intervals(samples, held_out_misses(samples, singles))
    assert rounded(fit.model.constants) == fit.model.constants


def test_published_times_are_met_at_a_model_folders_probes() -> None:
    # Ranks on one device would not show a clock or a bandwidth that is taken twice.
    model = CostModel.from_json(read_model_file(MODEL_FILE)["model"])
    for figure in FIGURES:
        predicted_us = published_prediction(model, figure, PROBES[-1]).time_us
        assert abs(predicted_us / figure.time_us - 1) < MOST_ERROR


def test_every_published_rate_is_a_saving_that_nothing_was_fitted_to(report: Report) -> None:
    assert len(report.rates) == 23
    orin = [each for each in report.rates if each.device == "agx-orin"]
    assert len(orin) == 5
    assert max(abs(each.error) for each in orin) < 0.08
    assert min(each.fewer_probes_error for each in orin) > 0.14, "fewer probes fit worse"
    [whole] = [
        each for each in published_rates()
        if (each.device, each.model, each.body) == ("rtx-3500-ada", "llama-3.2-3b", "bf16")
    ]  # fmt: skip
    assert whole.saved_us == pytest.approx(1e6 / 54 - 1e6 / 58)
    assert whole.rounding == pytest.approx((1e6 / 53.5 - 1e6 / 58.5) / (1e6 / 54 - 1e6 / 58) - 1)
    assert whole.problem.n_probes == 501 and whole.with_default_probes.n_probes == 256


def test_what_is_said_of_devices_is_what_the_check_finds(report: Report) -> None:
    assert published_evidence() == report.evidence
    less = {name for name, each in report.evidence.items() if each.less_trusted}
    assert less == {"agx-thor"}
    assert why_less_trusted("agx-thor") == report.evidence["agx-thor"].describe()
    assert why_less_trusted("agx-orin") == why_less_trusted("nvidia-l4") == ""
    rate = replace(report.rates[0], published_us=100.0, predicted_us=150.0, rounding=0.6)
    assert not rate.missed, "rounding explains it"
    assert replace(rate, rounding=0.4).missed and not replace(rate, predicted_us=134.0).missed


def test_json_is_the_report(report: Report) -> None:
    result = CliRunner().invoke(cli, ["model", "check", "--json"])
    assert result.exit_code == 1, "one of the checks fails"
    assert json.loads(result.stdout) == json.loads(json.dumps(report.data()))


def test_people_are_told_what_passed(report: Report) -> None:
    result = CliRunner().invoke(cli, ["model", "check"])
    assert result.exit_code == 1, "one of the checks fails"
    passed = report.data()["passed"]
    verdicts = [
        line for line in result.stdout.splitlines() if line.startswith(("passed: ", "FAIL"))
    ]
    asked = [passed["rank_correlation"], passed["loss"], *passed["error"].values()]
    asked += passed["cards"].values()
    assert [line.startswith("passed") for line in verdicts] == asked
    assert not all(asked)


def test_where_every_check_passes_the_exit_code_is_0(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = SimpleNamespace(
        data=lambda: {"passed": {"rank_correlation": True, "loss": True, "error": {}}}, cards=()
    )
    monkeypatch.setattr("flashtune.tuner.predict.check.check_model", lambda *_: passing)
    assert CliRunner().invoke(cli, ["model", "check", "--json"]).exit_code == 0


@pytest.mark.parametrize("option", ["--cost-model", "--model", "--calibration"])
def test_a_file_that_is_not_there_is_one_line(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["model", "check", option, str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: cannot read the c")


@pytest.mark.parametrize("text", ["[" * 10**5, "null", "[]", '{"version": NaN}', "9" * 5000])
def test_what_is_no_cost_model_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(FlashtuneError, match="flashtune model fit"):
        read_model_file(tmp_path / "model.json")


@pytest.mark.parametrize("name", prebuilt_devices())
def test_predictions_that_ship_are_of_this_model(name: str) -> None:
    table = prebuilt_table(name)
    assert table is not None
    predicted = [each for each in table.records if each.provenance is Provenance.PREDICTED]
    for measurement in (record.measurement for record in predicted):
        assert measurement.policy == VERSION
        assert measurement.spread_us and measurement.samples == 0
