import pwd
from pathlib import Path

import platformdirs
import pytest

from flashtune.tuning_db import environment
from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.store import Store, default_path


def test_the_variables_name_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", "/some/where.db")
    monkeypatch.setenv("FLASHTUNE_CACHE", "~/cache")
    assert environment.database_path() == default_path() == Path("/some/where.db")
    monkeypatch.setenv("FLASHTUNE_TABLES", "~/tables")
    assert environment.cache_dir() == Path.home() / "cache"
    assert environment.tables_folder() == Path.home() / "tables"


def test_a_cache_is_where_it_was_named_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setenv("FLASHTUNE_CACHE", "-cache")
    assert environment.cache_dir() == gone / "-cache"
    gone.rmdir()
    with pytest.raises(MachineTroubleError, match="-cache is relative to the current folder"):
        environment.cache_dir()


@pytest.mark.parametrize("value", [None, ""])
def test_without_them_the_user_s_folders_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    for name in ("FLASHTUNE_DB", "FLASHTUNE_CACHE", "FLASHTUNE_TABLES"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: tmp_path / "c")
    assert environment.database_path() == tmp_path / "flashtune" / "tuning.db"
    assert environment.cache_dir() == tmp_path / "c"
    assert environment.tables_folder() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [True, False])
def test_a_user_without_a_home_is_told_what_to_set(
    named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "FLASHTUNE_DB", "FLASHTUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if named:
        monkeypatch.setenv("FLASHTUNE_DB", "~/tuning.db")
        monkeypatch.setenv("FLASHTUNE_CACHE", "~nobody-at-all/cache")
    with pytest.raises(FlashtuneError, match="no home folder: set FLASHTUNE_DB to a file"):
        environment.database_path()
    with pytest.raises(FlashtuneError, match="no home folder: set FLASHTUNE_CACHE to a folder"):
        environment.cache_dir()
    with pytest.raises(FlashtuneError, match="no home folder"), Store(default_path()):
        pass
    with pytest.raises(FlashtuneError, match="does not exist"):
        Store(tmp_path / "no" / "tuning.db")
    assert not list(tmp_path.iterdir())
