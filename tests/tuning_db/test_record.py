import dataclasses
from collections.abc import Callable

import pytest

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.record import Measurement, Outcome, Record, config_key, record_key


def test_config_keys_do_not_depend_on_order() -> None:
    assert config_key({"plan": "a", "warps": 4}) == config_key({"warps": 4, "plan": "a"})
    assert config_key({"b": True, "a": 1.5}) == '{"a":1.5,"b":true}'


@pytest.mark.parametrize("other", [1.0, True, "1"])
def test_config_keys_tell_types_apart(other: float | bool | str) -> None:
    assert config_key({"x": 1}) != config_key({"x": other})


def test_record_keys_are_pinned(make_record: Callable[..., Record]) -> None:
    """A changed key would orphan every stored record: it needs a migration."""
    assert make_record().key == "5195b1b2682035c43bb506c37f7ce709"


def test_what_a_record_is_of_changes_its_key_and_what_was_measured_does_not(
    make_record: Callable[..., Record],
) -> None:
    record = make_record()
    other_problem = dataclasses.replace(record.problem, n_tokens=2)
    others = [
        make_record(device="nvidia-h100"),
        make_record(toolchain=Toolchain(triton="3.9.0")),
        make_record(problem=other_problem),
        make_record(config={"plan": "staged", "score_rows": 4}),
    ]
    assert len({record.key, *(other.key for other in others)}) == 5
    assert make_record(99.0, created="2030-01-01T00:00:00Z").key == record.key
    assert record.key == record_key(record.device, record.toolchain, record.problem, record.config)


@pytest.mark.parametrize("time_us", [-1.0, float("nan"), float("inf"), 1e13, True, "1"])
def test_times_are_finite_and_not_negative(time_us: float) -> None:
    with pytest.raises(ValueError, match="microseconds"):
        Measurement(outcome=Outcome.OK, median_us=time_us)
    with pytest.raises(ValueError, match="microseconds"):
        Measurement(outcome=Outcome.OK, median_us=1.0, spread_us=time_us)


def test_only_what_worked_has_a_time() -> None:
    with pytest.raises(ValueError, match="outcome ok"):
        Measurement(outcome=Outcome.OK)
    with pytest.raises(ValueError, match="outcome crash"):
        Measurement(outcome=Outcome.CRASH, median_us=1.0)
