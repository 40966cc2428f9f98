"""Workers on the nodes of a Ray cluster: each is kept by an actor that holds its GPU or CPUs.

Usage:
    transport = RayTransport(node=node_id, num_gpus=1, num_cpus=1)
    WorkerPool([Place(name="node 1", transport=transport)])

An actor runs there what ssh runs at the other end of a connection (far_end.py), and passes lines
on: our code goes along, and a crash or a hang ends the worker and not the actor. Nothing of ours
need be installed on the nodes. Ray's placement says who has which GPU.
"""

import contextlib
import os
import secrets
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from flashtune.tuner.workers.answers.message import MOST_BYTES, ReplyError, clean
from flashtune.tuner.workers.connection import Connection, Ending
from flashtune.tuner.workers.far_end import GREETING
from flashtune.tuner.workers.ssh import bootstrap, preamble
from flashtune.tuner.workers.transport import WORKER


@dataclass(frozen=True, kw_only=True, slots=True)
class RayTransport:
    """Workers on one node, each of which has so many of its GPUs and CPUs to itself.

    node: its id. module: what runs there. One worker of each `token` lives at a time.
    """

    node: str
    num_gpus: int
    num_cpus: int
    module: str = WORKER
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def start(self) -> Connection:
        """Ask Ray for an actor; it comes when the node has room for it."""
        return RayConnection(self)


class RayConnection:
    """An actor that keeps a worker, and the lines to and from that."""

    has_more = False  # each answer is told by its own byte
    unsent = 0  # Ray takes everything

    def __init__(self, transport: RayTransport) -> None:
        """Ask for it, and begin."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self.connected = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._closing, self._closed = threading.Lock(), False
        self._ending = Ending(code=0, said="", why_lost=None)
        self._due: deque[Any] = deque()  # what was asked of the actor, and not taken yet
        options = ray.remote(relay()).options(
            num_gpus=transport.num_gpus,
            num_cpus=transport.num_cpus,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(transport.node, soft=False),
        )
        self._actor = options.remote()
        sent = preamble(transport.module, transport.token)
        self._expect(self._actor.begin.remote(bootstrap(), sent, GREETING))

    def fileno(self) -> int:
        """A pipe, into which a byte goes with each answer of the actor."""
        return self._reader

    def input(self) -> int | None:
        """Never: Ray takes everything."""
        return None

    def push(self) -> None:
        """Nothing: Ray takes everything."""

    @property
    def is_quiet(self) -> bool:
        """Whether it is there as far as is known: an actor speaks only when it is asked."""
        return not self._due

    def write(self, line: str) -> None:
        """Have the actor ask the worker."""
        self._expect(self._actor.ask.remote(line.encode() + b"\n", MOST_BYTES))

    def read(self) -> bytes | None:
        """What the worker answered; raises EOFError where it, or the actor, is gone."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 1)
        while self._due and self._ray.wait([self._due[0]], timeout=0)[0]:
            try:
                line, code, said = self._ray.get(self._due.popleft())
            except self._ray.exceptions.RayError as error:
                lost = clean(str(error).partition("\n")[0])
                self._ending = Ending(code=0, said="", why_lost=f"Ray: {lost}")
                raise EOFError from None
            if code is not None:
                words = said.strip().splitlines()
                self._ending = Ending(
                    code=code, said=clean(words[-1]) if words else "", why_lost=None
                )
                raise EOFError
            if not self.connected:
                self.connected = True
                continue
            if len(line) > MOST_BYTES:
                raise ReplyError(f"a line of more than {MOST_BYTES} bytes")
            return bytes(line).removesuffix(b"\n")
        return None

    def hang_up(self) -> None:
        """Kill the actor: what it keeps ends with it."""
        self._ray.kill(self._actor)

    def end(self, patience: float = 0.0) -> Ending:
        """Kill the actor; how the worker ended, if it did."""
        self.hang_up()
        with self._closing:
            if not self._closed:
                self._closed = True
                os.close(self._reader)
                os.close(self._writer)
        return self._ending

    def _expect(self, answer: Any) -> None:
        self._due.append(answer)
        answer.future().add_done_callback(self._wake)

    def _wake(self, _: object) -> None:
        """Called by a thread of Ray's, perhaps when all is over."""
        with self._closing:
            if not self._closed:
                os.write(self._writer, b".")


def relay() -> type:
    """The actor's class, which goes to the nodes as it is: flashtune need not be there.

    Its answers are a line, or the exit code of what it keeps and what that said last.
    """
    import subprocess
    import tempfile

    class Relay:
        child: Any
        errors: Any

        def begin(self, program: str, preamble: bytes, greeting: str) -> Any:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the actor lives
            self.child = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                start_new_session=True,
            )
            self.send(preamble)
            while line := self.child.stdout.readline(2**16):
                if line.decode(errors="replace").strip() == greeting:
                    return line, None, ""
            return self.ended()

        def ask(self, line: bytes, most: int) -> Any:
            self.send(line)
            answer = self.child.stdout.readline(most + 1)
            return (answer, None, "") if answer else self.ended()

        def send(self, data: bytes) -> None:
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.write(data)
                self.child.stdin.flush()

        def ended(self) -> Any:
            self.child.stdin.close()
            code = self.child.wait()
            size = self.errors.seek(0, 2)
            self.errors.seek(max(0, size - 2**16))
            said = self.errors.read().decode(errors="replace")
            return b"", 128 - code if code > 128 else code, said

    return Relay
