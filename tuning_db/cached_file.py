"""Files and folders of a cache: written whole or not at all, and checked before they are used.

Usage:
    content = whole(path)      # None: absent, truncated, changed, without seal, or not private
    if content is None:
        keep(path, content := compute())
    if not is_whole_folder(folder, files):
        keep_folder(folder, files)         # files: {"flashtune/a.py": b"…"}

A file ends in its own SHA-256, so that the remains of a power cut or a full disk are not trusted.
Loaders of shared libraries ignore anything after the sections that a library's header names. These
files are executed: only files that no other user can have written are read. This module uses only
the standard library: it is also sent to machines that have nothing else.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from flashtune.tuning_db.private_folder import make_private, read_private

BUILD = "build-"  # prefix of the names of temporary folders
_LEFT_SECONDS = 3600.0  # far longer than any build takes
_MARK = b"\nflashtune sha256 "
_SEAL_BYTES = len(_MARK) + 64


def _seal(content: bytes) -> bytes:
    return _MARK + hashlib.sha256(content).hexdigest().encode()


def whole(path: Path) -> bytes | None:
    """The content of `path` without its seal.

    None unless it is there as written, and nobody else can have written it.
    """
    data = read_private(path)
    if data is None:
        return None
    content = data[:-_SEAL_BYTES]
    return content if data[-_SEAL_BYTES:] == _seal(content) and len(data) >= _SEAL_BYTES else None


def keep(path: Path, content: bytes) -> None:
    """Write a file and its seal, sync it, and rename it; others see all of it or nothing.

    Makes the folder. Raises OSError if that fails or others can write to it, with `path`
    unchanged.
    """
    make_private(path.parent)
    _sweep(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=BUILD) as folder:
        fresh = Path(folder, path.name)
        _write(fresh, content + _seal(content))
        os.replace(fresh, path)
    _sync(path.parent)


def is_whole_folder(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a folder has exactly these files, by relative name, with this content.

    Also, nobody else can have written them, or can write to them now.
    """
    found = set()
    for parent, folders, names in os.walk(folder):
        if any(Path(parent, name).is_symlink() for name in ("", *folders)):
            return False
        found |= {str(Path(parent, name).relative_to(folder)) for name in names}
    return found == set(files) and all(
        read_private(Path(folder, name)) == data for name, data in files.items()
    )


def keep_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files, replacing one that is not whole.

    Raises OSError if that fails, or others can write to its parent folder.
    """
    make_private(folder.parent)
    _sweep(folder.parent)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=BUILD, ignore_cleanup_errors=True
    ) as parent:
        fresh, broken = Path(parent, "fresh"), Path(parent, "broken")
        for name, data in files.items():
            path = Path(fresh, name)
            make_private(path.parent)
            _write(path, data)
        for path in (fresh, *(each for each in fresh.rglob("*") if each.is_dir())):
            _sync(path)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(broken)
        try:
            fresh.rename(folder)
        except OSError:
            if not is_whole_folder(folder, files):  # else another process was faster
                raise
        shutil.rmtree(broken, ignore_errors=True)
    _sync(folder.parent)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left behind."""
    for each in folder.glob(f"{BUILD}*"):
        with contextlib.suppress(OSError):
            if time.time() - each.lstat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(each)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make names durable if the file system can; otherwise a file is made again at worst."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
