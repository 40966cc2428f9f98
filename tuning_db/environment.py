"""The environment variables, read here and nowhere else.

`FLASHTUNE_DB` names the database file, `FLASHTUNE_TABLES` a folder of tables to use besides the
shipped ones, `FLASHTUNE_CACHE` the folder for rendered sources and compiled kernels; `CXX`, as
usual, the C++ compiler with its arguments. `FLASHHEAD_ENABLED` is `always` to let models use
FlashHead without timing it against their dense head, and 0 to turn vLLM's plugin off.
`FLASHTUNE_PROBES`, `FLASHTUNE_SCREEN`, `FLASHTUNE_TUNE` and `FLASHTUNE_VERIFY` are the plugin's
(docs/vllm.md). All are read at each call, and an empty value counts as unset.
"""

import os
from collections.abc import Callable
from pathlib import Path

from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError

_DATABASE = "FLASHTUNE_DB to a file that can be written"
_TABLES = "FLASHTUNE_TABLES to a folder without ~"
_CACHE = "FLASHTUNE_CACHE to a folder that can be written"


def default_data_folder() -> Path:
    """The folder of the database unless FLASHTUNE_DB names another."""
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


def tables_folder() -> Path | None:
    """FLASHTUNE_TABLES, or None. Raises MachineTroubleError for `~` if the user has no home."""
    named = os.environ.get("FLASHTUNE_TABLES")
    return _placed(lambda: named, _TABLES) if named else None


def cache_dir() -> Path:
    """FLASHTUNE_CACHE, else the user's cache folder. Creates nothing.

    The path is absolute: one that begins with `-` would be an option of the compiler. Raises
    MachineTroubleError for a user without a home folder.
    """
    named = os.environ.get("FLASHTUNE_CACHE")
    if named:
        return _absolute(_placed(lambda: named, _CACHE))
    import platformdirs  # here: a machine tuned over ssh gets the path and has no platformdirs

    return _absolute(_placed(lambda: platformdirs.user_cache_dir("flashtune"), _CACHE))


def _absolute(folder: Path) -> Path:
    try:
        return folder.absolute()
    except FileNotFoundError as error:
        raise MachineTroubleError(
            f"{folder} is relative to the current folder, which no longer exists: set {_CACHE}"
        ) from error


def _placed(find: Callable[[], str], cure: str) -> Path:
    """The path found, with `~` expanded to the home folder."""
    try:
        return Path(find()).expanduser()
    except RuntimeError as error:  # neither HOME nor a user of that name
        raise MachineTroubleError(f"this user has no home folder: set {cure}") from error


def named_compiler() -> str:
    """CXX, or empty. It may have arguments after the program."""
    return os.environ.get("CXX", "")


def flash_head_enabled() -> bool:
    """Whether vLLM's plugin may use FlashHead."""
    return _named("FLASHHEAD_ENABLED") != "0"


def flash_head_always() -> bool:
    """Whether models should use FlashHead even if it was not found to be faster."""
    return _named("FLASHHEAD_ENABLED").lower() == "always"


def named_screen() -> str:
    """FLASHTUNE_SCREEN, or empty."""
    return _named("FLASHTUNE_SCREEN")


def named_probes() -> int | None:
    """FLASHTUNE_PROBES, or None. Raises FlashtuneError unless it is an integer from 1 on."""
    text = _named("FLASHTUNE_PROBES")
    if text and not (text.isascii() and text.isdecimal() and int(text[:9]) > 0 and len(text) < 10):
        raise FlashtuneError(f"FLASHTUNE_PROBES must be a number of clusters, not {text!r}")
    return int(text) if text else None


def verifies_drafts() -> bool:
    """FLASHTUNE_VERIFY: whether FlashHead may be the head of a target that verifies drafts."""
    return _named("FLASHTUNE_VERIFY") not in ("", "0")


def named_tune(modes: tuple[str, ...]) -> str:
    """FLASHTUNE_TUNE, by default the first mode. Raises FlashtuneError for an unknown mode."""
    text = _named("FLASHTUNE_TUNE") or modes[0]
    if text not in modes:
        raise FlashtuneError(f"FLASHTUNE_TUNE must be one of {', '.join(modes)}, not {text!r}")
    return text


def _named(variable: str) -> str:
    return os.environ.get(variable, "").strip()
