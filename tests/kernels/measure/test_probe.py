"""What a probe makes of the times that a device gives, by devices of straight lines."""

from dataclasses import dataclass

import pytest

from flashtune.kernels.measure.probe import REPEATS, probe


@dataclass
class Line:
    """A device on which one more of a thing takes so long, and to begin 7 us, at times more."""

    read: float | None = 100.0
    launch: float | None = 1.25
    overlapped: float | None = 0.5
    load: float | None = 0.6
    barrier: float | None = 2.0
    read_bytes: int = 2**28
    calls: int = 0

    def _time(self, each: float | None, count: int) -> float | None:
        self.calls += 1
        late = 1000.0 if self.calls % (2 * REPEATS) == 0 else 0.0  # something else ran once
        return None if each is None else 7.0 + each * count + late

    def read_us(self, count: int) -> float | None:
        return self._time(self.read, count)

    def launch_us(self, count: int) -> float | None:
        return self._time(self.launch, count)

    def overlapped_us(self, count: int) -> float | None:
        return self._time(self.overlapped, count)

    def load_us(self, count: int) -> float | None:
        return self._time(self.load, count)

    def barrier_us(self, count: int) -> float | None:
        return self._time(self.barrier, count)


def test_what_comes_once_does_not_count_nor_does_what_came_in_between() -> None:
    figures = probe(Line())
    assert figures.bandwidth == pytest.approx(2**28 / 100e-6)
    assert figures.launch_us == pytest.approx(1.25)
    assert figures.overlapped_us == pytest.approx(0.5)
    assert figures.load_us == pytest.approx(0.6)
    assert figures.barrier_us == pytest.approx(2.0)


def test_what_a_device_has_not_is_unknown() -> None:
    figures = probe(Line(overlapped=None, barrier=None))
    assert (figures.overlapped_us, figures.barrier_us) == (None, None)
    assert figures.launch_us == pytest.approx(1.25)


def test_a_line_that_falls_is_noise() -> None:
    figures = probe(Line(load=-0.001, read=0.0))
    assert (figures.load_us, figures.bandwidth) == (None, None)
