"""Workers on another machine, through OpenSSH's client, with our code sent along.

Usage:
    transport = SshTransport(destination="user@orin")
    WorkerPool([Place(name="user@orin", transport=transport)])

The connection uses the user's own configuration and keys. Nothing else goes over it: no agent, no
display, no forwarded port. The other machine keeps our code and the compilers' caches in
flashtune's cache folder there, and needs only torch and Triton of our dependencies.
"""

import functools
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from flashtune.tuner.workers import keeper
from flashtune.tuner.workers.connection import Connection
from flashtune.tuner.workers.far_end import GREETING
from flashtune.tuner.workers.process import WorkerProcess
from flashtune.tuner.workers.transport import WORKER
from flashtune.tuning_db import cached_file, private_folder

PYTHON = "python3"
LEAST_PYTHON = (3, 10)
LOST = 255  # ssh's exit code for all its own errors
NOT_FOUND = 127  # a shell's
OPTIONS = {
    "BatchMode": "yes",  # a prompt would wait forever
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",  # with the next: a dead connection is noticed in 40 s
    "ServerAliveCountMax": "3",
}
_DATA = ("devices.json",)


@dataclass(frozen=True, kw_only=True, slots=True)
class SshTransport:
    """Workers behind ssh connections, at most one alive per `token`.

    destination: anything that ssh accepts. python: the remote Python, as its shell would find it.
    module: the module to run there.
    """

    destination: str
    python: str = PYTHON
    module: str = WORKER
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    environment = None

    def start(self) -> Connection:
        """Start ssh."""
        return WorkerProcess(self)

    @property
    def greeting(self) -> str:
        """The line that far_end.py writes before the worker runs."""
        return GREETING

    @property
    def command(self) -> Sequence[str]:
        """ssh, and a line of Python that reads the rest."""
        options = [word for pair in OPTIONS.items() for word in ("-o", "=".join(pair))]
        far = f'{_quoted(self.python)} -c "{bootstrap()}"'
        return ("ssh", "-T", "-a", "-x", *options, "--", self.destination, far)

    @property
    def preamble(self) -> bytes:
        """far_end.py, its header, and our code."""
        return preamble(self.module, self.token)

    def why_lost(self, code: int, errors: str) -> str | None:
        """ssh's own message, if ssh itself failed."""
        if code != LOST:
            return None
        lines = errors.strip().splitlines() or ["the connection was lost"]
        said = " ".join(lines[-2:] if lines[-1].startswith("Host key") else lines[-1:])
        said = " ".join(said.removeprefix("ssh: ").split()).rstrip(".")
        return f"ssh {self.destination}: {said}"


def _quoted(python: str) -> str:
    """Quoted for the remote shell, which may expand a tilde, and nothing else."""
    home, slash, rest = python.partition("/")
    if slash and re.fullmatch(r"~[\w.-]*", home, re.ASCII):
        return f"{home}/{shlex.quote(rest)}"
    return shlex.quote(python)


def bootstrap() -> str:
    """The program that a remote Python starts with: it reads the rest from standard input."""
    least = ".".join(map(str, LEAST_PYTHON))
    return (
        f"import sys; sys.exit('Python {least} or later is needed, and this is %d.%d' % "
        f"sys.version_info[:2]) if sys.version_info < {LEAST_PYTHON} else "
        f"exec(sys.stdin.buffer.read({len(_far_end())}))"
    )


def preamble(module: str, token: str) -> bytes:
    """The rest: far_end.py, its header with the module to run, and our code."""
    archive = code_archive()
    header = {
        "size": len(archive),
        "digest": hashlib.sha256(archive).hexdigest(),
        "module": module,
        "token": token,
    }
    return _far_end() + json.dumps(header).encode() + b"\n" + archive


@functools.cache
def _far_end() -> bytes:
    """far_end.py, preceded by code that creates the modules it imports, still missing there."""
    first = "import sys, types\n"
    for name in (private_folder.__name__, cached_file.__name__, keeper.__name__):
        package, _, module = name.rpartition(".")
        source = resources.files(package).joinpath(f"{module}.py").read_text("utf-8")
        first += (
            f"module = types.ModuleType({name!r}); "
            f"exec({source!r}, module.__dict__); sys.modules[{name!r}] = module\n"
        )
    far_end = resources.files("flashtune.tuner.workers").joinpath("far_end.py")
    return first.encode() + far_end.read_bytes()


@functools.cache
def code_archive() -> bytes:
    """A zip of flashtune's own modules without templates, identical for identical code."""
    root = Path(str(resources.files("flashtune")))
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py") or name in _DATA
    ]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(paths):
            entry = zipfile.ZipInfo(str(Path("flashtune", path.relative_to(root))))
            file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive.getvalue()
