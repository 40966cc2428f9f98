"""Where workers run, and how to start one there.

Usage:
    WorkerPool(here(4))       # on this machine; for others see ssh.py and ray_worker.py
    WorkerPool([Place(name="user@orin", transport=SshTransport(destination="user@orin"))])
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashtune.tuner.workers import keeper
from flashtune.tuner.workers.connection import Connection, Transport
from flashtune.tuner.workers.process import WorkerProcess

WORKER = "flashtune.tuner.workers.worker"


def _own_worker() -> Sequence[str]:
    """The command that runs a worker with the modules of this process.

    Not with `-m`, which would look for them in the current folder first.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
        f"runpy.run_module({WORKER!r}, run_name='__main__')"
    )
    return (sys.executable, "-c", program)


class LocalTransport:
    """Workers on this machine; implements `process.Command`."""

    preamble = b""
    greeting = ""

    def __init__(
        self, command: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """Default: this flashtune's worker in this Python. environment: added to ours."""
        kept = (sys.executable, "-I", "-S", str(Path(keeper.__file__)))
        self.command = (*kept, *(command or _own_worker()))
        self.environment = {**os.environ, **environment} if environment else None

    def start(self) -> Connection:
        """Start a child process."""
        return WorkerProcess(self)

    def why_lost(self, code: int, errors: str) -> str | None:
        """Never: there is no connection to lose."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A place for one worker at a time. name: unique in a pool, shown to the user.

    site: workers of one site share compiled kernels.
    """

    name: str
    transport: Transport = field(default_factory=LocalTransport)
    site: str = ""


Roster = Callable[[], Sequence[Place]]  # the places available now: they may come and go
Places = Sequence[Place] | Roster


def here(count: int, transport: Transport | None = None) -> list[Place]:
    """`count` places on this machine, or where the transport leads."""
    found = transport or LocalTransport()
    return [Place(name=f"here {number}", transport=found) for number in range(1, count + 1)]
