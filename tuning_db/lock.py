"""A lock that processes share through a file; the system releases it if its holder dies.

Usage:
    with hold(path, seconds=20.0) as lock:
        if lock is None: …           # another process held it all the time
        lock.left                    # the note of a holder that died with it; else empty
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

    Without support for locks there are no notes: another process may be at work.
    """

    def __init__(self, descriptor: int | None) -> None:
        """Read the note that a previous holder had no time to clear. None: without a lock."""
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
    """The lock of the file `path`, or None if another process holds it for `seconds`.

    A lock only avoids duplicate work. If there can be none (the file cannot be made, or the file
    system has no locks), the work is done without it. The file stays: removing it would break the
    lock for waiting processes.
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
    """The file, made unless it is there; None if it cannot be made.

    Notes replace its content, so it must be a regular file and not a link.
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
    """Whether files in a folder can be locked at all; True if that can't be determined."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file:
            for lock in (fcntl.flock, fcntl.lockf):  # SQLite uses the second kind
                try:
                    lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return False
    except OSError:
        return True
    return True
