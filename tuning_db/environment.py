"""The environment variables, read here and nowhere else.

`FLASHTUNE_DB` names the database file, `FLASHTUNE_CACHE` the folder for rendered sources and
compiled kernels; `CXX`, as everywhere, the C++ compiler with its arguments.
All are read at each call, and an empty value counts as unset.
"""

import os
from pathlib import Path


def default_data_folder() -> Path:
    """Where the database lives unless FLASHTUNE_DB says otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("flashtune"))


def database_path() -> Path:
    """FLASHTUNE_DB, else `tuning.db` in the user's data folder. Creates nothing."""
    named = os.environ.get("FLASHTUNE_DB")
    return Path(named).expanduser() if named else default_data_folder() / "tuning.db"


def cache_dir() -> Path:
    """FLASHTUNE_CACHE, else the user's cache folder. Creates nothing."""
    named = os.environ.get("FLASHTUNE_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs  # here, because a machine that is tuned over ssh is told and has none

    return Path(platformdirs.user_cache_dir("flashtune"))


def named_compiler() -> str:
    """CXX, or nothing. May hold arguments after the program."""
    return os.environ.get("CXX", "")
