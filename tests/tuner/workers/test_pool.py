"""Worker processes that crash, hang, lie and are replaced, and the search that goes on."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from loaded import loaded

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data, parse_config
from flashtune.tuner.search import evaluate
from flashtune.tuner.search.evaluate import MeasuringEvaluator
from flashtune.tuner.search.search import Budget, Event, search
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers import pool
from flashtune.tuner.workers.answers.message import answer_to, to_line
from flashtune.tuner.workers.answers.reply import Reply, read_reply
from flashtune.tuner.workers.connection import Transport
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.ssh import SshTransport
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import LocalTransport, Place, here
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.store import Store

STUB = Path(__file__).with_name("stub_worker.py")
COMMAND = (sys.executable, "-S", str(STUB))
PATIENCE = 60.0  # seconds for what takes milliseconds, on a busy machine


stub = loaded(STUB)


@pytest.fixture
def task(problem: Problem, device: Device) -> Callable[[int], Task]:
    """A task for the stub: `task(stub.HANG)`."""

    def make(what: int) -> Task:
        config = default_config(problem, device)
        candidate = Candidate(problem, config, device)
        return Task(kind="measure", candidates=(candidate,), seed=what)

    return make


@pytest.fixture(params=["local", "ssh"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """Stubs on this machine, and stubs on it that are reached over ssh."""
    if request.param == "local":
        return LocalTransport(COMMAND)
    far = request.getfixturevalue("far")
    return SshTransport(destination="here", python=far.python(), module="stub_worker")


@pytest.fixture
def workers(transport: Transport) -> Iterator[WorkerPool]:
    with WorkerPool(here(1, transport)) as workers:
        yield workers


def answer(workers: WorkerPool, task: Task, seconds: float = PATIENCE) -> Measurement:
    """The measurement of one task."""
    workers.submit(task, seconds)
    [(answered, reply)] = workers.wait(PATIENCE + seconds)
    assert answered == task
    return reply.measurements[0]


def answer_of_another(workers: WorkerPool, task: Task) -> int:
    """The process that answered, while another one is busy."""
    workers.submit(task, PATIENCE)
    [(_, reply)] = workers.wait(PATIENCE)
    assert reply.measurements[0].median_us is not None
    return int(reply.measurements[0].median_us)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def comes_true(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_worker_answers_one_task_after_another(workers: WorkerPool, task) -> None:
    first, second = (answer(workers, task(stub.ANSWER)) for _ in range(2))
    assert first.median_us == second.median_us  # the same process


def test_an_answer_may_come_in_pieces(workers: WorkerPool, task) -> None:
    assert answer(workers, task(stub.IN_PIECES)).outcome is Outcome.OK


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (stub.EXIT, "the worker died with exit code 7: last words"),
        (stub.SEGFAULT, "the worker died by signal 11: last words"),
        (stub.HALF, "the worker died with exit code 0"),
    ],
)
def test_a_worker_that_dies_is_a_crash_and_is_replaced(
    workers: WorkerPool, task, what: int, error: str
) -> None:
    before = answer(workers, task(stub.ANSWER))
    died = answer(workers, task(what))
    after = answer(workers, task(stub.ANSWER))
    assert (died.outcome, died.error) == (Outcome.CRASH, error)
    assert after.outcome is Outcome.OK
    assert after.median_us != before.median_us


def test_a_fatal_reply_counts_and_its_worker_is_replaced(workers: WorkerPool, task) -> None:
    fatal = answer(workers, task(stub.FATAL))
    after = answer(workers, task(stub.ANSWER))
    assert fatal.outcome is Outcome.OK
    assert after.outcome is Outcome.OK
    assert after.median_us != fatal.median_us
    assert fatal.median_us is not None
    assert comes_true(lambda: is_gone(int(fatal.median_us or 0)))


def test_a_worker_that_hangs_is_killed_at_its_deadline(workers: WorkerPool, task) -> None:
    pid = answer(workers, task(stub.ANSWER)).median_us
    hung = answer(workers, task(stub.HANG), seconds=0.3)
    assert (hung.outcome, hung.error) == (Outcome.TIMEOUT, "no answer in 0 s")
    assert pid is not None
    assert comes_true(lambda: is_gone(int(pid)))
    assert answer(workers, task(stub.ANSWER)).outcome is Outcome.OK


class TestAFreshWorker:
    """It is asked first whether it has started; the clock goes on only where a test says so."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def started_by(self, now: list[float]) -> Iterator[Callable[[str], WorkerPool]]:
        """A pool with one worker, which does this before it is the stub."""
        with contextlib.ExitStack() as pools:

            def make(before: str) -> WorkerPool:
                program = (
                    "import json, os, runpy, sys, time\n"
                    f"{before}\n"
                    f"runpy.run_path({str(STUB)!r}, run_name='__main__')"
                )
                transport = LocalTransport((sys.executable, "-S", "-c", program))
                return pools.enter_context(WorkerPool(here(1, transport), clock=lambda: now[0]))

            yield make

    @staticmethod
    def outcome(workers: WorkerPool) -> Measurement | None:
        """The measurement of the only task, if it comes."""
        workers.rest(0.05)
        found = workers.collect()
        return found[0][1].measurements[0] if found else None

    def comes(self, workers: WorkerPool) -> Measurement:
        end = time.monotonic() + PATIENCE
        while (found := self.outcome(workers)) is None:
            assert time.monotonic() < end
        return found

    def test_has_time_to_start_however_short_its_task_is(
        self, started_by, now, task, tmp_path: Path
    ) -> None:
        go = tmp_path / "go"
        workers = started_by(f"while not os.path.exists({str(go)!r}): time.sleep(0.01)")
        workers.submit(task(stub.ANSWER), 1.0)
        now[0] = 179.0
        assert self.outcome(workers) is None
        go.touch()
        assert self.comes(workers).outcome is Outcome.OK

    def test_that_hangs_is_noticed_at_its_tasks_deadline(self, started_by, now, task) -> None:
        workers = started_by("")
        workers.submit(task(stub.HANG), 10.0)
        assert comes_true(lambda: self.outcome(workers) is None and not workers._posts[0].fresh)
        now[0] = 9.0
        assert self.outcome(workers) is None
        now[0] = 11.0
        hung = self.comes(workers)
        assert (hung.outcome, hung.error) == (Outcome.TIMEOUT, "no answer in 10 s")

    def test_that_never_starts_is_given_up(self, started_by, now, task) -> None:
        workers = started_by("time.sleep(600)")
        workers.submit(task(stub.ANSWER), 10.0)
        now[0] = 179.0
        assert self.outcome(workers) is None
        now[0] = 181.0
        never = self.comes(workers)
        assert never.outcome is Outcome.TIMEOUT
        assert never.error == "the worker has not started in 180 s"

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            ("true", "it answers a greeting with something else"),
            ('{"measurements": [], "uses": [], "fatal": false}', "it answers a greeting"),
            ('null}\n{"request": "NAME", "content": null', "not an object with just measurements"),
            ('null, "request": "another"', "not JSON: a name occurs twice"),
            ('null, "more": 1', "not an object with just request, content"),
        ],
    )
    def test_that_says_anything_else_is_believed_no_more(
        self, started_by, task, content: str, error: str
    ) -> None:
        line = f'{{"request": "NAME", "content": {content}}}\n'
        workers = started_by(
            "name = json.loads(sys.stdin.readline())['request']\n"
            f"os.write(3, {line!r}.replace('NAME', name).encode())"
        )
        workers.submit(task(stub.HANG), PATIENCE)
        wrong = self.comes(workers)
        assert wrong.outcome is Outcome.CRASH
        assert wrong.error.startswith(f"the worker gave no valid reply: {error}")
        assert workers._posts[0].connection is None

    def test_cannot_know_what_it_will_be_asked(self, started_by, task) -> None:
        workers = started_by("""os.write(3, b'{"request": "", "content": null}\\n')""")
        workers.submit(task(stub.ANSWER), PATIENCE)
        assert self.comes(workers).error.endswith("it answers another request")


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (stub.GARBAGE, "the worker gave no valid reply: not JSON"),
        (stub.ANOTHERS, "the worker gave no valid reply: it answers another request"),
        (stub.HUGE, "the worker gave no valid reply: a line of more than 262144 bytes"),
        (stub.ENDLESS, "the worker gave no valid reply: a line of more than 262144 bytes"),
    ],
)
def test_what_is_no_reply_is_a_crash_and_the_worker_is_believed_no_more(
    task, what: int, error: str
) -> None:
    with WorkerPool(here(1, LocalTransport(COMMAND))) as workers:
        before = answer(workers, task(stub.ANSWER))
        largest = peak_bytes()
        wrong = answer(workers, task(what))
        after = answer(workers, task(stub.ANSWER))
        assert peak_bytes() - largest < 16 * 2**20
        assert wrong.outcome is Outcome.CRASH
        assert wrong.error.startswith(error)
        assert after.outcome is Outcome.OK
        assert after.median_us != before.median_us


def test_what_is_printed_at_start_is_no_reply(task) -> None:
    program = (
        "import runpy; print('hello', flush=True); "
        f"runpy.run_path({str(STUB)!r}, run_name='__main__')"
    )
    with WorkerPool(here(1, LocalTransport((sys.executable, "-S", "-c", program)))) as workers:
        assert answer(workers, task(stub.ANSWER)).outcome is Outcome.OK
        assert answer(workers, task(stub.EXIT)).error.endswith("code 7: last words")


def test_no_time_is_no_measurement(task) -> None:
    with WorkerPool(here(1, LocalTransport(COMMAND))) as workers:
        assert answer(workers, task(stub.NO_TIME)).outcome is Outcome.WRONG_RESULT


def test_what_comes_after_a_reply_is_not_taken_for_the_next(task) -> None:
    with WorkerPool(here(1, LocalTransport(COMMAND))) as workers:
        first = answer(workers, task(stub.MORE))
        second = answer(workers, task(stub.ANSWER))
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.OK)
    assert first.median_us != second.median_us


def test_a_worker_that_dies_idle_is_nobodys_fault(task) -> None:
    with WorkerPool(here(1, LocalTransport(COMMAND))) as workers:
        pid = int(answer(workers, task(stub.ANSWER)).median_us or 0)
        os.kill(pid, 9)
        assert comes_true(lambda: not workers._posts[0].connection.is_quiet)
        assert answer(workers, task(stub.ANSWER)).outcome is Outcome.OK


def test_of_a_flood_the_end_is_kept(workers: WorkerPool, task) -> None:
    answer(workers, task(stub.ANSWER))
    largest = peak_bytes()
    flooded = answer(workers, task(stub.FLOOD))
    assert flooded.error == "the worker died with exit code 7: ?[2Jlast words"
    assert peak_bytes() - largest < 16 * 2**20


def test_a_worker_that_takes_nothing_is_not_waited_for(task) -> None:
    """Though it greets, and says that it has started: what it is sent fits in no pipe."""
    notes: list[str] = []

    class Deaf(LocalTransport):
        greeting = "there"

    long = replace(task(stub.ANSWER), sources=("x" * 2**20,))
    program = (
        "import os, time; os.write(3, b'there\\n'); os.write(3, os.read(0, 2**16)); "
        "time.sleep(600)"
    )
    with WorkerPool(here(1, Deaf((sys.executable, "-S", "-c", program))), notes.append) as workers:
        began = time.monotonic()
        failed = answer(workers, long, seconds=0.3)
        assert time.monotonic() - began < PATIENCE
    assert failed.outcome is Outcome.CRASH
    assert failed.error.startswith("lost 3 times: the worker takes no task")
    assert [note.rpartition(": ")[2] for note in notes] == [
        "trying again in 1 s",
        "connected again",
    ] * 2


def children(parent: int) -> list[int]:
    """The living processes whose parent a process is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, its_parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(its_parent) == parent and state != "Z":
                found.append(int(process.name))
    return found


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_process_that_left_its_group_ends_with_its_worker(workers: WorkerPool, task) -> None:
    escaped = int(answer(workers, task(stub.ESCAPE)).median_us or 0)
    assert not is_gone(escaped)
    answer(workers, task(stub.EXIT))
    assert comes_true(lambda: is_gone(escaped))
    escaped = int(answer(workers, task(stub.ESCAPE)).median_us or 0)
    assert not is_gone(escaped)
    workers.close()
    assert comes_true(lambda: is_gone(escaped))


def test_nothing_outlives_a_search_that_is_killed(task) -> None:
    """Its candidate hangs, hears no signal, and has started a process that left its group."""
    line = to_line("mine", task(stub.DEAF).data())
    program = (
        "import sys, time; from flashtune.tuner.workers.process import WorkerProcess; "
        "from flashtune.tuner.workers.transport import LocalTransport; "
        f"process = WorkerProcess(LocalTransport({COMMAND!r})); process.write(sys.argv[1]); "
        "print(process.popen.pid, flush=True); time.sleep(600)"
    )
    search = subprocess.Popen(
        [sys.executable, "-c", program, line], stdout=subprocess.PIPE, text=True
    )
    assert search.stdout
    keeper = int(search.stdout.readline())
    began = comes_true(lambda: len(children(keeper)) == 2)  # the worker, and who lost its parent
    left = [keeper, *children(keeper)]
    search.kill()
    search.communicate()
    assert began
    assert comes_true(lambda: all(map(is_gone, left)))


def test_temporary_files_go_with_their_worker(
    task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = (
        "import runpy, tempfile; tempfile.mkstemp(); "
        f"runpy.run_path({str(STUB)!r}, run_name='__main__')"
    )
    with WorkerPool(here(1, LocalTransport((sys.executable, "-S", "-c", program)))) as workers:
        answer(workers, task(stub.ANSWER))
        [folder] = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 1
        answer(workers, task(stub.SEGFAULT))
        assert list(tmp_path.iterdir()) == []
        answer(workers, task(stub.ANSWER))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_ends_with_its_keeper(task) -> None:
    with WorkerPool(here(1, LocalTransport(COMMAND))) as workers:
        workers.submit(task(stub.HANG), PATIENCE)
        keeper = workers._posts[0].connection.popen.pid
        assert comes_true(lambda: len(children(keeper)) == 1)
        [worker] = children(keeper)
        os.kill(keeper, 9)
        assert comes_true(lambda: is_gone(worker))
        [(_, reply)] = workers.wait(PATIENCE)
        assert reply.measurements[0].error == "the worker died by signal 9"


def test_nothing_in_the_folder_one_is_in_is_run(
    problem: Problem, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "json", "runpy", "flashtune"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    candidate = Candidate(problem, default_config(problem, device), device)
    with WorkerPool(here(1)) as workers:
        workers.submit(Task(kind="compile", candidates=(candidate,)), PATIENCE)
        [(_, reply)] = workers.wait(PATIENCE + 60)
    assert not (tmp_path / "run").exists()
    assert reply.measurement is None and reply.uses


def test_waiting_takes_no_longer_than_asked(workers: WorkerPool, task) -> None:
    began = time.monotonic()
    assert workers.wait(20.0) == []  # nothing is pending
    assert time.monotonic() - began < 0.1
    workers.submit(task(stub.HANG), PATIENCE)
    assert workers.wait(0.1) == []
    assert time.monotonic() - began < 10
    assert workers.pending() == 1


def test_nobody_is_waited_for_while_there_are_answers(task) -> None:
    with WorkerPool(here(2, LocalTransport(COMMAND))) as workers:
        workers.submit(task(stub.ANSWER), PATIENCE, owner="one")
        workers.submit(task(stub.HANG), PATIENCE, owner="other")
        assert comes_true(lambda: workers.rest(0.1) or workers.has_answers)
        before = time.monotonic()
        workers.rest(PATIENCE)
        assert time.monotonic() - before < PATIENCE / 2
        assert len(workers.collect("one")) == 1
        assert not workers.has_answers


def test_tasks_are_shared_out_over_the_workers(task) -> None:
    with WorkerPool(here(2, LocalTransport(COMMAND))) as workers:
        for what in (stub.HANG, stub.ANSWER, stub.ANSWER, stub.ANSWER):
            workers.submit(task(what), PATIENCE)
        answered: list[tuple[Task, Reply]] = []
        while len(answered) < 3:
            answered += workers.wait(PATIENCE)
        assert {reply.measurements[0].outcome for _, reply in answered} == {Outcome.OK}
        assert workers.pending() == 1
        assert workers.working == 2


def test_cancelling_ends_busy_workers_and_keeps_idle_ones(task) -> None:
    with WorkerPool(here(2, LocalTransport(COMMAND))) as workers:
        workers.submit(task(stub.HANG), PATIENCE)
        idle = answer_of_another(workers, task(stub.ANSWER))
        [busy] = [each.connection.popen.pid for each in workers._posts if each.request]
        workers.cancel()
        assert workers.pending() == 0
        assert is_gone(busy)
        assert not is_gone(idle)


def test_cancelling_forgets_what_waits(workers: WorkerPool, task) -> None:
    for _ in range(3):
        workers.submit(task(stub.HANG), PATIENCE)
    workers.cancel()
    assert workers.pending() == 0
    assert answer(workers, task(stub.ANSWER)).outcome is Outcome.OK


def test_closing_ends_a_worker_and_what_it_started(workers: WorkerPool, task) -> None:
    worker = answer(workers, task(stub.ANSWER)).median_us
    grandchild = answer(workers, task(stub.SPAWN)).median_us
    assert worker and grandchild
    workers.submit(task(stub.HANG), PATIENCE)
    assert not is_gone(int(worker)) and not is_gone(int(grandchild))
    workers.close()
    assert comes_true(lambda: is_gone(int(worker)) and is_gone(int(grandchild)))
    assert workers.pending() == 0


def test_closing_leaves_no_process_behind(task) -> None:
    with WorkerPool(here(2, LocalTransport(COMMAND))) as workers:
        workers.submit(task(stub.HANG), PATIENCE)
        grandchild = answer_of_another(workers, task(stub.SPAWN))
        pids = [each.connection.popen.pid for each in workers._posts]
        assert not any(is_gone(pid) for pid in [*pids, grandchild])
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # reaped, too
    assert comes_true(lambda: is_gone(grandchild))
    assert workers.pending() == 0


# Of each fault, by its name in faulty_worker.py: the outcome, and how the error begins.
EXPECTED = {
    "compiler_dies": (Outcome.CRASH, "the worker died with exit code 3"),
    "segfault": (Outcome.CRASH, "the worker died by signal 11: the last word"),
    "syntax": (Outcome.COMPILE_ERROR, "SyntaxError: invalid syntax"),
    "hang": (Outcome.TIMEOUT, "no answer in 2 s"),
    "wrong": (Outcome.WRONG_RESULT, "WrongResultError: check 0, row 0: token"),
    "does_not_fit": (Outcome.OUT_OF_RESOURCES, "DoesNotFitError: 300 KiB of shared memory"),
    "out_of_memory": (Outcome.OUT_OF_RESOURCES, "OutOfMemoryError: tried to allocate 3 TiB"),
    "illegal_access": (Outcome.CRASH, "RuntimeError: CUDA error: an illegal memory access"),
    "cooperative": (Outcome.OUT_OF_RESOURCES, "RuntimeError: too many blocks in cooperative"),
    "prints": (Outcome.OK, ""),
    "slow": (Outcome.PRUNED, ""),
    "flaky": (Outcome.OK, ""),  # the first time
    "": (Outcome.OK, ""),
}


def test_each_failure_is_a_record_and_the_search_goes_on(
    free_space: Callable[..., Space],
    store: Store,
    toolchain: Toolchain,
    faulty_script: Path,
    faulty: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One search through every fault: processes take long to start, so it is one test."""
    monkeypatch.setattr(evaluate, "MEASURE_SECONDS", 2.5)
    space = free_space("score_programs_per_sm", "slack")
    before_finals: list[Record] = []

    def on_event(event: Event) -> None:
        if event.comparing:
            before_finals.extend(store.records())

    transport = LocalTransport((sys.executable, str(faulty_script)))
    with WorkerPool(here(1, transport)) as compilers, WorkerPool(here(1, transport)) as measurer:
        evaluator = MeasuringEvaluator(space.problem, space.device, compilers, measurer, seed=0)
        result = search(
            space,
            evaluator,
            store,
            Budget(trials=1000),
            toolchain=toolchain,
            sampler="exhaustive",
            on_event=on_event,
        )

    assert len(before_finals) == result.evaluated == 25
    for record in before_finals:
        wrong = faulty.fault(parse_config(record.config))
        outcome, error = EXPECTED[wrong]
        measurement = record.measurement
        assert measurement.outcome is outcome, (wrong, measurement)
        assert measurement.error[: len(error) or None] == error, (wrong, measurement)
        assert measurement.error.isprintable()
        if measurement.median_us is not None:
            pretended = faulty.time_of(parse_config(record.config))
            assert measurement.median_us == pytest.approx(pretended, rel=1e-4)
    assert result.failed == sum(
        outcome.name not in ("OK", "PRUNED")
        for outcome, _ in (EXPECTED[each] for each in [*faulty.FAULTS.values(), "wrong"])
    )

    timed_again = [each for each in store.records() if each.measurement.policy == "final-behind"]
    finals = [each for each in timed_again if each.measurement.outcome is Outcome.OK]
    assert len(finals) == 7  # six, and the default
    assert all(record.measurement.samples == 40 for record in finals)
    [flaky] = [each for each in timed_again if each not in finals]
    assert faulty.fault(parse_config(flaky.config)) == "flaky"
    assert flaky.measurement.outcome is Outcome.WRONG_RESULT
    assert {(0, 16), faulty.FASTEST} <= {faulty.place(parse_config(r.config)) for r in finals}
    assert result.default_us == 48.0
    assert result.winner in finals
    assert faulty.place(parse_config(result.winner.config)) == faulty.FASTEST


def test_a_worker_answers_until_its_input_ends(
    faulty_script: Path, faulty: ModuleType, problem: Problem, device: Device
) -> None:
    def task(programs: int, slack: int) -> Task:
        data = config_data(default_config(problem, device))
        config = parse_config({**data, "score_programs_per_sm": programs, "slack": slack})
        return Task(kind="measure", candidates=(Candidate(problem, config, device),))

    tasks = {str(place): task(*place) for place in ((4, 64), (0, 0), (4, 0))}
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 3>&1 >&2', "sh", sys.executable, str(faulty_script)],
        input="".join(to_line(name, each.data()) + "\n" for name, each in tasks.items()),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    lines = zip(tasks.items(), done.stdout.splitlines(), strict=True)
    replies = [read_reply(answer_to(name, line.encode()), each) for (name, each), line in lines]
    outcomes = [reply.measurements[0].outcome for reply in replies]
    assert outcomes == [Outcome.OK, Outcome.OK, Outcome.WRONG_RESULT]
    assert "noise of a compiled library" in done.stderr
    assert '"fatal": true' in done.stderr


class FarTransport(LocalTransport):
    """Stubs here, of which a killed one is taken for a lost connection."""

    def why_lost(self, code: int, errors: str) -> str | None:
        return "the connection was cut" if code == -9 else None


def boards(*sites: str) -> list[Place]:
    return [
        Place(name=f"board {number}", transport=FarTransport(COMMAND), site=site)
        for number, site in enumerate(sites)
    ]


class TestSeveralPlaces:
    def test_what_a_lost_worker_had_goes_to_another(self, task) -> None:
        notes: list[str] = []
        with WorkerPool(boards("a", "b"), notes.append) as workers:
            workers.submit(task(stub.LATE), PATIENCE)
            [post] = [each for each in workers._posts if each.request]
            os.kill(post.connection.popen.pid, 9)
            [(_, reply)] = workers.wait(PATIENCE)
            assert reply.measurements[0].outcome is Outcome.OK
            assert [each.connected for each in workers._posts if each is not post] == [True]
        name = post.place.name
        assert notes == [
            f"{name}: the connection was cut: its work goes to others, and it is tried again"
        ]

    @pytest.mark.parametrize(("sites", "asked"), [(("a", "b"), 2), (("a", "a"), 1)])
    def test_one_that_hangs_is_tried_on_another_machine_once(self, task, sites, asked) -> None:
        with WorkerPool(boards(*sites)) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            workers.submit(task(stub.ANSWER), PATIENCE)
            assert len([*workers.wait(PATIENCE), *workers.wait(PATIENCE)]) == 2
            began = [each.connection.popen.pid for each in workers._posts]
            workers.submit(task(stub.HANG), 0.3)
            [(_, reply)] = workers.wait(PATIENCE)
            assert reply.measurements[0].outcome is Outcome.TIMEOUT
            assert sum(map(is_gone, began)) == asked

    def test_places_come_and_go(self, task, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "ROSTER_SECONDS", 0.0)
        places = boards("a")
        with WorkerPool(lambda: places) as workers:
            assert (workers.size, workers.working, workers.sites) == (1, 0, {"a": 1})
            workers.submit(task(stub.LATE), PATIENCE)
            workers.submit(task(stub.ANSWER), PATIENCE, at="board 0")
            [old] = [each.connection.popen.pid for each in workers._posts]
            places = boards("a", "b")[1:]
            answers = [*workers.wait(PATIENCE), *workers.wait(PATIENCE)]
            assert is_gone(old)
            assert [reply.measurements[0] and "done" for _, reply in answers] == [None, "done"]
            assert (workers.size, workers.working, workers.sites) == (1, 1, {"b": 1})

    def test_no_place_is_waited_for_a_while(self, task, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.3)
        with WorkerPool(list) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            with pytest.raises(FlashtuneError, match=r"no worker is left .* run the same command"):
                workers.wait(PATIENCE)

    def test_who_is_not_admitted_gets_only_what_is_for_it(self, task) -> None:
        with WorkerPool(boards("a", "b"), admits=False) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE)
            assert workers.wait(0.2) == []
            workers.submit(task(stub.ANSWER), PATIENCE, owner="muster", at="board 1")
            assert len(workers.wait(PATIENCE, "muster")) == 1
            assert workers.newcomers == ["board 0", "board 1"]
            assert (workers.size, workers.working, workers.sites) == (2, 0, {})
            workers.admit("board 1")
            assert (workers.size, workers.working, workers.sites) == (2, 1, {"b": 1})
            assert len(workers.wait(PATIENCE)) == 1
            assert (workers.size, workers.working, workers.newcomers) == (2, 1, ["board 0"])
            workers.set_aside("board 0", "it is slow")
            assert (workers.size, workers.working, workers.newcomers) == (1, 1, [])

    def test_a_machine_in_trouble_is_set_aside_for_others(self, task) -> None:
        notes: list[str] = []
        with WorkerPool(boards("a", "b"), notes.append) as workers:
            workers.submit(task(stub.TROUBLE), PATIENCE)
            [(_, reply)] = workers.wait(PATIENCE)
            assert reply.measurements[0].outcome is Outcome.ENVIRONMENT  # the last one's, too
            assert workers.size == 1
        [note] = notes
        assert "is set aside because of a problem of its machine: no space left" in note

    def test_answers_go_to_their_owner(self, task) -> None:
        with WorkerPool(boards("a", "b")) as workers:
            workers.submit(task(stub.ANSWER), PATIENCE, owner="one")
            workers.submit(task(stub.HANG), PATIENCE, owner="other")
            assert (workers.pending("one"), workers.pending("other")) == (1, 1)
            assert len(workers.wait(PATIENCE, "one")) == 1
            assert (workers.pending("one"), workers.collect("one")) == (0, [])
            workers.cancel("other")
            assert (workers.pending("other"), workers.wait(1.0, "other")) == (0, [])
