"""Files that are written whole or not at all.

Usage:
    write_whole(Path("made.json"), data)     # on FlashtuneError an existing file is unchanged

A link stays a link: the file that it leads to is replaced. A pipe or a device such as
`/dev/stdout` is written to and never replaced.
"""

import os
import stat
import tempfile
from pathlib import Path

from flashtune.tuning_db.errors import FlashtuneError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, replacing an existing one. Raises FlashtuneError."""
    try:
        if _is_other_than_file(path):
            _write_into(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FlashtuneError(
            f"cannot write {path} ({why}), which was left unchanged: check the folder and the "
            "free disk space"
        ) from error


def _is_other_than_file(path: Path) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _replace(target: Path, data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        part = Path(folder, "part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)


def _write_into(path: Path, data: bytes) -> None:
    """Write to a pipe that has a reader, or to a device."""
    with open(path, "wb", opener=_open_at_once) as file:
        os.set_blocking(file.fileno(), True)
        file.write(data)


def _open_at_once(name: str, flags: int) -> int:
    """Open without waiting for a pipe's reader."""
    return os.open(name, flags | os.O_NONBLOCK)
