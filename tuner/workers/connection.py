"""The connection between a search and one worker: an interface, used only by `pool`.

`process.py` has connections to processes, `ray_worker.py` to actors of Ray.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a worker ended: its exit code, negative for a signal, and the last thing it said.

    why_lost: if the connection was lost rather than the worker ended, the reason.
    """

    code: int
    said: str
    why_lost: str | None


class Connection(Protocol):
    """One started worker, and the lines to and from it. Only `end` waits for it."""

    connected: bool  # whether a worker is known to be there

    def fileno(self) -> int:
        """A descriptor that is readable when `read` has something to return."""

    @property
    def unsent(self) -> int:
        """Bytes that it has not taken yet."""

    @property
    def has_more(self) -> bool:
        """Whether `read` has something to report, readable or not: a line, or too much output."""

    @property
    def is_quiet(self) -> bool:
        """Whether it is alive and has sent nothing since the last line that was read."""

    def write(self, line: str) -> None:
        """Send a line; a worker that is gone is noticed at the next read."""

    def push(self) -> None:
        """Send as much of the unsent bytes as it takes now."""

    def input(self) -> int | None:
        """A descriptor that is writable when `push` can send; None if nothing is unsent."""

    def read(self) -> bytes | None:
        """The next line, if it is complete.

        Raises EOFError if the worker is gone, and ReplyError for input that none of our workers
        sends.
        """

    def hang_up(self) -> None:
        """Have it ended, with every process that it started."""

    def end(self, patience: float = 0.0) -> Ending:
        """End it unless it does so itself within `patience` seconds; wait until it is gone."""


class Transport(Protocol):
    """Starts workers in one place, each with its keeper. All exchange lines of JSON."""

    def start(self) -> Connection:
        """Start a worker."""
