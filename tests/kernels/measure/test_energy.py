"""What a call takes of energy, by a counter that moves in steps on a clock of its own."""

from dataclasses import dataclass, field

import pytest

from flashtune.kernels.measure.energy import LEAST_SECONDS, joules_a_call
from flashtune.tuning_db.errors import MachineTroubleError


@dataclass
class Board:
    """Takes 300 W; a call takes 20 us, and the counter is brought up to date every 100 ms."""

    calls: int = 20
    watts: float = 300.0
    call_us: float = 20.0
    step_s: float = 0.1
    now: float = 3.0
    ran: int = 0
    looked: list[float] = field(default_factory=list)

    def sample(self, replays: int) -> list[float]:
        self.ran += replays * self.calls
        self.now += replays * self.calls * self.call_us * 1e-6
        return [self.call_us] * replays

    def joules(self) -> float:
        self.looked.append(self.now)
        return self.watts * self.step_s * (self.now // self.step_s)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.1, 0.4])
def test_calls_are_counted_from_one_step_of_the_counter_to_another(step_s: float) -> None:
    board = Board(step_s=step_s)
    found = joules_a_call(board, board.joules, board.clock)
    assert found == pytest.approx(300.0 * 20e-6, rel=0.02)
    assert board.now - 3.0 > LEAST_SECONDS
    assert board.now - 3.0 < LEAST_SECONDS + 2 * step_s + 0.1


def test_slow_calls_are_no_more_than_they_must_be() -> None:
    board = Board(call_us=40_000.0, calls=8)
    assert joules_a_call(board, board.joules, board.clock) == pytest.approx(12.0, rel=0.4)
    assert board.ran <= 5 * 8


def test_a_counter_that_stands_still_is_the_machines_trouble() -> None:
    board = Board()
    with pytest.raises(MachineTroubleError, match="does not advance"):
        joules_a_call(board, lambda: 5.0, board.clock)
    assert board.now < 15
