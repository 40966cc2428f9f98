from pathlib import Path

import platformdirs
import pytest

from flashtune.tuning_db import environment
from flashtune.tuning_db.store import default_path


def test_the_variables_name_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", "/some/where.db")
    monkeypatch.setenv("FLASHTUNE_CACHE", "~/cache")
    assert environment.database_path() == default_path() == Path("/some/where.db")
    assert environment.cache_dir() == Path.home() / "cache"


@pytest.mark.parametrize("value", [None, ""])
def test_without_them_the_user_s_folders_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    for name in ("FLASHTUNE_DB", "FLASHTUNE_CACHE"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: tmp_path / "c")
    assert environment.database_path() == tmp_path / "flashtune" / "tuning.db"
    assert environment.cache_dir() == tmp_path / "c"
    assert not list(tmp_path.iterdir())
