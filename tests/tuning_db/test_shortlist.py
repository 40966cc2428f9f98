"""Which predicted configs are raced: the rule, on records made for it."""

from collections.abc import Callable
from typing import Any

import pytest

from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.shortlist import FITTED, MOST, knobs_apart, shortlist

MakeRecord = Callable[..., Record]
Staged = Callable[..., Record]


@pytest.fixture
def staged(make_record: MakeRecord) -> Staged:
    """A predicted config: `staged(10.0, a=1)`, of one family unless it is given another."""

    def make(
        median_us: float | None, plan: str = "staged", device: str = "agx-orin", **knobs: Any
    ) -> Record:
        config = {"plan": plan, "selection": "threshold", "a": 0, "b": 0, "c": 0, **knobs}
        return make_record(median_us, device=device, config=config, policy="roofline-1")

    return make


def test_each_near_familys_fastest_is_there(staged: Staged) -> None:
    favourites = [staged(10.0 + n / 100, a=n) for n in range(20)]
    others = [
        staged(11.9, selection="torch_topk"),
        staged(11.5, plan="persistent"),
        staged(11.6, plan="persistent", a=1),
    ]
    chosen = shortlist([*others, *favourites])
    assert len(chosen) == MOST
    assert chosen[-2:] == [others[1], others[0]]
    assert others[2] not in chosen
    assert chosen == sorted(chosen, key=lambda record: record.measurement.median_us or 0.0)


def test_a_family_that_is_far_slower_takes_no_place_from_faster_ones(staged: Staged) -> None:
    favourites = [staged(10.0 + n / 100, a=n) for n in range(MOST)]
    far = staged(12.1, plan="persistent", b=7, c=7)  # more than 1.2 times as slow
    assert shortlist([far, *favourites]) == favourites
    assert shortlist([far, *favourites[1:]])[-1] == far, "where places are left"


def test_families_take_fewer_places_on_the_architecture_that_the_model_was_fitted_to(
    staged: Staged,
) -> None:
    def records(device: str) -> list[Record]:
        ones = [staged(10.0 + n / 100, device=device, a=n, b=n, c=n) for n in range(MOST)]
        return [*ones, staged(11.5, plan="persistent", device=device, b=7, c=7)]

    for device in ("nvidia-h100", "nvidia-h200"):
        assert shortlist(records(device)) == records(device)[:MOST], device
    for device in ("agx-orin", "nvidia-a100", "agx-thor", "cpu-of-nobody"):
        assert shortlist(records(device))[-1].config["plan"] == "persistent", device
    assert find_device(shipped_model().device).arch == FITTED


def test_of_more_families_than_places_the_fastest_are_kept(staged: Staged) -> None:
    records = [staged(10.0 + n / 10, plan=f"plan{n}") for n in range(12)]
    assert shortlist(records) == records[:MOST]


def test_a_config_unlike_the_chosen_goes_before_a_slightly_faster_twin(staged: Staged) -> None:
    best = staged(10.0)
    twin, unlike = staged(10.1, a=1), staged(10.5, a=1, b=1, c=1)  # count as 13.13 and 11.55
    assert shortlist([best, twin, unlike], 2) == [best, unlike]
    far_slower = staged(12.0, a=1, b=1, c=1)  # counts as 13.2
    assert shortlist([best, twin, far_slower], 2) == [best, twin]


def test_likeness_is_to_the_nearest_of_all_that_were_chosen(staged: Staged) -> None:
    best, second = staged(10.0), staged(10.1, a=1, b=1, c=1)
    twin_of_second, third = staged(10.2, a=1, b=1, c=2), staged(10.6, a=2, b=2, c=3)
    assert shortlist([best, second, twin_of_second, third], 3) == [best, second, third]


def test_failures_and_ties(staged: Staged) -> None:
    assert shortlist([]) == []
    assert shortlist([staged(None)]) == []
    tied = [staged(10.0, a=n) for n in range(4)]
    assert shortlist(tied[::-1], 3) == shortlist(tied, 3) == tied[:3]


def test_knobs_apart_counts_what_only_one_has() -> None:
    assert knobs_apart({"plan": "a", "x": 1}, {"plan": "a", "x": 1}) == 0
    assert knobs_apart({"plan": "a", "x": 1}, {"plan": "b", "y": 1}) == 3
