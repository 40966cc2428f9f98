"""A lock that processes share through a file, and that the system takes back when one dies.

Usage:
    with hold(path, seconds=20.0) as lock:
        if lock is None: …           # another process kept it all the time
        lock.left                    # what the holder noted who died with it; else empty
        lock.note("what I am at")
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BETWEEN_TRIES = 0.05  # seconds
_MOST_BYTES = 4096


class Lock:
    """A lock that is held. Notes are for whoever comes next if this process dies."""

    def __init__(self, descriptor: int) -> None:
        """Read what the holder before left, who had no time to clear it."""
        self._descriptor = descriptor
        self.left = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace")

    def note(self, text: str) -> None:
        """Replace the note; an empty one clears it."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode()[:_MOST_BYTES], 0)


@contextmanager
def hold(path: Path, seconds: float) -> Iterator[Lock | None]:
    """The lock of the file `path`, or None where another holds it for so long.

    Raises OSError where the file can't be made or locked. The file stays: whoever removed it
    would take it from under those who wait.
    """
    end = time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
        yield Lock(descriptor)
    finally:
        os.close(descriptor)
