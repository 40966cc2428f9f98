"""One worker process, here or behind ssh, and the lines to and from it.

Usage:
    process = WorkerProcess(transport)
    process.write(line)
    wait_for_any([process], seconds)    # those with something to read
    process.read()                      # a line once it is complete
    process.end()                       # end it, and learn how it ended

Only `wait_for_any` and `end` wait for a process, and all input from one is bounded.
"""

import contextlib
import math
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Protocol, TypeVar

from flashtune.tuner.workers.answers.message import MOST_BYTES, ReplyError, clean
from flashtune.tuner.workers.connection import Connection, Ending

END_SECONDS = 5.0  # for a keeper to end its command
PIECE_BYTES = 2**16
MOST_ERRORS = 2**16  # last bytes of standard error that are read
MOST_ON_DISK = 2**24  # bytes of standard error: a keeper passes on far less


class Command(Protocol):
    """A transport whose workers are processes of this machine, or are reached through one."""

    @property
    def command(self) -> Sequence[str]:
        """What to run here."""

    @property
    def environment(self) -> Mapping[str, str] | None:
        """The environment of the process; None for ours."""

    @property
    def preamble(self) -> bytes:
        """Bytes for its standard input before the first line."""

    @property
    def greeting(self) -> str:
        """The line to wait for, which says that a worker is there; empty if none comes."""

    def why_lost(self, code: int, errors: str) -> str | None:
        """Why the connection was lost; None if it is the worker that ended.

        code: the command's exit code. errors: all its output on standard error.
        """


class WorkerProcess:
    """A process that reads and writes lines."""

    def __init__(self, transport: Command) -> None:
        """Start it, and begin to send the transport's preamble."""
        self._transport = transport
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.popen = subprocess.Popen(
            transport.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=transport.environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the search, which ends its workers
        )
        assert self.popen.stdin and self.popen.stdout
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout
        for stream in (self.stdin, self.stdout):
            os.set_blocking(stream.fileno(), False)
        self._arrived, self._unsent = b"", bytearray()
        self._errors_from = 0
        self._ending: Ending | None = None
        self.connected = not transport.greeting
        self._write(transport.preamble)

    def fileno(self) -> int:
        """Its standard output."""
        return self.stdout.fileno()

    def input(self) -> int | None:
        """Its standard input, while there is something to send."""
        return self.stdin.fileno() if self._unsent else None

    @property
    def unsent(self) -> int:
        """Bytes that the process has not taken yet."""
        return len(self._unsent)

    @property
    def is_quiet(self) -> bool:
        """Whether it is alive and has sent nothing since the last line that was read."""
        return not self._arrived and not wait_for_any([self], 0.0)

    @property
    def has_more(self) -> bool:
        """Whether another line came with the last one, or more on standard error than is kept."""
        return b"\n" in self._arrived or self._floods

    @property
    def _floods(self) -> bool:
        return os.fstat(self._errors.fileno()).st_size > MOST_ON_DISK

    def write(self, line: str) -> None:
        """Send a line; a process that is gone is noticed at the next read."""
        self._write(line.encode() + b"\n")

    def _write(self, data: bytes) -> None:
        self._unsent += data
        self.push()

    def push(self) -> None:
        """Send as much as it takes now."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self.stdin.fileno(), self._unsent[:PIECE_BYTES])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()

    def read(self) -> bytes | None:
        """The next line, if it is complete; raises EOFError if the process is gone.

        Output before the greeting is not the worker's: a login shell may print things. Raises
        ReplyError if more comes than any of our workers sends.
        """
        if self._floods:
            raise ReplyError(f"more than {MOST_ON_DISK} bytes on standard error")
        try:
            piece = os.read(self.stdout.fileno(), PIECE_BYTES)
        except BlockingIOError:
            return self._line()
        self._arrived += piece
        line = self._line()
        if line is None and not piece:
            raise EOFError
        if line is None and len(self._arrived) > MOST_BYTES:
            raise ReplyError(f"a line of more than {MOST_BYTES} bytes")
        return line

    def _line(self) -> bytes | None:
        line, found, rest = self._arrived.partition(b"\n")
        while found:
            self._arrived = rest
            if self.connected:
                return line
            self._greet(line)
            line, found, rest = rest.partition(b"\n")
        return None

    def _greet(self, line: bytes) -> None:
        """Accept the greeting; the connection's messages so far are not the worker's either."""
        self.connected = line.decode(errors="replace") == self._transport.greeting
        if self.connected:
            self._errors_from = os.fstat(self._errors.fileno()).st_size

    def hang_up(self) -> None:
        """Have its keeper, local or remote, end it with every process that it started."""
        self.stdin.close()

    def end(self, patience: float = 0.0) -> Ending:
        """End it with every process that it started, unless it ends within `patience` seconds.

        Waits until it is gone. Another call returns the same ending.
        """
        if self._ending is not None:
            return self._ending
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience)
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, 9)
        code = self.popen.wait()
        said = self._said(self._errors_from).splitlines()
        why_lost = self._transport.why_lost(code, self._said(0))
        self.stdout.close()
        self._errors.close()
        self._ending = Ending(
            code=128 - code if code > 128 else code,  # a keeper exits as a shell does
            said=clean(said[-1]) if said else "",
            why_lost=clean(why_lost) if why_lost is not None else None,
        )
        return self._ending

    def _said(self, start: int) -> str:
        """The end of standard error, ignoring its first `start` bytes."""
        size = os.fstat(self._errors.fileno()).st_size
        self._errors.seek(max(start, size - MOST_ERRORS))
        return self._errors.read(MOST_ERRORS).decode(errors="replace").strip()


Some = TypeVar("Some", bound=Connection)


def wait_for_any(connections: Sequence[Some], seconds: float) -> list[Some]:
    """The connections whose `read` has something to return; waits for any at most `seconds`.

    Meanwhile unsent bytes are sent.
    """
    poll = select.poll()  # cheaper than a selector, which keeps a record of each descriptor
    sending: dict[int, Some] = {}
    for each in connections:
        poll.register(each.fileno(), select.POLLIN)
        if (descriptor := each.input()) is not None:
            poll.register(descriptor, select.POLLOUT)
            sending[descriptor] = each
    ready = {descriptor for descriptor, _ in poll.poll(math.ceil(1000 * seconds))}
    readable = {id(each) for each in connections if each.fileno() in ready}
    for descriptor in ready & sending.keys():
        sending[descriptor].push()
    return [each for each in connections if id(each) in readable or each.has_more]
