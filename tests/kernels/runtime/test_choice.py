"""Which record is chosen, from synthetic records."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.target import default_config, known_good
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.torch import TorchConfig
from flashtune.kernels.runtime.choice import (
    PREBUILT,
    USER,
    Choice,
    Level,
    Source,
    choose,
    contenders,
    device_distance,
    shape_distance,
)
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.problem import LARGEST, Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

PROBLEM = Problem(vocab_size=151936, hidden_size=2048, n_clusters=9496, n_probes=256)
LOGITS = replace(PROBLEM, epilogue="logits")
SMALLER = replace(PROBLEM, hidden_size=1024)
TOOLS = Toolchain(triton="3.6.0", torch="2.13.0", driver="580.1")
H200, ORIN = find_device("nvidia-h200"), find_device("orin")


def staged(rows: int, **knobs: Any) -> StagedConfig:
    """A valid config, told apart by its rows a score program."""
    return StagedConfig(score_rows=rows, **knobs)


def record(
    config: Config | dict[str, Any], median_us: float | None = 10.0, **changes: Any
) -> Record:
    outcome = changes.pop("outcome", Outcome.OK)
    values: dict[str, Any] = {
        "device": H200.name,
        "toolchain": TOOLS,
        "problem": PROBLEM,
        "config": config if isinstance(config, dict) else config_data(config),
        "provenance": Provenance.MEASURED,
        "measurement": Measurement(
            outcome=outcome,
            median_us=median_us if outcome in (Outcome.OK, Outcome.PRUNED) else None,
            policy=changes.pop("policy", "search-behind"),
        ),
        "created": "2026-01-31T12:00:00Z",
    }
    return Record(**{**values, **changes})


def pick(user: list[Record], prebuilt: list[Record] | None = None, **changes: Any) -> Choice:
    values = {"problem": PROBLEM, "device": H200, "toolchain": TOOLS, **changes}
    sources = [
        Source(name=USER, records=user),
        Source(name=PREBUILT, records=prebuilt or []),
    ]
    return choose(sources=sources, **values)


def test_the_exact_record_is_chosen_and_nothing_differs() -> None:
    near = record(staged(1), problem=SMALLER, median_us=1.0)
    other = record(staged(8), device=ORIN.name, median_us=1.0)
    choice = pick([near, other, record(staged(4))])
    assert (choice.level, choice.config) == (Level.EXACT, staged(4))
    assert choice.differences == ()
    assert choice.why == "measured on nvidia-h200 for 151936x2048 c9496 p256"


def test_of_exact_records_the_fastest_is_chosen_and_final_ones_go_first() -> None:
    slow, fast = record(staged(1), 20.0), record(staged(4), 10.0)
    assert pick([slow, fast]).config == staged(4)
    assert pick([record(staged(1), 20.0, policy="final-behind"), fast]).config == staged(1)


def test_measured_goes_before_predicted_and_user_before_prebuilt() -> None:
    predicted = record(staged(1), 1.0, provenance=Provenance.PREDICTED)
    assert pick([predicted, record(staged(4), 30.0)]).config == staged(4)
    assert pick([predicted], [record(staged(4), 30.0)]).config == staged(4)
    assert pick([record(staged(1), 30.0)], [record(staged(4), 1.0)]).config == staged(1)
    assert pick([predicted]).explain()["provenance"] == "predicted"


def test_records_of_this_toolchain_go_before_faster_ones_of_another() -> None:
    other = replace(TOOLS, triton="3.7.0")
    choice = pick([record(staged(1), 1.0, toolchain=other), record(staged(4), 5.0)])
    assert choice.config == staged(4)
    only = pick([record(staged(1), toolchain=other)])
    assert only.level is Level.EXACT
    assert only.toolchain_matches is False
    assert only.differences == (("triton", "3.6.0", "3.7.0"),)


def test_the_nearest_shape_on_this_device_goes_before_another_device() -> None:
    far = record(staged(1), 1.0, problem=replace(PROBLEM, hidden_size=256))
    near = record(staged(4), 9.0, problem=SMALLER)
    elsewhere = record(staged(8), 1.0, device="nvidia-h100")
    choice = pick([far, near, elsewhere])
    assert (choice.level, choice.config) == (Level.NEAREST_SHAPE, staged(4))
    assert choice.differences == (("hidden_size", 2048, 1024),)
    assert "hidden_size (wanted 2048, found 1024)" in choice.why


def test_the_nearer_of_two_shapes_wins_whichever_source_it_is_from() -> None:
    far = record(staged(1), problem=replace(PROBLEM, hidden_size=256))
    near = record(staged(4), problem=SMALLER)
    assert pick([far], [near]).config == staged(4)


def test_of_other_devices_the_same_architecture_goes_first_then_the_distance() -> None:
    b200 = record(staged(1), 1.0, device="nvidia-b200")
    h100 = record(staged(4), 9.0, device="nvidia-h100", problem=SMALLER)
    choice = pick([b200, h100])
    assert (choice.level, choice.config) == (Level.NEAREST_DEVICE, staged(4))
    assert ("device", "nvidia-h200", "nvidia-h100") in choice.differences
    a40 = record(staged(8), 1.0, device="nvidia-a40")
    assert pick([a40, b200]).config == staged(1)


def test_of_the_nearest_devices_records_the_exact_problem_goes_first() -> None:
    same = record(staged(1), 9.0, device="nvidia-h100")
    other = record(staged(4), 1.0, device="nvidia-h100", problem=SMALLER)
    assert pick([other, same]).config == staged(1)


def test_records_of_unknown_devices_dtypes_and_failures_never_count() -> None:
    choice = pick(
        [
            record(staged(1), device="somebody-elses-gpu"),
            record(staged(1), problem=replace(PROBLEM, weight_dtype="fp32")),
            record(staged(1), problem=replace(PROBLEM, centroid_dtype="fp16")),
            record(staged(1), outcome=Outcome.CRASH),
            record(staged(1), outcome=Outcome.PRUNED),
        ]
    )
    assert (choice.level, choice.record) == (Level.DEFAULT, None)
    assert choice.config == default_config(PROBLEM, H200)


def test_an_invalid_config_is_skipped_and_the_explanation_says_so() -> None:
    wide = staged(2, score_block=2048)
    assert Candidate(SMALLER, wide, H200).why_invalid()
    on_orin = record(staged(2, pdl=True), device=ORIN.name)
    choice = pick([record(wide, 1.0), record(staged(4), 2.0)], problem=SMALLER)
    assert choice.config == staged(4)
    assert choice.skipped == (
        "user database: score_block 2048 is wider than the hidden size 1024",
    )
    assert pick([on_orin], device=ORIN).level is Level.DEFAULT


@pytest.mark.parametrize(
    "config",
    [
        {"plan": "torch", "staged": True},
        {"plan": "staged"},
        {"plan": "later"},
        {**config_data(staged(2)), "score_rows": 3},
        {**config_data(staged(2)), "evict": "x'; import os"},
        {**config_data(staged(2)), "new_knob": 1},
        {**config_data(staged(2)), "pdl": 1},
    ],
)
def test_a_config_that_cannot_be_parsed_is_skipped(config: dict[str, Any]) -> None:
    choice = pick([record(config, 1.0)], [record(staged(4))])
    assert choice.config == staged(4)
    assert len(choice.skipped) == 1


def test_what_could_not_be_read_is_told() -> None:
    found = Source(name=USER, records=[record(staged(4))], left_out="skipped 3 rows")
    choice = choose(PROBLEM, H200, TOOLS, [found])
    assert choice.config == staged(4)
    assert choice.explain()["skipped"] == ["user database: skipped 3 rows"]


@pytest.mark.parametrize(
    "extreme",
    [
        {"vocab_size": LARGEST, "n_clusters": 1, "n_probes": 1},
        {"vocab_size": LARGEST, "n_clusters": LARGEST, "n_probes": LARGEST},
        {"hidden_size": LARGEST, "n_tokens": LARGEST},
        {"hidden_size": 1, "vocab_size": 1, "n_clusters": 1, "n_probes": 1},
    ],
)
def test_the_largest_problem_on_record_can_be_compared(extreme: dict[str, int]) -> None:
    """Any record that there can be: one that can't would take every head down to plain torch."""
    far = record(staged(2), 0.001, problem=replace(PROBLEM, **extreme))
    assert pick([far, record(staged(4))]).config == staged(4)
    assert pick([far]).level in (Level.NEAREST_SHAPE, Level.DEFAULT)


def test_equal_reasons_are_counted() -> None:
    records = [record(staged(rows, score_block=2048)) for rows in (2, 4)]
    choice = pick(records, problem=SMALLER)
    assert choice.level is Level.DEFAULT
    assert choice.skipped[0].endswith("hidden size 1024 (2 records)")


def test_what_failed_here_with_these_tools_is_not_tried_again() -> None:
    failure = record(staged(4), outcome=Outcome.WRONG_RESULT)
    choice = pick([failure], [record(staged(4), 1.0), record(staged(1), 2.0)])
    assert choice.config == staged(1)
    assert choice.skipped == ("prebuilt table: failed here before (wrong_result)",)
    elsewhere = replace(failure, device=ORIN.name)
    earlier = replace(failure, toolchain=replace(TOOLS, triton="3.5.0"))
    assert pick([elsewhere, earlier], [record(staged(4), 1.0)]).config == staged(4)


def test_on_a_device_without_kernels_plain_torch_is_chosen() -> None:
    choice = pick([record(staged(4))], device=device_of(torch.device("meta")))
    assert (choice.level, choice.config) == (Level.TORCH, TorchConfig())
    assert "no kernels for this kind of device" in choice.why


def test_a_problem_without_a_default_kernel_is_for_plain_torch() -> None:
    choice = pick([], problem=replace(PROBLEM, n_tokens=1024))
    assert (choice.level, choice.config) == (Level.TORCH, TorchConfig())
    assert "no kernel for 151936x2048 c9496 p256 t1024 on nvidia-h200" in choice.why


def test_explain_is_json_with_everything_in_it() -> None:
    chosen = record(PersistentConfig(), 21.5, problem=SMALLER, device="nvidia-h100")
    data = json.loads(json.dumps(pick([], [chosen]).explain()))
    assert data["level"] == "nearest_device"
    assert data["source"] == "prebuilt table"
    assert data["provenance"] == "measured"
    assert data["record"] == chosen.key
    assert data["record_device"] == "nvidia-h100"
    assert data["median_us"] == 21.5
    assert data["toolchain_matches"] is True
    assert data["config"] == dict(config_data(PersistentConfig()))
    assert {"field": "hidden_size", "wanted": 2048, "found": 1024} in data["differences"]
    default = pick([]).explain()
    assert (default["source"], default["provenance"]) == ("built in", None)


def test_records_of_tokens_serve_for_logits_until_there_are_others() -> None:
    tokens, other = record(staged(4)), record(staged(2), problem=SMALLER)
    choice = pick([other, tokens], problem=LOGITS)
    assert (choice.level, choice.config) == (Level.NEAREST_SHAPE, staged(4))
    assert choice.differences == (("epilogue", "logits", "argmax"),)
    assert choice.why.endswith("differs in epilogue (wanted logits, found argmax)")
    own = record(staged(8), 99.0, problem=LOGITS)
    assert pick([own, other, tokens], problem=LOGITS).level is Level.EXACT
    smaller = record(staged(8), problem=replace(SMALLER, epilogue="logits"))
    assert pick([smaller, tokens], problem=LOGITS).config == staged(4)


def test_records_without_pinned_clusters_serve_where_some_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They need no race either: a few clusters more change nothing of what is fast."""
    monkeypatch.setattr(Candidate, "why_invalid", lambda self: None)
    pinned = replace(PROBLEM, n_pinned=2)
    choice = pick([record(staged(4))], problem=pinned)
    assert (choice.level, choice.config) == (Level.NEAREST_SHAPE, staged(4))
    assert [(one.field, one.wanted, one.found) for one in choice.differences] == [
        ("n_pinned", 2, 0)
    ]
    assert choice.settled
    assert not pick([record(staged(4), provenance=Provenance.PREDICTED)], problem=pinned).settled
    newer = replace(TOOLS, triton="3.7.0")
    assert not pick([record(staged(4))], problem=pinned, toolchain=newer).settled
    assert not pick([record(staged(4), device=ORIN.name)], problem=pinned).settled
    assert not pick([record(staged(4))], problem=replace(pinned, n_probes=128)).settled
    own = record(staged(8), problem=pinned, median_us=99.0)
    assert pick([record(staged(4)), own], problem=pinned).config == staged(8)


def test_distances_are_octaves() -> None:
    assert shape_distance(PROBLEM, PROBLEM) == 0
    assert shape_distance(PROBLEM, replace(SMALLER, n_tokens=4)) == pytest.approx(3)
    # twice the clusters of half the size
    split = replace(PROBLEM, n_clusters=2 * PROBLEM.n_clusters)
    assert shape_distance(PROBLEM, split) == pytest.approx(2)
    assert shape_distance(PROBLEM, replace(PROBLEM, weight_dtype="fp16")) is None
    assert shape_distance(PROBLEM, LOGITS) == pytest.approx(0.1)
    assert shape_distance(PROBLEM, replace(PROBLEM, n_pinned=3)) == pytest.approx(0.1)
    screened = Screen.parse("int8").problem(PROBLEM)
    assert shape_distance(PROBLEM, screened) is None
    assert shape_distance(screened, replace(screened, n_rescored=9)) == pytest.approx(0.1)
    assert shape_distance(screened, replace(screened, model_dtype="fp16")) is None
    twice = replace(H200, memory_bandwidth=2 * H200.memory_bandwidth, sm_count=66)
    assert device_distance(H200, twice) == pytest.approx(2)
    assert device_distance(H200, replace(H200, memory_bandwidth=0.0)) == 0


def raced(*records: Record, problem: Problem = PROBLEM) -> list[Config]:
    return contenders(problem, H200, TOOLS, [Source(name=USER, records=records)])


def test_what_is_on_record_for_just_this_is_raced_with_the_default_first() -> None:
    guesses = [
        record(staged(rows), rows + 1.0, provenance=Provenance.PREDICTED, toolchain=Toolchain())
        for rows in (16, 8, 1)
    ]
    stale = record(staged(4), 50.0, toolchain=replace(TOOLS, driver="570.1"))
    near = record(PersistentConfig(), problem=SMALLER)
    found = raced(*guesses, near, stale)
    assert found == [default_config(PROBLEM, H200), staged(4), staged(1), staged(8), staged(16)]


def test_measured_winners_of_near_shapes_and_devices_run_beside_predictions() -> None:
    guesses = [
        record(staged(4, slack=slack), slack + 1.0, provenance=Provenance.PREDICTED)
        for slack in (0, 8, 32)
    ]
    here = record(staged(1), problem=SMALLER)
    sibling = record(staged(16), device="nvidia-h100")
    assert raced(*guesses, sibling, here)[1:] == [
        *(staged(4, slack=slack) for slack in (0, 8, 32)), staged(1), staged(16)
    ]  # fmt: skip
    of_another_arch = record(staged(16), device="nvidia-a100")
    guess = record(staged(1), problem=SMALLER, provenance=Provenance.PREDICTED)
    assert len(raced(*guesses, of_another_arch, guess)) == 4
    stale = record(staged(8), toolchain=replace(TOOLS, driver="570.1"))
    assert staged(1) not in raced(*guesses, here, stale), "something was measured for just this"
    many = [
        record(staged(4, slack=slack, gather_rows=rows), provenance=Provenance.PREDICTED)
        for slack in (0, 8, 32)
        for rows in (1, 4, 8)
    ]
    found = raced(*many, sibling, here)
    assert len(found) == 9 and found[-2:] == [staged(1), staged(16)]


def test_no_more_than_eight_are_raced_with_the_default_and_none_twice() -> None:
    knobs = [{"slack": slack, "pdl": pdl} for slack in (0, 8, 32) for pdl in (False, True)]
    many = [record(staged(rows, **each)) for rows in (1, 4) for each in knobs]
    default = record(default_config(PROBLEM, H200))
    found = raced(default, *many)
    assert len(found) == len(set(found)) == 9


def test_where_nothing_is_on_record_near_winners_go_before_what_is_known_to_be_good() -> None:
    shapes = [replace(PROBLEM, hidden_size=2048 * factor) for factor in (2, 4, 8, 16, 32)]
    winners = [staged(rows, slack=0) for rows in (1, 4, 8, 16)]
    near = [record(each, problem=shape) for each, shape in zip(winners, shapes, strict=False)]
    far = record(staged(2, slack=0), problem=shapes[4])
    slower = record(staged(1, slack=8), 99.0, problem=shapes[0])
    default, *found = raced(*near, far, slower)
    assert found[:4] == winners
    good = [each for each in known_good(PROBLEM, H200) if each != default]
    assert found[4:] == good[:4]


def test_what_failed_here_is_not_raced_again() -> None:
    guess = record(staged(4), provenance=Provenance.PREDICTED, toolchain=Toolchain())
    failed = record(staged(4), outcome=Outcome.WRONG_RESULT)
    good = next(
        each for each in known_good(PROBLEM, H200) if each != default_config(PROBLEM, H200)
    )
    assert good in raced(guess, failed)
    assert staged(4) not in raced(guess, failed)
    assert good not in raced(record(good, outcome=Outcome.CRASH))


def test_a_time_taken_back_to_back_is_stale_on_a_gpu_and_goes_last() -> None:
    old = record(staged(4), 9.0, policy="final")
    choice = pick([old])
    assert (choice.stale, choice.settled, choice.outdated) == (True, False, ("the way of timing",))
    assert choice.why.endswith("; stale, for the way of timing changed since")
    assert pick([old, record(staged(1), 12.0)]).config == staged(1)
    guess = pick([record(staged(4), provenance=Provenance.PREDICTED, policy="stages-2")])
    assert not guess.stale
    elsewhere = pick([replace(old, device=ORIN.name)])  # no time of this device at all
    assert (elsewhere.level, elsewhere.stale) == (Level.NEAREST_DEVICE, False)


def test_a_measured_record_of_other_tools_is_stale_and_a_prediction_is_not() -> None:
    older = replace(TOOLS, triton="3.5.1", torch="2.12.0")
    choice = pick([record(staged(4), toolchain=older)])
    assert (choice.stale, choice.settled) == (True, False)
    assert choice.why.endswith("; stale, for triton and torch changed since")
    assert choice.explain()["stale"] is True
    patched = pick([record(staged(4), toolchain=replace(TOOLS, triton="3.6.2"))])
    assert (patched.stale, patched.settled) == (False, True)
    guess = pick([record(staged(4), provenance=Provenance.PREDICTED, toolchain=Toolchain())])
    assert (guess.stale, guess.settled) == (False, False)
    assert not pick([record(staged(4), problem=SMALLER)]).settled
    assert not pick([]).settled


@pytest.mark.parametrize(
    ("provenance", "level"),
    [(Provenance.PREDICTED, Level.DEFAULT), (Provenance.MEASURED, Level.NEAREST_SHAPE)],
)
def test_a_prediction_for_one_token_does_not_go_before_the_default_for_several(
    provenance: Provenance, level: Level
) -> None:
    """What was measured for another number of tokens does; both are raced."""
    config = staged(4, score_block=256)
    known = [record(config, provenance=provenance)]
    several = replace(PROBLEM, n_tokens=2)
    assert pick(known, problem=several).level is level
    raced = contenders(several, H200, TOOLS, [Source(name=USER, records=known)])
    assert config in raced[1:]


def test_winners_for_as_many_tokens_are_raced_beside_nearer_ones_for_one() -> None:
    """Which plan is fast depends on the tokens more than on the device."""
    shapes = [replace(PROBLEM, n_probes=PROBLEM.n_probes + more) for more in range(6)]
    nearer = [
        record(staged(1, score_block=256, score_warps=2**i), problem=shape)
        for i, shape in enumerate(shapes)
    ]
    far = replace(SMALLER, n_tokens=4)
    elsewhere = [record(staged(4), device="nvidia-h100", problem=far)]
    known = [Source(name=USER, records=[*nearer, *elsewhere])]
    raced = contenders(replace(PROBLEM, n_tokens=4), H200, TOOLS, known)
    assert staged(4) in raced[1:]
    assert sum(config.score_block == 256 for config in raced[1:]) == 4
    raced = contenders(replace(PROBLEM, n_tokens=8), H200, TOOLS, known)
    assert staged(4) not in raced[1:]
