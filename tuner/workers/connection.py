"""What there is between a search and one worker: an interface, for `pool` alone.

`process.py` has connections to processes, `ray_worker.py` to actors of Ray.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a worker ended: its exit code, negative for a signal, and the last thing it said.

    why_lost: where it was not the worker that ended but the way to it, why.
    """

    code: int
    said: str
    why_lost: str | None


class Connection(Protocol):
    """One worker, started, and the lines to and from it. Nothing here waits for it but `end`."""

    connected: bool  # whether a worker is known to be there

    def fileno(self) -> int:
        """A descriptor that can be read from when `read` has something to say."""

    @property
    def unsent(self) -> int:
        """Bytes that it has not taken yet."""

    @property
    def floods(self) -> bool:
        """Whether it said more than is kept, so that `read` has something to say."""

    @property
    def is_quiet(self) -> bool:
        """Whether it lives and has said nothing since the line that was read last."""

    def write(self, line: str) -> None:
        """Hand over a line; a worker that is gone shows at the next read."""

    def push(self) -> None:
        """Hand over what it takes now of what was not taken yet."""

    def input(self) -> int | None:
        """A descriptor that can be written to when `push` can do something; None if nothing is."""

    def read(self) -> bytes | None:
        """The next line if it is complete.

        Raises EOFError when the worker is gone, and ReplyError for what no worker of ours sends.
        """

    def hang_up(self) -> None:
        """Have it ended, with all that it started."""

    def end(self, patience: float = 0.0) -> Ending:
        """End it unless it does so itself within `patience` seconds; wait until it is gone."""


class Transport(Protocol):
    """Starts workers in one place, each with its keeper. All of them speak lines of JSON."""

    def start(self) -> Connection:
        """Start a worker."""
