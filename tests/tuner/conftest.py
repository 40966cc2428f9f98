"""A tiny problem, a device that is not here, and spaces and records to search them with; and a
machine to reach over ssh, which is this one."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from loaded import loaded

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.config import Config, config_data, enabled, knobs
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

TOOLCHAIN = Toolchain(triton="3.6.0")
FreeSpace = Callable[..., Space]
Recorded = Callable[..., Record]


@pytest.fixture(scope="session")
def problem() -> Problem:
    return Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)


@pytest.fixture(scope="session")
def device() -> Device:
    return find_device("orin")


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return TOOLCHAIN


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as store:
        yield store


@pytest.fixture(scope="session")
def free_space(problem: Problem, device: Device) -> FreeSpace:
    """A space around the default with these knobs alone free: `free_space("slack", "evict")`."""

    def make(*free: str, problem: Problem = problem, device: Device = device) -> Space:
        default = default_config(problem, device)
        data = config_data(default)
        fixed = {
            name: data[name]
            for name in ("plan", *knobs(type(default)))
            if name not in free and (name == "plan" or enabled(type(default), name, data))
        }
        return Space(problem, device, fixed)

    return make


@pytest.fixture(scope="session")
def recorded(problem: Problem, device: Device) -> Recorded:
    """A record of a config: `recorded(config, 12.0)`; a time of None is a failure."""

    def make(
        config: Config,
        time_us: float | None,
        problem: Problem = problem,
        device: str = device.name,
        **changes: object,
    ) -> Record:
        measurement = Measurement(
            outcome=Outcome.CRASH if time_us is None else Outcome.OK,
            median_us=time_us,
            error="illegal access" if time_us is None else "",
            policy="search-behind",
        )
        values = {
            "device": device,
            "toolchain": TOOLCHAIN,
            "problem": problem,
            "config": config_data(config),
            "provenance": Provenance.MEASURED,
            "measurement": measurement,
            "created": "2026-01-31T12:00:00Z",
        }
        return Record(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def faulty_script() -> Path:
    """A worker with a pretended backend, which misbehaves by config."""
    return Path(__file__).parent / "workers" / "faulty_worker.py"


@pytest.fixture(scope="session")
def faulty(faulty_script: Path) -> ModuleType:
    """The pretended backend, in this process."""
    return loaded(faulty_script)


TESTS = Path(__file__).parent
PATIENCE = 60.0  # seconds for what takes milliseconds, on a busy machine
SSH_CONFIG = """
Host *
  HostName 127.0.0.1
  User {user}
  IdentitiesOnly yes
  GlobalKnownHostsFile none
Host refused
  Port {closed_port}
Host stranger
  UserKnownHostsFile {folder}/nobody
Host impostor
  UserKnownHostsFile {folder}/known_others
Host keyless
  IdentityFile {folder}/other_key
Host *
  Port {port}
  UserKnownHostsFile {folder}/known
Host * !keyless
  IdentityFile {folder}/user_key
"""
SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
FAR_PYTHON = """#!/bin/sh
echo "Welcome! A login shell may print things."
echo "So it may here." >&2
export FLASHTUNE_CACHE="{cache}" PYTHONPATH="{path}"
exec "{python}" "$@"
"""


class SshServer:
    """An sshd of the tests' own that lets this user in, and an ssh that knows its hosts alone.

    Its host `here` is well. Of the hosts `refused`, `stranger` (of an unknown key), `impostor`
    (of another key than the known one) and `keyless` (whom it does not let in), none is.
    """

    def __init__(self, sshd: str, folder: Path) -> None:
        self.sshd, self.folder, self.path = sshd, folder, folder / "bin"
        for name in ("host_key", "user_key", "other_key"):
            command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
            subprocess.run(command, check=True)
        port, closed_port = free_ports(2)
        values = {"port": port, "closed_port": closed_port, "folder": folder}
        (folder / "ssh_config").write_text(SSH_CONFIG.format(user=getpass.getuser(), **values))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(**values))
        for name, key in (("known", "host_key.pub"), ("known_others", "other_key.pub")):
            (folder / name).write_text(f"[127.0.0.1]:{port} {(folder / key).read_text()}")
        self.path.mkdir()
        ssh = shutil.which("ssh")
        write_script(self.path / "ssh", f'#!/bin/sh\nexec {ssh} -F {folder}/ssh_config "$@"\n')
        self.start()

    def start(self) -> None:
        """Listen."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd wants to be
        command = (self.sshd, "-D", "-e", "-f", str(self.folder / "sshd_config"))
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(command, stderr=log)
        end = time.monotonic() + PATIENCE
        while refused := self.refusal():
            assert self.server.poll() is None, (self.folder / "log").read_text()
            if "Connection refused" not in refused or time.monotonic() > end:
                self.stop()
                pytest.skip(f"sshd lets nobody in here: {refused}")
            time.sleep(0.05)

    def refusal(self) -> str:
        """What ssh says when it gets nowhere."""
        command = (str(self.path / "ssh"), "-o", "BatchMode=yes", "here", "true")
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr or f"exit code {done.returncode}" if done.returncode else ""

    def stop(self) -> None:
        """Listen no more, and break what connections there are."""
        sessions = self.sessions()
        self.server.terminate()
        self.server.wait()
        kill_all(sessions)

    def drop(self) -> None:
        """Break every connection, as a network does."""
        kill_all(self.sessions())

    def freeze(self) -> None:
        """Let nothing pass on any connection, with no word to either end."""
        kill_all(self.sessions(), signal.SIGSTOP)

    def sessions(self) -> list[int]:
        """The processes of sshd that serve connections."""
        parents = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name, _, rest = Path(process, "stat").read_text().rpartition(")")
                if "(sshd" in name:
                    parents[int(process.name)] = int(rest.split()[1])
        found: list[int] = []
        generation = [self.server.pid]
        while generation:
            generation = [child for child, parent in parents.items() if parent in generation]
            found += generation
        return found


class Far:
    """What a test may do with a machine reached over ssh."""

    def __init__(self, server: SshServer, folder: Path) -> None:
        self.server = server
        self.folder = folder / "far"  # of modules that its Python can import

    def python(self, site: str = "", cache: Path | None = None) -> str:
        """A Python there, in whose processes `site` is run first. It can import test workers.

        cache: flashtune's there, else the one that all tests share.
        """
        self.folder.mkdir()
        (self.folder / "sitecustomize.py").write_text(site)
        script = FAR_PYTHON.format(
            cache=cache or os.environ["FLASHTUNE_CACHE"],
            path=":".join(map(str, (self.folder, TESTS / "workers", TESTS / "fleet"))),
            python=sys.executable,
        )
        return write_script(self.folder / "python", script)


def write_script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def kill_all(processes: list[int], sent: signal.Signals = signal.SIGKILL) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, sent)


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no sshd: install openssh-server")
    server = SshServer(sshd, tmp_path_factory.mktemp("ssh"))
    yield server
    server.stop()


@pytest.fixture
def far(ssh_server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    """This machine, reached over ssh as `here`."""
    monkeypatch.setenv("PATH", str(ssh_server.path), prepend=os.pathsep)
    return Far(ssh_server, tmp_path)
