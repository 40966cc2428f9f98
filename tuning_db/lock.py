"""A lock that processes share through a file, and that the system takes back when one dies.

Usage:
    with hold(path, seconds=20.0) as lock:
        if lock is None: …           # another process kept it all the time
        lock.left                    # what the holder noted who died with it; else empty
        lock.note("what I am at")
"""

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BETWEEN_TRIES = 0.05  # seconds
_MOST_BYTES = 4096


class Lock:
    """A lock that is held. Notes are for the next holder if this process dies.

    Where locks can't be had there are no notes: another process may be at work.
    """

    def __init__(self, descriptor: int | None) -> None:
        """Read what the holder before left, who had no time to clear it. None: without a lock."""
        self._descriptor = descriptor
        self.left = ""
        if descriptor is not None:
            self.left = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace")

    def note(self, text: str) -> None:
        """Replace the note; an empty one clears it."""
        if self._descriptor is None:
            return
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode()[:_MOST_BYTES], 0)


@contextmanager
def hold(path: Path, seconds: float) -> Iterator[Lock | None]:
    """The lock of the file `path`, or None where another holds it for so long.

    A lock only saves work that two would do. Where it can't be had (no such file can be made, or
    the file system knows no locks) the work is done without it. The file stays: removing it would
    take it from those who wait.
    """
    end = time.monotonic() + seconds
    descriptor = _opened(path)
    if descriptor is None:
        yield Lock(None)
        return
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    yield None
                    return
                time.sleep(_BETWEEN_TRIES)
            except OSError:
                yield Lock(None)
                return
        yield Lock(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int | None:
    """The file, made unless it is there; None where there can be none.

    Notes replace what is in it: not what a link leads to, and nothing but a file.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def knows_locks(folder: Path) -> bool:
    """Whether files of a folder can be locked at all; True where that can't be found out."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file:
            for lock in (fcntl.flock, fcntl.lockf):  # SQLite's are of the second kind
                try:
                    lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return False
    except OSError:
        return True
    return True
