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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ""}, "device must be text and not empty"),
        ({"device": 7}, "device must be text"),
        ({"device": "d" * 501}, "device has more than 500"),
        ({"device": "d\ud800"}, "device cannot be encoded"),
        ({"toolchain": Toolchain(driver="9" * 5000)}, "toolchain's driver has more than 500"),
        ({"config": None}, "config must be an object"),
        ({"config": {"plan": "a" * 501}}, "plan in config has more than 500"),
        ({"config": {"plan": "a", "n": 2**63}}, "n in config must be a number of 64 bits"),
        ({"config": {"plan": "a", "n": float("nan")}}, "n in config must be a number"),
        ({"config": {"plan": "a", 7: 1}}, "config has a key 7"),
        ({"provenance": "measured"}, "provenance must be a Provenance"),
        ({"created": "yesterday"}, "created must be UTC"),
        ({"created": None}, "created must be UTC"),
        ({"policy": "p" * 501}, "policy has more than 500"),
    ],
)
def test_what_a_record_holds_has_bounds(
    changes: dict[str, object], message: str, make_record: Callable[..., Record]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_record(**changes)


@pytest.mark.parametrize("samples", [-1, 2**31, True, 1.0])
def test_samples_are_a_count(samples: int) -> None:
    with pytest.raises(ValueError, match="samples must be a count"):
        Measurement(outcome=Outcome.OK, median_us=1.0, samples=samples)


def test_a_measurement_s_texts_have_bounds() -> None:
    for name in ("error", "policy"):
        with pytest.raises(ValueError, match=f"{name} "):
            Measurement(outcome=Outcome.CRASH, **{name: "x" * 20_000})
        with pytest.raises(ValueError, match=f"{name} "):
            Measurement(outcome=Outcome.CRASH, **{name: "\udcff"})
    with pytest.raises(ValueError, match="outcome"):
        Measurement(outcome="ok", median_us=1.0)  # type: ignore[arg-type]
