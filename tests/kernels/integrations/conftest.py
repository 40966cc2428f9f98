"""Models in these tests are so small that their dense heads are faster."""

import pytest


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashHead answers all the same."""
    monkeypatch.setenv("FLASHHEAD_ENABLED", "always")
