"""Progress where there is no terminal."""

import pytest

from flashtune.tuner.progress import LINE_SECONDS, StepProgress


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
    assert capsys.readouterr().err == "clustering: 2/3, fit 0.6\n"
