"""The environment variables, read here and nowhere else.

`FLASHTUNE_DB` names the database file, `FLASHTUNE_CACHE` the folder for rendered sources and
compiled kernels; `CXX`, as everywhere, the C++ compiler with its arguments. Of vLLM's plugin,
`FLASHHEAD_ENABLED` is 0 to turn it off, and `FLASHTUNE_SCREEN` says what heads are screened in.
All are read at each call, and an empty value counts as unset.
"""

import os
from collections.abc import Callable
from pathlib import Path

from flashtune.tuning_db.errors import MachineTroubleError

_DATABASE = "FLASHTUNE_DB to a file that can be written"
_CACHE = "FLASHTUNE_CACHE to a folder that can be written"


def default_data_folder() -> Path:
    """Where the database lives unless FLASHTUNE_DB says otherwise."""
    import platformdirs

    return _placed(lambda: platformdirs.user_data_dir("flashtune"), _DATABASE)


def database_path() -> Path:
    """FLASHTUNE_DB, else `tuning.db` in the user's data folder. Creates nothing.

    Raises MachineTroubleError for a user without a home folder.
    """
    named = os.environ.get("FLASHTUNE_DB")
    if named:
        return _placed(lambda: named, _DATABASE)
    return default_data_folder() / "tuning.db"


def cache_dir() -> Path:
    """FLASHTUNE_CACHE, else the user's cache folder. Creates nothing.

    Raises MachineTroubleError for a user without a home folder.
    """
    named = os.environ.get("FLASHTUNE_CACHE")
    if named:
        return _placed(lambda: named, _CACHE)
    import platformdirs  # here, because a machine that is tuned over ssh is told and has none

    return _placed(lambda: platformdirs.user_cache_dir("flashtune"), _CACHE)


def _placed(find: Callable[[], str], cure: str) -> Path:
    """The path found, with the home folder that `~` stands for."""
    try:
        return Path(find()).expanduser()
    except RuntimeError as error:  # neither HOME nor a user of that name
        raise MachineTroubleError(f"this user has no home folder: set {cure}") from error


def named_compiler() -> str:
    """CXX, or nothing. May hold arguments after the program."""
    return os.environ.get("CXX", "")


def flash_head_enabled() -> bool:
    """Whether vLLM's plugin may use FlashHead."""
    return os.environ.get("FLASHHEAD_ENABLED", "1") != "0"


def named_screen() -> str:
    """FLASHTUNE_SCREEN, or nothing."""
    return os.environ.get("FLASHTUNE_SCREEN", "").strip()
