"""FlashHead timed against the dense layer that it stands for."""

import time

import pytest
import torch

from flashtune.kernels.measure import contest as module
from flashtune.kernels.measure.contest import Verdict, contest


@pytest.mark.parametrize(
    ("verdict", "wins"),
    [
        (Verdict(90.0, 100.0), True),
        (Verdict(97.5, 100.0), False),  # within the margin
        (Verdict(110.0, 100.0), False),
        (Verdict(60.0, 100.0, head_host_us=40.0, dense_host_us=20.0), True),
        (Verdict(80.0, 100.0, head_host_us=40.0, dense_host_us=20.0), False),
        (Verdict(90.0, 100.0, head_host_us=10.0, dense_host_us=20.0), True),
        (Verdict(98.0, 100.0, head_host_us=10.0, dense_host_us=20.0), False),
        (Verdict(float("nan"), 100.0), False),
    ],
)
def test_who_wins(verdict: Verdict, wins: bool) -> None:
    assert verdict.wins is wins


def test_both_take_turns_on_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def layer(name: str, seconds: float) -> module.Layer:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            calls.append((name, hidden.shape))
            time.sleep(seconds)
            return hidden

        return run

    hidden = torch.zeros(3, 8)
    verdict = contest(layer("head", 0.001), layer("dense", 0.01), hidden)
    assert verdict.wins
    assert 1000 <= verdict.head_us < verdict.dense_us
    assert verdict.dense_us >= 10_000
    assert calls == [("head", (3, 8)), ("dense", (3, 8))] * (len(calls) // 2)
    assert len(calls) // 2 - 1 == module.TURNS
    calls.clear()
    monkeypatch.setattr(module, "SECONDS", 0.0)
    assert not contest(layer("head", 0.01), layer("dense", 0.001), hidden).wins
    assert len(calls) // 2 - 1 == module.LEAST_TURNS


def test_the_words_leave_out_a_host_that_was_not_timed() -> None:
    assert Verdict(24.14, 55.3).describe() == "24.1 us against 55.3 us"
    assert Verdict(1.0, 2.0, 3.0, 4.0).describe().endswith("(host: 3.0 us against 4.0 us)")
