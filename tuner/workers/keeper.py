"""Runs a worker, ends when its search ends, and leaves no process behind.

Usage:
    python keeper.py COMMAND …     # exits as COMMAND does: with 128 or more for a signal

The command and every process that it started are killed when it ends, when the other end of
standard input is closed (the kernel does so for a killed search), and when the keeper itself is
killed (then only the command). A process that left its group and lost its parent is found, too:
the kernel makes it a child of the keeper. Temporary files are removed with them, because killed
compilers leave theirs.

Replies go to the descriptor `REPLIES`, which is the keeper's standard output. The command's own
standard output and error are kept apart, and the end of them is passed on. This module uses only
the standard library: it is also sent to machines that have nothing else.
"""

import contextlib
import ctypes
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPLIES = 3  # the descriptor
MOST_SAID = 2**16  # last bytes of the command's output that are passed on
END_SECONDS = 60.0  # for killed processes to be gone
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Kept:
    """A running command, to be started by the main thread: the command ends with that thread."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; from now on standard output is standard error. Raises OSError."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._scratch = tempfile.mkdtemp(prefix="flashtune-")
        os.dup2(1, REPLIES)
        os.dup2(2, 1)
        self.child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**(os.environ if env is None else env), "TMPDIR": self._scratch},
            pass_fds=(REPLIES,),
            start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )
        os.close(REPLIES)
        self._said = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def end(self) -> None:
        """Kill it, so that `wait` returns. For other threads."""
        if self.child.poll() is None:
            kill(self.child.pid)

    def wait(self) -> int:
        """Its exit code, 128 or more for a signal, once none of its processes is left."""
        code = self.child.wait()
        end_descendants()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._listener.join(1.0)  # or a process that does not die holds the pipe
        with contextlib.suppress(OSError):
            os.write(2, self._said)
        return 128 - code if code < 0 else min(code, 127)

    def _listen(self) -> None:
        assert self.child.stdout
        while piece := os.read(self.child.stdout.fileno(), MOST_SAID):
            self._said = (self._said + piece)[-MOST_SAID:]


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends, which may have happened already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def kill(group: int) -> None:
    """Kill a group of processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_descendants() -> None:
    """Kill every descendant of this process, and wait until all are gone."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        for process in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _descendants(ancestor: int) -> list[int]:
    """The descendants of a process, including dead ones."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = Path(process, "stat").read_bytes().rpartition(b")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(process.name))
    found = list(children.get(ancestor, ()))
    for each in found:  # grows meanwhile
        found += children.get(each, ())
    return found


def _watch(kept: Kept) -> None:
    """End the command once the other end of standard input is closed."""
    closed = select.poll()
    closed.register(0, 0)
    closed.poll()
    kept.end()


def main() -> None:
    """Keep the command given by the arguments."""
    try:
        kept = Kept(sys.argv[1:])
    except OSError as error:
        sys.exit(str(error))
    threading.Thread(target=_watch, args=(kept,), daemon=True).start()
    os._exit(kept.wait())  # our thread still waits for input


if __name__ == "__main__":
    main()
