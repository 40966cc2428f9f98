"""Machines reached over ssh: a search there, lost connections, and every way not to get there.

The machine is this one, behind an sshd of the tests' own.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from loaded import loaded

import flashtune
from flashtune.kernels.backends.cpp.read_bandwidth import read_sources
from flashtune.kernels.backends.cpp.this_cpu import describe_cpu, this_cpu
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.candidate import Candidate
from flashtune.tuner.cli.main import cli
from flashtune.tuner.fleet import inquiry
from flashtune.tuner.fleet.machine import Machine, compiles_as
from flashtune.tuner.fleet.remote import find_machine
from flashtune.tuner.search.evaluate import MeasuringEvaluator
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers import pool, ssh
from flashtune.tuner.workers.answers.report import Found, Report
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.ssh import LEAST_PYTHON, SshTransport, code_archive
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import Place, here
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.package import LEAST
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

TINY = "vocab=512,hidden=64,clusters=32,probes=4"
PATIENCE = 240.0  # seconds, on a busy machine
OURS = str(Path(flashtune.__file__).parents[1])
NEEDLESS = (
    "click", "jinja2", "markupsafe", "optuna", "platformdirs", "rich", "safetensors", "sqlalchemy",
    "sqlite_utils",
)  # fmt: skip
GPU = """
import os, sysconfig, torch
from types import SimpleNamespace

path, os.environ["CC"] = sysconfig.get_path, "cc"
sysconfig.get_path = lambda name, *rest: {headers!r} if name == "include" else path(name, *rest)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count={sms}, is_integrated=0,
    L2_cache_size=50 * 2**20,
)
torch._C._cuda_getDriverVersion = lambda: 12080
"""


def without(*absent: str) -> str:
    """What a Python runs first to lack these packages, and the flashtune that is tested."""
    return f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Absent())
sys.path = [entry for entry in sys.path if entry != {OURS!r}]
"""


def search(*options: str) -> Result:
    """`flashtune search` in this process."""
    return CliRunner().invoke(cli, ["search", "--shape", TINY, *options])


def comes_true(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def far_workers() -> list[int]:
    """The workers that run from the far side's copy of the code.

    A process that a worker starts is a copy of it until it runs its own program: not counted.
    """
    parents: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"flashtune.tuner.workers.worker" in Path(process, "cmdline").read_bytes():
                here = Path(process, "cwd").resolve()
                if here.is_relative_to(Path(os.environ["FLASHTUNE_CACHE"]).resolve()):
                    fields = Path(process, "stat").read_bytes().rpartition(b")")[2].split()
                    parents[int(process.name)] = int(fields[1])
    return [process for process, parent in parents.items() if parent not in parents]


class TestASearch:
    """The command itself, in a process of its own."""

    @pytest.fixture
    def command(self, far, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
        """`flashtune search --remote here`, where nothing but torch is installed."""
        python = far.python(site=without(*NEEDLESS, "triton"))

        def start(*options: str) -> "subprocess.Popen[str]":
            program = "from flashtune.tuner.cli.main import cli; cli(prog_name='flashtune')"
            arguments = (
                "search", "--remote", "here", "--remote-python", python, "--shape", TINY,
                "--db", str(tmp_path / "far.db"), *options,
            )  # fmt: skip
            return subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                env={**os.environ, "PYTHONPATH": OURS},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

        return start

    def test_it_can_be_stopped_while_it_connects(self, command, far, tmp_path: Path) -> None:
        written = tmp_path / "process"
        Path(far.folder, "torch.py").write_text(
            f"import os, pathlib, time\n"
            f"pathlib.Path({str(written)!r}).write_text(str(os.getpid()))\n"
            "time.sleep(600)\n"
        )
        stopped = command()
        assert comes_true(lambda: written.exists() and bool(written.read_text()))
        stopped.send_signal(signal.SIGINT)
        output, said = stopped.communicate(timeout=PATIENCE)
        assert (stopped.returncode, output) == (130, "")
        assert said.splitlines() == ["connecting to here"]
        assert comes_true(lambda: not Path("/proc", written.read_text()).exists())

    @pytest.mark.timeout(900)
    def test_it_measures_there_loses_its_connection_is_stopped_and_goes_on(
        self, command, far, tmp_path: Path
    ) -> None:
        """Processes take long to start, so it is one test."""

        def records() -> list[Record]:
            with contextlib.suppress(FlashtuneError), Store(tmp_path / "far.db") as store:
                return store.records()
            return []

        stopped = command("--device", "cpu", "--trials", "60")
        assert comes_true(lambda: len(records()) >= 2)
        far.server.drop()
        before = len(records())
        assert comes_true(lambda: len(records()) > before + 1)  # one may have been on its way
        assert len(far_workers()) == 1
        stopped.send_signal(signal.SIGINT)
        output, said = stopped.communicate(timeout=PATIENCE)
        assert stopped.returncode == 130, said
        assert re.search(r"ssh here: .*: trying again in 1 s\nconnected again\n", said)
        assert "winner" in output
        assert comes_true(lambda: far_workers() == [])

        kept, cpu = records(), this_cpu()
        assert {each.device for each in kept} == {cpu.name}
        assert {each.toolchain for each in kept} == {toolchain(cpu)}
        assert {each.provenance for each in kept} == {Provenance.MEASURED}
        assert {each.measurement.policy for each in kept} == {"search"}
        assert {each.measurement.outcome for each in kept} <= {Outcome.OK, Outcome.PRUNED}

        # Without a wish the CPU is found: there is no GPU.
        resumed = command("--trials", str(len(kept) + 1), "--json")
        output, said = resumed.communicate(timeout=PATIENCE)
        assert resumed.returncode == 0, said
        data = json.loads(output)
        assert (data["device"], data["provenance"]) == (cpu.name, "measured")
        [result] = data["results"]
        assert (result["evaluated"], result["failed"]) == (len(kept) + 1, 0)
        assert result["floor_us"] > 0
        assert result["winner"]["measurement"]["policy"] == "final"
        again = {each.key: each for each in records()}
        assert len(again) == len(kept) + 1
        for record in kept:
            now = again[record.key]
            assert now == record or now.measurement.policy == "final"


class TestWithoutAConnection:
    @pytest.mark.parametrize(
        ("host", "said"),
        [
            ("refused", "ssh refused: connect to host 127.0.0.1 port .*: Connection refused"),
            ("stranger", "ssh stranger: Host key verification failed"),
            ("impostor", "ssh impostor: Host key .* has changed .* verification failed"),
            ("keyless", "ssh keyless: .*: Permission denied"),
            ("-oProxyCommand=false", "is not an ssh destination"),
        ],
    )
    def test_a_search_ends_with_one_line(self, far, tmp_path: Path, host: str, said: str) -> None:
        failed = search("--remote", host, "--db", str(tmp_path / "none.db"))
        assert (failed.exit_code, failed.stdout) == (2, "")
        connecting, error = failed.stderr.splitlines()
        assert connecting == f"connecting to {host}"
        assert re.match(f"Error: .*{said}", error)
        assert not (tmp_path / "none.db").exists()

    def test_another_python_without_another_machine_is_refused(self) -> None:
        failed = search("--remote-python", "python3")
        assert failed.exit_code == 2
        assert failed.stderr.endswith("on a remote machine: give remote too\n")


class TestWhatIsThere:
    @pytest.mark.parametrize(
        ("site", "said"),
        [
            ("import sys; sys.version_info = (3, 8, 10)", "Python 3.10 or later is needed, .*3.8"),
            (without("torch"), r"torch cannot be imported \(No module named 'torch'\): install"),
            ("raise SystemExit('no such luck')", "SystemExit: no such luck"),
        ],
        ids=["old Python", "no torch", "a broken Python"],
    )
    def test_what_is_missing_is_told(self, far, site: str, said: str) -> None:
        with pytest.raises(FlashtuneError, match=f"^here: {said}"):
            find_machine("here", None, far.python(site=site))

    def test_a_python_that_is_not_there_is_told(self, far, tmp_path: Path) -> None:
        with pytest.raises(FlashtuneError, match=r"here has no /no/python: .* --remote-python"):
            find_machine("here", None, "/no/python")

    def test_an_old_torch_is_told(self, far) -> None:
        python = far.python()
        Path(far.folder, "torch.py").write_text("__version__ = '2.1.0a0+git'\n")
        with pytest.raises(
            FlashtuneError, match=r"torch is version 2\.1\.0a0\+git: install torch"
        ):
            find_machine("here", None, python)

    def test_no_gpu_is_told(self, far) -> None:
        with pytest.raises(FlashtuneError, match=r"here: torch .* finds no NVIDIA GPU there"):
            find_machine("here", find_device("h200"), far.python())

    def test_a_folder_that_cannot_be_written_is_told(self, far) -> None:
        python = far.python(cache=Path("/proc/no"))
        with pytest.raises(
            FlashtuneError, match=r"here: the worker has no cache folder .*FLASHTUNE_CACHE"
        ):
            find_machine("here", None, python)

    def test_a_cpu_is_described_and_its_bandwidth_measured(self, far, tmp_path: Path) -> None:
        """By readers that were rendered here: nothing is there but torch and a compiler."""
        cache = tmp_path / "own"
        python = far.python(site=without(*NEEDLESS, "triton"), cache=cache)
        machine = find_machine("here", None, python)
        bandwidth = machine.device.memory_bandwidth
        assert machine.device == replace(describe_cpu(), memory_bandwidth=bandwidth)
        assert machine.toolchain == toolchain(machine.device)
        assert 1e8 < bandwidth < 1e13
        assert len(list(cache.glob("cpp/*.so"))) == len(read_sources(machine.device))
        assert stat.S_IMODE((cache / "code").stat().st_mode) == 0o700

    def test_no_answer_is_told(self, far, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inquiry, "FIND_SECONDS", 0.5)
        with pytest.raises(FlashtuneError, match="no answer from here in 0 s"):
            find_machine("here", None, far.python(site="import time; time.sleep(60)"))

    def test_no_ssh_is_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(FlashtuneError, match="ssh is not installed: install"):
            find_machine("here", None)

    def test_a_home_folder_is_the_far_one(self) -> None:
        def far_command(python: str) -> str:
            return SshTransport(destination="here", python=python).command[-1]

        assert far_command("~/venv/bin/python").startswith("~/venv/bin/python -c ")
        assert far_command("/a b/python").startswith("'/a b/python' -c ")
        assert far_command("$(reboot)").startswith("'$(reboot)' -c ")
        assert far_command("~$(reboot)/python").startswith("'~$(reboot)/python' -c ")
        assert far_command("~a;b/python").startswith("'~a;b/python' -c ")
        assert far_command("~us.er-1/a b").startswith("~us.er-1/'a b' -c ")

    def test_what_it_needs_is_what_is_declared(self) -> None:
        declared = "\n".join(importlib.metadata.requires("flashtune") or ())
        for name, version in LEAST.items():
            assert f"{name}>={'.'.join(map(str, version))}\n" in f"{declared}\n"
        python = importlib.metadata.metadata("flashtune")["Requires-Python"]
        assert python == f">={'.'.join(map(str, LEAST_PYTHON))}"


class TestAGpuThere:
    """What is known of it is pretended: there is none here."""

    @pytest.fixture
    def python(self, far, tmp_path: Path) -> Callable[..., str]:
        def make(sms: int = 132, headers: Sequence[str] = ("Python.h",)) -> str:
            folder = tmp_path / "headers"
            folder.mkdir()
            for name in headers:
                (folder / name).touch()
            return far.python(site=GPU.format(headers=str(folder), sms=sms))

        return make

    def test_it_is_found_with_its_tools(self, python) -> None:
        machine = find_machine("here", find_device("h200"), python())
        assert machine.device == find_device("h200")
        ours = toolchain(machine.device)
        assert machine.toolchain == Toolchain(
            triton=ours.triton, torch=ours.torch, driver="cuda 12.8"
        )
        assert compiles_as(machine.device, machine.toolchain, ours)
        assert f"(sm_90), triton {ours.triton}, torch" in machine.describe()

    def test_another_device_is_told(self, python) -> None:
        with pytest.raises(FlashtuneError) as told:
            find_machine("here", find_device("orin"), python())
        text = str(told.value)
        assert text.startswith(f"here has {find_device('h200').title} (nvidia-h200, sm_90), not ")
        assert text.endswith("(orin-nano-super, sm_87): leave --device out")

    def test_a_part_of_the_device_is_another(self, python) -> None:
        with pytest.raises(FlashtuneError, match=r"here has NVIDIA H200 .nvidia-h200-66sm, sm_90"):
            find_machine("here", find_device("h200"), python(sms=66))

    def test_what_triton_lacks_is_told(self, python) -> None:
        with pytest.raises(FlashtuneError, match=r"here: there is no Python\.h.*python3-dev"):
            find_machine("here", find_device("h200"), python(headers=()))

    def test_candidates_compile_here_and_are_measured_there(
        self, python, far, faulty: ModuleType, problem: Problem
    ) -> None:
        """By a worker whose kernels are pretended."""
        device = find_device("h200")
        transport = SshTransport(destination="here", python=far.python(), module="faulty_worker")
        config = default_config(problem, device)
        with WorkerPool(here(1)) as compilers, WorkerPool(here(1, transport)) as measurer:
            evaluator = MeasuringEvaluator(
                problem, device, compilers, measurer, seed=0, elsewhere=True
            )
            evaluator.submit(config)
            evaluations: list[Any] = []
            while not evaluations:
                evaluator.rest(PATIENCE)
                evaluations = evaluator.collect()
        [measurement] = [each.measurement for each in evaluations]
        assert measurement.median_us == pytest.approx(faulty.time_of(config), rel=1e-3)


HOSTILE = """#!{python}
import json, os, sys, time

{before}
os.write(1, b"flashtune: ready\\n")
for line in sys.stdin.buffer:
    _, found, rest = line.partition(b'{{"request": "')  # the archive ends in no newline
    if not found:
        continue
    request = rest.partition(b'"')[0].decode()
    {answer}
"""


class TestAHostileMachine:
    """Whatever it sends ends in one line, soon."""

    @pytest.fixture
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Have it answer so; it is reached through a stand-in for ssh."""
        monkeypatch.setattr(inquiry, "FIND_SECONDS", 30.0)
        monkeypatch.setattr("flashtune.tuner.workers.process.END_SECONDS", 0.5)

        def make(answer: str, before: str = "") -> None:
            stand_in = tmp_path / "ssh"
            stand_in.write_text(
                HOSTILE.format(python=sys.executable, before=before, answer=answer)
            )
            stand_in.chmod(0o755)
            monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

        return make

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("os.write(1, b'{garbage]\\n')", "far gave no valid answer .not JSON"),
            ("os.write(1, b'{}\\n')", "no valid answer .not an object with just request, content"),
            ("while True: os.write(1, b'x' * 2**20)", "a line of more than 262144 bytes"),
            (
                "while True: os.write(2, b'x' * 2**16)",
                "more than 16777216 bytes on standard error",
            ),
            (
                "print(json.dumps({'request': 'another', 'content': {}}), flush=True)",
                "it answers another request",
            ),
            (
                "print(json.dumps({'request': request, 'content': {'devices': {},"
                " 'trouble': '\\x1b[2J\\n' * 9999}}), flush=True)",
                r"far: [?]\[2J [?]\[2J .{480,490}$",
            ),
            (
                "print(json.dumps({'request': request, 'content': {'trouble': '',"
                " 'devices': {}}}), flush=True)",
                "far has no device of that kind",
            ),
        ],
    )
    def test_an_answer_that_is_none_is_told(self, machine, answer: str, said: str) -> None:
        machine(answer)
        with pytest.raises(FlashtuneError, match=said) as told:
            find_machine("far", None)
        assert str(told.value).isprintable()

    @pytest.mark.parametrize(
        "change",
        [
            {"sm_count": 10**30}, {"sm_count": 0}, {"l2_bytes": -1}, {"clock_hz": float("nan")},
            {"memory_bandwidth": "fast"}, {"name": "\x1b[2J"}, {"arch": "sm_x"}, {"title": 3},
            {"memory_bandwidth": 1e12},
        ],
        ids=str,
    )  # fmt: skip
    def test_figures_that_no_device_has_are_told(self, machine, change: dict[str, Any]) -> None:
        device = {**asdict(find_device("orin")), **change}
        found = {"trouble": "", "device": device, "toolchain": asdict(Toolchain())}
        report = {"trouble": "", "devices": {"nvidia": found}}
        answer = f"content = json.loads({json.dumps(report)!r})"
        machine(f"{answer}; print(json.dumps(dict(request=request, content=content)), flush=True)")
        with pytest.raises(FlashtuneError, match="far gave no valid answer") as told:
            find_machine("far", None)
        assert str(told.value).isprintable()

    @pytest.mark.parametrize("before", ["time.sleep(600)", "while True: os.write(1, b'x\\n')"])
    def test_one_that_never_answers_is_given_up(
        self, machine, before: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Though it may print for ever, as a login shell does, or read nothing."""
        monkeypatch.setattr(inquiry, "FIND_SECONDS", 0.5)
        machine("pass", before)
        with pytest.raises(FlashtuneError, match="no answer from far in 0 s"):
            find_machine("far", None)


def test_a_cpu_that_is_taken_for_want_of_a_gpu_is_described_with_the_reason() -> None:
    """A Jetson's CPU is not tuned without a word."""
    cpu = Found(trouble="", device=find_device("orin"), toolchain=Toolchain(compiler="g++ 12"))
    report = Report(trouble="", found={"nvidia": Found(trouble="no CUDA there"), "cpu": cpu})
    found = inquiry.choose("far", report, None)
    machine = Machine(
        device=found.device,
        toolchain=found.toolchain,
        place=Place(name="far"),
        passed_over=found.passed_over,
    )
    assert machine.describe().endswith("(sm_87), g++ 12; no CUDA there")
    only = Report(trouble="", found={"cpu": cpu})
    assert inquiry.choose("far", only, None) == replace(found, passed_over="")


@pytest.mark.parametrize(
    ("device", "there", "here", "same"),
    [
        ("h200", "3.6.0", "3.6.1", True),
        ("h200", "3.6.0", "3.9.0", False),
        ("h200", "3.6.0", "", False),
        ("cpu", "", "", False),
    ],
)
def test_only_the_same_triton_compiles_the_same(
    device: str, there: str, here: str, same: bool
) -> None:
    wanted = this_cpu() if device == "cpu" else find_device(device)
    assert compiles_as(wanted, Toolchain(triton=there), Toolchain(triton=here)) is same


class TestLostConnections:
    """With a worker that starts at once."""

    @pytest.fixture
    def transport(self, far) -> SshTransport:
        return SshTransport(destination="here", python=far.python(), module="stub_worker")

    @pytest.fixture
    def stub(self) -> ModuleType:
        path = Path(__file__).with_name("stub_worker.py")
        return loaded(path)

    @pytest.fixture
    def task(self, problem: Problem, device: Device) -> Callable[[int], Task]:
        def make(what: int) -> Task:
            candidate = Candidate(problem, default_config(problem, device), device)
            return Task(kind="measure", candidates=(candidate,), seed=what)

        return make

    @staticmethod
    def answer(workers: WorkerPool) -> Measurement:
        [(_, reply)] = workers.wait(PATIENCE)
        return reply.measurements[0]

    @staticmethod
    def connect(workers: WorkerPool) -> None:
        """Wait until the worker that is to answer is there."""
        assert comes_true(
            lambda: (
                not workers.wait(0.05) and [post.connected for post in workers._posts] == [True]
            )
        )

    def test_what_was_under_way_is_done_again(self, far, transport, stub, task) -> None:
        notes: list[str] = []
        with WorkerPool(here(1, transport), notes.append) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            before = self.answer(workers).median_us
            workers.submit(task(stub.LATE), PATIENCE)
            workers.submit(task(stub.ANSWER), PATIENCE)
            far.server.drop()
            late, after = self.answer(workers).median_us, self.answer(workers).median_us
        assert late == after != before
        lost, again = notes
        assert lost.startswith("ssh here: ") and lost.endswith(": trying again in 1 s")
        assert again == "connected again"

    def test_a_machine_that_is_away_for_a_while_is_waited_for(
        self, far, transport, stub, task
    ) -> None:
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            if len(notes) == 2:
                far.server.start()

        with WorkerPool(here(1, transport), note) as workers:
            workers.submit(task(stub.LATE), PATIENCE)
            self.connect(workers)
            far.server.stop()
            assert self.answer(workers).outcome is Outcome.OK
        assert [text.rpartition(": ")[2] for text in notes] == [
            "trying again in 1 s",
            "trying again in 2 s",
            "connected again",
        ]
        assert "Connection refused" in notes[1]

    @pytest.mark.parametrize(
        ("host", "python", "why"),
        [
            ("refused", "python3", "ssh refused: connect .*Connection refused"),
            ("here", "/no/python", "no worker could be started: .*/no/python"),
        ],
    )
    def test_a_machine_without_workers_is_given_up(
        self, far, stub, task, monkeypatch: pytest.MonkeyPatch, host: str, python: str, why: str
    ) -> None:
        """No config is to blame."""
        monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.5)
        with WorkerPool(here(1, SshTransport(destination=host, python=python))) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            with pytest.raises(FlashtuneError, match=rf"{why}.* run the same command again"):
                workers.wait(PATIENCE)

    def test_a_task_that_breaks_every_connection_is_a_failure(
        self, far, transport, stub, task
    ) -> None:
        with WorkerPool(here(1, transport)) as workers:
            workers.submit(task(stub.HANG), PATIENCE)
            for _ in range(2):
                self.connect(workers)
                far.server.drop()
                assert workers.wait(0.3) == []
            self.connect(workers)
            far.server.drop()
            failed = self.answer(workers)
            assert failed.outcome is Outcome.CRASH
            assert failed.error.startswith("lost 3 times: ssh here: ")
            workers.submit(task(stub.ANSWER), PATIENCE)
            assert self.answer(workers).outcome is Outcome.OK

    def test_a_silent_connection_is_given_up_and_the_worker_it_left_is_ended(
        self, far, transport, stub, task, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else that one would disturb what its successor times."""
        monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
        notes: list[str] = []
        with WorkerPool(here(1, transport), notes.append) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            before = self.answer(workers).median_us
            assert before is not None
            workers.submit(task(stub.LATE), PATIENCE)
            far.server.freeze()
            after = self.answer(workers).median_us
            frozen_one_is_gone = comes_true(lambda: not Path(f"/proc/{before:.0f}").exists(), 5.0)
            far.server.drop()
        assert after != before
        assert frozen_one_is_gone
        assert "not responding" in notes[0]


def test_a_task_for_elsewhere_carries_its_source(problem: Problem, device: Device) -> None:
    """And without compilers it is measured at once."""

    asked: list[tuple[Task, float]] = []

    class Pool(WorkerPool):
        def submit(self, task: Task, seconds: float, **where: object) -> None:
            asked.append((task, seconds))

    evaluator = MeasuringEvaluator(problem, device, None, Pool(here(1)), seed=3, elsewhere=True)
    config = next(Space(problem, device).configs())
    assert evaluator.room == 2
    evaluator.submit(config)
    assert (evaluator.pending, evaluator.room) == (1, 1)
    evaluator.collect()
    [(task, seconds)] = asked
    assert task.sources == (Candidate(problem, config, device).source,)
    assert (task.kind, task.seed, seconds) == ("measure", 3, 180.0)


@pytest.mark.gpu
def test_a_gpu_is_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for ssh, which runs here what would run on another machine."""
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\nfor far; do :; done\nexec sh -c "$far"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    database = tmp_path / "far.db"
    done = search(
        "--remote", "anywhere", "--remote-python", sys.executable, "--trials", "8", "--json",
        "--db", str(database),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    device = device_of(torch.device("cuda", 0))
    assert device
    assert (data["device"], data["provenance"]) == (device.name, "measured")
    assert [(each["evaluated"], each["failed"]) for each in data["results"]] == [(8, 0)]
    with Store(database, read_only=True) as store:
        assert {record.toolchain for record in store.records()} == {toolchain(device)}


def test_the_code_that_goes_along_is_always_the_same() -> None:
    """So that it is unpacked once; the templates stay here."""
    archive = code_archive()
    code_archive.cache_clear()
    assert code_archive() == archive
    names = zipfile.ZipFile(io.BytesIO(archive)).namelist()
    assert {"flashtune/tuner/workers/worker.py", "flashtune/tuning_db/devices.json"} <= set(names)
    assert not [name for name in names if name.endswith(".j2")]
