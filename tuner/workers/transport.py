"""Where workers run, and how one is started there.

Usage:
    WorkerPool(here(4))       # on this machine; ssh.py and ray_worker.py have transports to others
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
    """What runs a worker with the modules of this process.

    Not by `-m`, which would look for them in the folder that one happens to be in first.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
        f"runpy.run_module({WORKER!r}, run_name='__main__')"
    )
    return (sys.executable, "-c", program)


class LocalTransport:
    """Workers on this machine, as `process.Command` has them."""

    preamble = b""
    greeting = ""

    def __init__(
        self, command: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """By default this Python's and this flashtune's worker. environment: added to ours."""
        kept = (sys.executable, "-I", "-S", str(Path(keeper.__file__)))
        self.command = (*kept, *(command or _own_worker()))
        self.environment = {**os.environ, **environment} if environment else None

    def start(self) -> Connection:
        """Start a process of ours."""
        return WorkerProcess(self)

    def why_lost(self, code: int, errors: str) -> str | None:
        """Never: there is nothing between."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Room for one worker at a time. name: unique in a pool, for a person.

    site: workers of one site find there what a compiler of that site compiled.
    """

    name: str
    transport: Transport = field(default_factory=LocalTransport)
    site: str = ""


Roster = Callable[[], Sequence[Place]]  # the places that there are now: they may come and go
Places = Sequence[Place] | Roster


def here(count: int, transport: Transport | None = None) -> list[Place]:
    """So many places on this machine, or where the transport leads."""
    found = transport or LocalTransport()
    return [Place(name=f"here {number}", transport=found) for number in range(1, count + 1)]
