"""Files that are written whole or not at all.

Usage:
    write_whole(Path("made.json"), data)     # FlashtuneError: what was there is as it was

A link stays one: the file that it leads to is replaced. What is no file, as a pipe or
`/dev/stdout`, is written to and never replaced.
"""

import os
import stat
import tempfile
from pathlib import Path

from flashtune.tuning_db.errors import FlashtuneError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in place of one that is there. Raises FlashtuneError."""
    try:
        if _is_other_than_file(path):
            _write_into(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as error:  # ValueError: a null character
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FlashtuneError(
            f"cannot write {path} ({why}), it was left as it was: "
            "check the folder and the space on the disk"
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
    """Write to a pipe that somebody reads, or to a device."""
    with open(path, "wb", opener=_open_at_once) as file:
        os.set_blocking(file.fileno(), True)
        file.write(data)


def _open_at_once(name: str, flags: int) -> int:
    """Waits for no reader of a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)
