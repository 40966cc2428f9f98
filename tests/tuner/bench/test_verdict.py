"""The rule by which a head is recommended and chosen."""

import pytest

from flashtune.kernels.measure.timing import Timing
from flashtune.tuner.bench.verdict import Judged, judge


def head(name: str, step_us: float, same: int, *, size: int = 60, spread: float = 0.0) -> Judged:
    return Judged(
        name=name,
        step=Timing(step_us, spread, 9),
        speed=1110 / step_us,
        same=same,
        answers=20,
        added_bytes=size,
        dense=name == "dense",
    )


DENSE = head("dense", 1110, 20, size=0)


@pytest.mark.parametrize(
    ("heads", "picked", "said"),
    [
        # Faster by 3 % of a step, for all of the answers: not worth it.
        ([head("192", 1000, 0), head("all", 1030, 20)], "all", "192 (1.11 x"),
        ([head("192", 1000, 0), head("all", 1030, 20)], "all", "takes 2.9% less time per step"),
        ([head("192", 1000, 0), head("all", 1049, 20)], "all", "but keeps fewer answers"),
        # Faster by more: what keeps the answers is named, and what it costs.
        ([head("192", 1000, 3), head("all", 1060, 20)], "192", "to keep 95% of the answers, use"),
        ([head("192", 1000, 3), head("all", 1060, 20)], "192", "takes 6% longer"),
        ([head("192", 1000, 3), head("384", 1040, 9)], "384", "dense, whose step takes 7% longer"),
        ([head("192", 1000, 20), head("all", 1030, 20)], "192", "192 (1.11 x the dense head's"),
        ([head("192", 1000, 20), head("all", 1030, 20)], "192", "answers the same): the fastest"),
        ([head("192", 1000, 20), head("a", 1001, 20, size=9, spread=5)], "a", "adds less memory"),
        # A FlashHead that gains less than 5 % is not recommended over the dense head.
        ([head("192", 1080, 19)], "dense", "192 (1.03 x"),
        ([head("192", 1080, 19)], "dense", "takes 2.7% less time per step but keeps fewer"),
        ([head("192", 1100, 20, spread=20)], "dense", "0.9% less time per step but needs more"),
        ([head("192", 800, 20, spread=400)], "dense", "(within the spread) but needs more memory"),
        ([head("192", 1200, 20)], "dense", "dense: the fastest"),
    ],
)  # fmt: skip
def test_answers_are_given_up_only_for_what_is_worth_it(
    heads: list[Judged], picked: str, said: str
) -> None:
    verdict = judge([DENSE, *heads])
    assert verdict.pick.name == picked
    assert said in verdict.describe()


def test_what_keeps_the_answers_is_the_fastest_of_those() -> None:
    verdict = judge([DENSE, head("192", 900, 8), head("all", 990, 20)])
    assert verdict.pick.name == "192"
    assert verdict.keeper is not None and verdict.keeper.name == "all"


def test_no_answers_are_given_up_for_what_may_be_noise() -> None:
    heads = [head("192", 1000, 3), head("all", 1100, 20, spread=60)]
    verdict = judge(heads)
    assert verdict.pick.name == "all"
    assert "less time per step (within the spread) but" in verdict.describe()
    heads[1] = head("all", 1100, 20, spread=40)
    assert judge(heads).pick.name == "192"


def test_none_may_keep_the_answers() -> None:
    verdict = judge([head("192", 1000, 3), head("all", 1020, 18)])
    assert verdict.pick.name == "all" and verdict.keeper is None
    assert verdict.describe().endswith("none keeps 95% of the answers")
