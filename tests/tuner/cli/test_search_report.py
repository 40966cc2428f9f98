"""What a search's results say, so that no number of theirs misleads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.predict.cost_model import VERSION, interval_us, shipped_model
from flashtune.tuner.cli.search_report import print_results
from flashtune.tuner.objective import Objective
from flashtune.tuner.search.failure import Failure, known_remedy, most_frequent
from flashtune.tuner.search.result_data import better_shipped, result_data
from flashtune.tuner.search.search import Result
from flashtune.tuner.search.session import SessionResult
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

H200 = find_device("h200")
QWEN = parse_shape("qwen3-vl-2b")
Outcomes = Callable[..., SessionResult]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def result(recorded: Callable[..., Record], problem: Problem) -> Callable[..., Result]:
    """A result of five configs whose winner took 12 µs, with changes."""

    def make(**changes: Any) -> Result:
        values: dict[str, Any] = {
            "problem": problem,
            "winner": recorded(StagedConfig(score_block=64), 12.0),
            "searched_us": 12.0,
            "default_us": 14.0,
            "baseline_us": 20.0,
            "evaluated": 5,
            "failed": 0,
            "failure": None,
            "default_kept": False,
            "objective": Objective.TIME,
            "front": (),
            "timed_out": False,
            "cancelled": False,
        }
        return Result(**{**values, **changes})

    return make


@pytest.fixture
def said(
    capsys: pytest.CaptureFixture[str], device: Device, problem: Problem
) -> Callable[..., str]:
    """What is printed of results."""

    def say(*results: Result, **changes: Any) -> str:
        values: dict[str, Any] = {
            "device": device,
            "provenance": Provenance.MEASURED,
            "problems": [each.problem for each in results],
            "results": results,
            "cancelled": False,
        }
        print_results(SessionResult(**{**values, **changes}))
        return " ".join(capsys.readouterr().out.split())

    return say


def test_floor_and_ratio_are_named_once(said, result, device: Device) -> None:
    text = said(result(), result())
    rate = device.memory_bandwidth / 1e9
    assert (
        text.count(
            f"floor: time to read the fewest bytes at {rate:.1f} GB/s; ratio: winner to floor"
        )
        == 1
    )
    assert "floor:" not in said(result(), device=replace(device, memory_bandwidth=0.0))


def test_a_time_below_the_floor_is_explained(said, result, device: Device) -> None:
    assert "faster than the floor" not in said(result())
    slow = replace(device, memory_bandwidth=device.memory_bandwidth / 1000)
    assert "512x64 c32 p4: faster than the floor" in said(result(), device=slow)


def test_the_best_of_the_search_and_the_winner_are_told_apart(said, result) -> None:
    assert "best in the search" not in said(result())
    text = said(result(searched_us=11.2))
    assert "best in the search: 11.2; the winner, timed again side by side: 12.0" in text
    text = said(result(searched_us=11.2, default_kept=True))
    assert "the default is kept" in text and "11.2" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cancelled": True}, "INTERRUPTED: 1 of 2 shapes begun, not all of them finished"),
        ({}, "out of time: 1 of 2 shapes begun"),
    ],
)
def test_an_unfinished_table_says_so(said, result, changes: Any, expected: str) -> None:
    assert expected in said(result(), problems=[QWEN, QWEN], **changes)
    assert "begun" not in said(result())


def test_the_most_frequent_failure_is_said(said, result) -> None:
    failure = Failure(reason="crash: illegal access", count=2, remedy="install another")
    text = said(result(failed=3, failure=failure))
    assert "3 of 5 configs failed, 2 of them with: crash: illegal access" in text
    text = said(result(winner=None, searched_us=None, failed=5, failure=failure))
    assert "no config worked: crash: illegal access; install another" in text


def test_a_predicted_time_comes_with_its_interval(said, result, recorded) -> None:
    config = PersistentConfig()
    low, high = shipped_model().intervals["persistent"]
    measurement = Measurement(
        outcome=Outcome.OK, median_us=10.0, spread_us=10 * (high - low), policy=VERSION
    )
    assert interval_us(QWEN, config, measurement) == pytest.approx((10 * low, 10 * high))
    winner = recorded(config, 10.0, measurement=measurement, provenance=Provenance.PREDICTED)
    text = said(result(winner=winner), provenance=Provenance.PREDICTED)
    assert f"10.0 ({10 * low:.1f}-{10 * high:.1f})" in text
    assert "in brackets, an interval that held 80 %" in text
    assert "no measured times to fit to" not in text


def test_a_time_that_nothing_was_fitted_to_says_so(said, result, recorded) -> None:
    winner = recorded(StagedConfig(), 10.0, provenance=Provenance.PREDICTED)
    for screen, guessed in (("int4/int8", True), ("int8", False)):
        screened = replace(winner, problem=Screen.parse(screen).problem(QWEN))
        text = said(result(winner=screened), provenance=Provenance.PREDICTED)
        assert ("int4: no measured times to fit to" in text) is guessed


def test_what_ships_is_shown_where_it_is_better_than_a_prediction(said, result, recorded) -> None:
    def found(time_us: float, provenance: Provenance, device: Device) -> Result:
        winner = recorded(StagedConfig(), time_us, QWEN, device.name, provenance=provenance)
        return result(problem=QWEN, winner=winner)

    orin = find_device("orin")
    quick = found(0.1, Provenance.PREDICTED, orin)
    assert better_shipped(quick, orin) is None, "what ships for an Orin is slower, and predicted"
    slow = found(1e6, Provenance.PREDICTED, orin)
    assert better_shipped(slow, orin) is not None
    assert better_shipped(found(1e6, Provenance.MEASURED, H200), H200) is None
    quick = found(0.1, Provenance.PREDICTED, H200)
    shipped = better_shipped(quick, H200)
    assert shipped is not None and shipped.provenance is Provenance.MEASURED
    text = said(quick, device=H200, provenance=Provenance.PREDICTED)
    assert f"has a better record (measured): {shipped.measurement.median_us:.1f}, staged" in text
    data = result_data(
        SessionResult(device=H200, provenance=Provenance.PREDICTED, problems=[QWEN],
                      results=[quick], cancelled=False)
    )  # fmt: skip
    assert data["results"][0]["shipped"] == shipped.data()


def test_reasons_are_counted_by_what_they_say() -> None:
    def failed(outcome: Outcome, error: str) -> Measurement:
        return Measurement(outcome=outcome, error=error)

    assert most_frequent([Measurement(outcome=Outcome.OK, median_us=1.0)]) is None
    found = most_frequent(
        [
            failed(Outcome.CRASH, "one"),
            failed(Outcome.COMPILE_ERROR, "two\n  lines"),
            failed(Outcome.COMPILE_ERROR, "two lines"),
            Measurement(outcome=Outcome.PRUNED, median_us=9.0),
        ]
    )
    assert found == Failure(reason="compile_error: two lines", count=2)
    long = most_frequent([failed(Outcome.CRASH, "x" * 1000)])
    assert long is not None and len(long.reason) < 300


def test_it_is_known_which_triton_has_an_architecture() -> None:
    thor = find_device("thor")
    assert "install 3.7 or later" in known_remedy(thor, Toolchain(triton="3.6.0"))
    assert known_remedy(thor, Toolchain(triton="3.7.1")) == ""
    assert known_remedy(thor, Toolchain(triton="")) == ""
    assert known_remedy(H200, Toolchain(triton="3.6.0")) == ""
