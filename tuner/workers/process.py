"""One worker process, here or at the end of a connection, and the lines to and from it.

Usage:
    process = WorkerProcess(transport)
    process.write(line)
    process.read()      # a line once it is complete; select on process.stdout to wait for it
    process.end()       # kill it, and hear how it ended
"""

import contextlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO

from flashtune.tuner.workers.transport import Transport

PIPE_BYTES = 2**18  # a preamble must fit, so that writing it does not wait for a connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a worker ended: its exit code, negative for a signal, and the last thing it said.

    why_lost: where it was not the worker that ended but the way to it, why.
    """

    code: int
    said: str
    why_lost: str | None


class WorkerProcess:
    """A process that reads and writes lines."""

    def __init__(self, transport: Transport) -> None:
        """Start it, and hand over the transport's preamble."""
        self._transport = transport
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.popen = subprocess.Popen(
            transport.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the search, which then ends its workers
            pipesize=PIPE_BYTES if transport.preamble else -1,
        )
        assert self.popen.stdin and self.popen.stdout
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self._buffer = b""
        self._errors_from = 0
        self._ending: Ending | None = None
        self.connected = not transport.greeting
        self._write(transport.preamble)

    def write(self, line: str) -> None:
        """Hand over a line; a process that is gone shows at the next read."""
        self._write(line.encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(data)
            self.stdin.flush()

    def read(self) -> str | None:
        """The next line if it is complete; raises EOFError when the process is gone.

        What comes before the greeting is not the worker's: a login shell may print things.
        """
        chunk = self.stdout.read()
        self._buffer += chunk or b""
        line, found, rest = self._buffer.partition(b"\n")
        while found:
            self._buffer = rest
            if self.connected:
                return line.decode()
            self._greet(line)
            line, found, rest = rest.partition(b"\n")
        if chunk == b"":
            raise EOFError
        return None

    def _greet(self, line: bytes) -> None:
        """Take the greeting; what the connection had to say so far is not the worker's either."""
        self.connected = line.decode(errors="replace") == self._transport.greeting
        if self.connected:
            self._errors_from = os.fstat(self._errors.fileno()).st_size

    def end(self, patience: float = 0.0) -> Ending:
        """Kill it with all that it started, unless it ends by itself within `patience` seconds.

        Said once more, it is the same ending.
        """
        if self._ending is not None:
            return self._ending
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, 9)
        code = self.popen.wait()
        self._errors.seek(0)
        errors = self._errors.read()
        said = errors[self._errors_from :].decode(errors="replace").strip().splitlines()
        why_lost = self._transport.why_lost(code, errors.decode(errors="replace"))
        for stream in (self.stdin, self.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._ending = Ending(
            code=self._transport.exit_code(code),
            said=said[-1] if said else "",
            why_lost=why_lost,
        )
        return self._ending
