"""What a worker answers, in this process, with a backend that is pretended."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.measure import trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data, parse_config
from flashtune.tuner.workers import worker as worker_module
from flashtune.tuner.workers.answers.message import ReplyError, answer_to, from_line, to_line
from flashtune.tuner.workers.answers.reply import Reply, read_reply
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.worker import Worker
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome

FINE, HANGS, WRONG, ILLEGAL, SLOW = (0, 0), (2, 64), (4, 0), (8, 0), (8, 32)
MakeTask = Callable[..., Task]


@pytest.fixture
def backend(faulty: ModuleType, monkeypatch: pytest.MonkeyPatch):
    backend = faulty.PretendedBackend()
    monkeypatch.setattr(worker_module, "backend_of", lambda candidate: backend)
    monkeypatch.setattr(worker_module, "target_of", lambda device: backend)
    return backend


@pytest.fixture
def task(problem: Problem, device: Device) -> MakeTask:
    """A task about configs at these places: `task("measure", FINE, best_us=9.0)`."""

    def make(kind: str, *places: tuple[int, int], problem: Problem = problem, **other) -> Task:
        data = config_data(default_config(problem, device))
        configs = tuple(
            parse_config({**data, "score_programs_per_sm": programs, "slack": slack})
            for programs, slack in places
        )
        candidates = tuple(Candidate(problem, config, device) for config in configs)
        return Task(kind=kind, candidates=candidates, **other)

    return make


def read(reply: Reply, task: Task) -> Reply:
    """The reply as the search has it."""
    return read_reply(answer_to("a name", to_line("a name", reply.data()).encode()), task)


def test_tasks_and_replies_survive_their_lines(task: MakeTask, backend) -> None:
    asked = task("compare", FINE, SLOW, seed=3, best_us=12.5, sources=("a\nb", "c"))
    line = to_line("a name", asked.data())
    assert "\n" not in line
    request, data = from_line(line)
    assert (request, Task.from_data(data)) == ("a name", asked)
    for kind in ("compile", "measure"):
        reply = Worker().answer(task(kind, FINE))
        assert read(reply, task(kind, FINE)) == reply
    crash = Measurement(outcome=Outcome.CRASH, error="a\nb", policy="search-behind")
    crashed = Reply(measurements=(crash,), fatal=True)
    assert "\n" not in to_line("a name", crashed.data())
    [measurement] = read(crashed, task("measure", FINE)).measurements
    assert measurement.error == "a b"


def test_a_compilation_says_what_its_kernels_need(task: MakeTask, backend) -> None:
    reply = Worker().answer(task("compile", FINE))
    assert reply.measurements == ()
    assert [use.kernel for use in reply.uses] == ["step"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_plan_on_tensor_cores_is_judged_as_one(
    task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    asked, seen = task("measure", FINE), []
    plan = replace(asked.candidates[0].plan, tensor_cores=cut)
    monkeypatch.setattr(Candidate, "plan", property(lambda _: plan))
    monkeypatch.setattr(Workload, "why_wrong", lambda *_, tensor_cores: seen.append(tensor_cores))
    Worker().answer(asked)
    assert seen == [cut]


def test_a_config_is_pruned_only_when_far_behind_the_best(task: MakeTask, backend) -> None:
    def outcome(best_us: float | None) -> tuple[Outcome, int]:
        [measurement] = Worker().answer(task("measure", FINE, best_us=best_us)).measurements
        assert measurement.median_us == pytest.approx(50.0, abs=0.1)
        return measurement.outcome, measurement.samples

    assert outcome(None) == outcome(60.0) == outcome(40.0) == (Outcome.OK, 10)
    assert outcome(30.0) == (Outcome.PRUNED, 2)


def test_a_comparison_gives_a_measurement_for_each_config(task: MakeTask, backend) -> None:
    reply = Worker().answer(task("compare", SLOW, FINE))
    assert [each.policy for each in reply.measurements] == ["final-behind", "final-behind"]
    slow, fine = (each.median_us for each in reply.measurements)
    assert slow == pytest.approx(1000.0)
    assert fine == pytest.approx(50.0)


@pytest.mark.parametrize(("place", "outcome"), [(WRONG, "wrong_result"), (ILLEGAL, "crash")])
def test_a_config_that_fails_leaves_the_others_of_a_comparison_their_times(
    task: MakeTask, backend, place: tuple[int, int], outcome: str
) -> None:
    reply = Worker().answer(task("compare", FINE, place, SLOW))
    assert [each.outcome.value for each in reply.measurements] == ["ok", outcome, "ok"]
    assert [each.samples for each in reply.measurements] == [40, 0, 40]
    assert reply.fatal is (place == ILLEGAL)


def test_what_the_device_was_lost_to_is_known_and_the_others_are_not(
    task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = trial.Trial._fail

    def lose(self, entrant, error) -> None:
        fail(self, entrant, error)
        self.lost = True

    monkeypatch.setattr(trial.Trial, "_fail", lose)
    asked = task("compare", FINE, ILLEGAL, SLOW)
    reply = Worker().answer(asked)
    assert [each and each.outcome for each in reply.measurements] == [None, Outcome.CRASH, None]
    assert reply.fatal
    assert read(reply, asked) == reply


def test_finalists_are_not_blamed_where_the_inputs_cannot_be_made(
    task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("others use the device")

    monkeypatch.setattr(worker_module.Workload, "create", create)
    reply = Worker().answer(task("compare", FINE, SLOW))
    assert (reply.measurements, reply.fatal) == ((None, None), False)
    reply = Worker().answer(task("measure", FINE))
    assert reply.measurement.outcome is Outcome.OUT_OF_RESOURCES


@pytest.mark.parametrize("kind", ["measure", "compare"])
def test_source_that_comes_with_a_task_is_what_runs(
    task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded: list[object] = []
    loader = backend.loader
    monkeypatch.setattr(backend, "loader", lambda *args: loaded.append(args[-1]) or loader(*args))
    Worker().answer(task(kind, FINE, sources=("the text",)))
    Worker().answer(task(kind, FINE))
    assert loaded == ["the text", None]


def test_what_is_not_valid_is_told_from_what_does_not_compile(
    task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([FlashtuneError("tile too wide"), RuntimeError("x" * 9000 + "\n")])

    def fail(*_: object) -> None:
        raise next(errors) from KeyError("the cause")

    monkeypatch.setattr(backend, "compile", fail)
    worker = Worker()
    [invalid], [broken] = (
        worker.answer(task(kind, FINE)).measurements for kind in ("compile", "measure")
    )
    assert invalid.outcome is Outcome.INVALID
    assert invalid.error == "FlashtuneError: tile too wide ('the cause')"
    assert broken.outcome is Outcome.COMPILE_ERROR
    assert len(broken.error) == 500


def test_energy_that_cannot_be_read_is_no_configs_fault(task: MakeTask, backend) -> None:
    def energy(where: torch.device) -> None:
        raise FlashtuneError("this Jetson shows no power sensor")

    backend.energy = energy
    for kind in ("measure", "compare"):
        asked = task(kind, FINE, energy=True)
        [measurement] = read(Worker().answer(asked), asked).measurements
        assert measurement.outcome is Outcome.ENVIRONMENT
        assert "shows no power sensor" in measurement.error


@pytest.mark.parametrize("energy", [False, True])
def test_joules_come_where_they_were_asked_for_and_nowhere_else(
    energy: bool, task: MakeTask, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.energy = lambda where: nullcontext(lambda: 0.0)
    monkeypatch.setattr(trial, "joules_a_call", lambda timer, joules: 0.25)
    asked, other = (task("measure", FINE, energy=each) for each in (energy, not energy))
    reply = Worker().answer(asked)
    [measurement] = read(reply, asked).measurements
    assert measurement.joules == (0.25 if energy else None)
    with pytest.raises(ReplyError, match="energy that was not asked for"):
        read(reply, other)


def test_inputs_are_made_once_for_a_problem_and_seed(task: MakeTask, backend) -> None:
    worker, asked = Worker(), task("measure", FINE)
    first = worker.workload(asked)
    assert worker.workload(task("measure", SLOW)) is first
    other = worker.workload(task("measure", FINE, seed=1))
    assert other is not first
    assert not other.states[0].equal(first.states[0])
    larger = Problem(vocab_size=1024, hidden_size=64, n_clusters=32, n_probes=4)
    assert worker.workload(task("measure", FINE, problem=larger)).problem == larger
