"""Progress where there is no terminal, and how long it says that work will take."""

import pytest

from flashtune.tuner.progress import LINE_SECONDS, StepProgress, TimeLeft


def test_lines_come_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("flashtune.tuner.progress.time.monotonic", lambda: now)
    with StepProgress("clustering", total=3) as progress:
        progress.show(1, "fit 0.5")
        assert capsys.readouterr().err == ""
        now += LINE_SECONDS
        progress.show(2, "fit 0.6")
        progress.show(3)
    assert capsys.readouterr().err == "clustering: 2/3, fit 0.6, about 10 s left\n"


def paces(first: float, steps: list[float]) -> list[tuple[float, float]]:
    """For each step from the tenth on: the seconds left that are shown, and those that are."""
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashtune.tuner.progress.time.monotonic", lambda: clock[0])
        left, found = TimeLeft(), []
        for done, seconds in enumerate([first, *steps], start=1):
            clock[0] += seconds
            left.step(done)
            ends = left.ends(len(steps) + 1)
            if done >= 10 and done <= len(steps):
                assert ends is not None
                found.append((ends - clock[0], sum(steps[done - 1 :])))
        return found


@pytest.mark.parametrize(
    "steps",
    [[0.3] * 59, [0.05, 0.55] * 30, [0.0, 0.0, 0.0, 1.2] * 15, [1.0] * 30 + [0.6] * 30],
    ids=["even", "uneven", "four at a time", "faster later"],
)
def test_the_time_left_is_right_within_a_factor_of_two(steps: list[float]) -> None:
    """However long it takes until the first step is done."""
    for shown, real in paces(40.0, steps)[:-4]:
        assert real / 2 <= shown <= 2 * real


def test_the_time_left_is_not_more_than_the_time_allowed() -> None:
    left = TimeLeft()
    assert left.ends(10) is None and left.describe(10) == "time left not known yet"
    left.step(1)
    left.step(2)
    assert left.ends(10**9, stops=0.0) == 0.0
    assert left.describe(10**9, stops=0.0) == "about 0 s left"
