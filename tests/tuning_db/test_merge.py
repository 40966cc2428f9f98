"""Merging tables: each rule by itself, and what a comparison of two tables tells."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.merge import compare_tables, merge
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.table import TuningTable, dumps_table, loads_table

MakeRecord = Callable[..., Record]
PREDICTED = Provenance.PREDICTED
OLD = Toolchain(triton="3.9.0", torch="2.11.0", driver="580.1")
NEW = Toolchain(triton="3.10.0", torch="2.11.0", driver="580.1")


def table(*records: Record) -> TuningTable:
    return TuningTable(device="nvidia-h200", records=records)


def merged(a: Record, b: Record) -> tuple[list[Record], list[str]]:
    """The records of both ways to merge two tables of one record, and whose they are."""
    found = merge([("a", table(a)), ("b", table(b))])
    other = merge([("b", table(b)), ("a", table(a))])
    assert [each.taken_from for each in found.conflicts] == [
        each.taken_from for each in other.conflicts
    ], "the order of the tables decides nothing"
    assert found.table == other.table
    return list(found.table.records), [each.taken_from for each in found.conflicts]


def test_measured_beats_predicted_however_slow_and_old(make_record: MakeRecord) -> None:
    measured = make_record(50.0, toolchain=OLD)
    guess = make_record(1.0, provenance=PREDICTED, toolchain=NEW, config={"plan": "b"})
    assert merged(guess, measured) == ([measured], ["b"])


def test_the_newer_toolchain_beats_the_faster_time_by_versions_as_numbers(
    make_record: MakeRecord,
) -> None:
    old = make_record(1.0, toolchain=OLD)
    new = make_record(50.0, toolchain=NEW)
    assert merged(old, new) == ([new], ["b"])
    newer_driver = replace(old, toolchain=replace(OLD, driver="590.0"))
    assert merged(newer_driver, new) == ([new], ["b"])  # Triton's version goes first
    assert merged(newer_driver, old) == ([newer_driver], ["a"])
    [conflict] = merge([("a", table(old)), ("b", table(new))]).conflicts
    assert "triton 3.10.0" in conflict.why and "triton 3.9.0" in conflict.why
    assert (conflict.taken, conflict.left) == (new, old)


def test_the_faster_by_more_than_the_noise_beats_the_slower(make_record: MakeRecord) -> None:
    slow = make_record(10.0, config={"plan": "a"})  # with a spread of 0.5: noise 0.25
    fast = make_record(9.7, config={"plan": "b"})
    assert merged(slow, fast) == ([fast], ["b"])


def test_a_time_taken_behind_a_kernel_beats_a_shorter_one_that_was_not(
    make_record: MakeRecord,
) -> None:
    behind = make_record(12.0, policy="final-behind", config={"plan": "a"})
    alone = make_record(10.0, policy="final", config={"plan": "b"})
    assert merged(alone, behind) == ([behind], ["b"])
    [conflict] = merge([("a", table(alone)), ("b", table(behind))]).conflicts
    assert conflict.why == "timed behind another kernel, as decode runs a step"


def test_within_the_noise_the_first_table_keeps_its_record(make_record: MakeRecord) -> None:
    one = make_record(10.0, config={"plan": "a"})
    two = make_record(9.8, config={"plan": "b"})
    for first, second in ((one, two), (two, one)):
        found = merge([("first", table(first)), ("second", table(second))])
        assert found.table.records == (first,)
        assert [each.taken_from for each in found.conflicts] == ["first"]
        again = merge([("merged", found.table), ("second", table(second))])
        assert again.table == found.table


def test_a_noisy_measurement_needs_a_greater_lead(make_record: MakeRecord) -> None:
    steady = make_record(10.0, config={"plan": "a"})
    noisy = replace(
        make_record(config={"plan": "b"}),
        measurement=Measurement(outcome=Outcome.OK, median_us=9.0, spread_us=2.5),
    )
    assert merge([("a", table(steady)), ("b", table(noisy))]).table.records == (steady,)


def test_predictions_of_one_model_make_a_shortlist_together(make_record: MakeRecord) -> None:
    guesses = [
        make_record(10.0 + n, provenance=PREDICTED, config={"plan": "a", "n": n}, policy="m-1")
        for n in range(12)
    ]
    found = merge([("a", table(*guesses[:6])), ("b", table(*guesses[4:]))])
    kept = sorted(record.config["n"] for record in found.table.records)
    assert kept == list(range(8))
    assert [each.taken_from for each in found.conflicts] == ["both"]


def test_of_two_cost_models_the_later_counts(make_record: MakeRecord) -> None:
    old = make_record(1.0, provenance=PREDICTED, policy="m-1")
    new = make_record(9.0, provenance=PREDICTED, policy="m-2", created="2026-03-01T00:00:00Z")
    assert merged(old, new) == ([new], ["b"])


def test_what_only_one_has_or_both_have_alike_is_no_conflict(
    make_record: MakeRecord, problem: Problem
) -> None:
    same = make_record(10.0)
    other = make_record(5.0, problem=replace(problem, n_tokens=2))
    third = make_record(6.0, problem=replace(problem, n_tokens=4))
    found = merge([("a", table(same, other)), ("b", table(third, same))])
    assert found.conflicts == ()
    assert set(record.key for record in found.table.records) == {
        record.key for record in (same, other, third)
    }
    text = dumps_table(found.table)
    assert dumps_table(loads_table(text, origin="x")) == text


def test_failures_are_left_behind(make_record: MakeRecord) -> None:
    crash = make_record(None, config={"plan": "bad"})
    worked = make_record(10.0)
    assert merged(crash, worked) == ([worked], [])


def test_tables_of_two_devices_are_refused(make_record: MakeRecord) -> None:
    other = TuningTable(device="gb10", records=())
    for call in (
        lambda: merge([("a", table()), ("b", other)]),
        lambda: compare_tables(table(), other),
    ):
        with pytest.raises(FlashtuneError, match="nvidia-h200 and gb10"):
            call()


def test_a_comparison_tells_what_differs_and_nothing_else(
    make_record: MakeRecord, problem: Problem
) -> None:
    two, four, eight = (replace(problem, n_tokens=n) for n in (2, 4, 8))
    same = make_record(problem=problem)
    before = make_record(10.0, problem=two, toolchain=OLD, config={"plan": "a", "x": 1, "y": 1})
    after = make_record(5.0, problem=two, toolchain=NEW, config={"plan": "a", "x": 2, "y": 1})
    gone, fresh = make_record(problem=four), make_record(problem=eight)
    found = compare_tables(table(same, before, gone), table(same, after, fresh))
    assert json.loads(json.dumps(found)) == found
    assert (found["device"], found["same"]) == ("nvidia-h200", 1)
    assert [each["n_tokens"] for each in found["only_a"]] == [4]
    assert [each["n_tokens"] for each in found["only_b"]] == [8]
    [change] = found["changed"]
    assert change["problem"]["n_tokens"] == 2
    assert (change["median_us"], change["ratio"]) == ([10.0, 5.0], 0.5)
    assert change["toolchain"] == {"triton": ["3.9.0", "3.10.0"]}
    assert change["config"] == {"x": [1, 2]}
    assert change["records"] == [1, 1]


def test_a_comparison_begins_with_the_largest_change(
    make_record: MakeRecord, problem: Problem
) -> None:
    problems = [replace(problem, n_tokens=n) for n in (2, 3, 4)]
    after = zip(problems, (9.0, 2.0, 30.0), strict=True)
    found = compare_tables(
        table(*(make_record(10.0, problem=each) for each in problems)),
        table(*(make_record(time_us, problem=each) for each, time_us in after)),
    )
    assert [change["ratio"] for change in found["changed"]] == [0.2, 3.0, 0.9]
