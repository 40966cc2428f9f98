"""How a worker process is started, and what its end means.

Usage:
    WorkerPool(4, LocalTransport())     # workers on this machine; ssh.py has them on another
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from flashtune.tuner.workers import keeper

_WORKER = "flashtune.tuner.workers.worker"


class Transport(Protocol):
    """Starts workers in one place, each with its keeper. All of them speak lines of JSON."""

    @property
    def command(self) -> Sequence[str]:
        """What to run here."""

    @property
    def preamble(self) -> bytes:
        """What goes to its standard input before the first line."""

    @property
    def greeting(self) -> str:
        """The line that says a worker is there, to be waited for; empty where none comes."""

    def why_lost(self, code: int, errors: str) -> str | None:
        """Why the way to the worker is gone, None where it is the worker that ended.

        code: how the command ended. errors: all that it said on standard error.
        """


def _own_worker() -> Sequence[str]:
    """What runs a worker with the modules of this process.

    Not by `-m`, which would look for them in the folder that one happens to be in first.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
        f"runpy.run_module({_WORKER!r}, run_name='__main__')"
    )
    return (sys.executable, "-c", program)


class LocalTransport:
    """Workers on this machine."""

    preamble = b""
    greeting = ""

    def __init__(self, command: Sequence[str] = ()) -> None:
        """By default this Python's and this flashtune's worker."""
        kept = (sys.executable, "-I", "-S", str(Path(keeper.__file__)))
        self.command = (*kept, *(command or _own_worker()))

    def why_lost(self, code: int, errors: str) -> str | None:
        """Never: there is nothing between."""
        return None
