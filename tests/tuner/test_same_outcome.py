"""The race, the search's worker and the timing of a head call the same error by the same name."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.backends.torch import decode
from flashtune.kernels.measure.failure import DoesNotFitError
from flashtune.kernels.measure.timing import WallTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.runtime import heat
from flashtune.kernels.weights import Step
from flashtune.tuner.clustering import head_latency
from flashtune.tuner.workers import worker
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome

ERRORS: dict[Outcome | None, list[Exception]] = {
    Outcome.INVALID: [FlashtuneError("the tile is wider than the row")],
    Outcome.OUT_OF_RESOURCES: [
        DoesNotFitError("300 KiB of shared memory, of 163"),
        torch.OutOfMemoryError("tried to allocate 3 TiB"),
        RuntimeError("too many blocks in cooperative launch"),
        RuntimeError("Triton: out of resource: shared memory"),
    ],
    None: [RuntimeError("an illegal memory access"), OSError("the driver"), KeyError("x")],
}
CASES = [(error, outcome) for outcome, errors in ERRORS.items() for error in errors]


class Backend:
    """Raises an error at a stage, if any; else gives right tokens, or wrong ones."""

    torch_device = "cpu"

    def __init__(self, error: Exception | None = None, stage: str = "", by: int = 0) -> None:
        self.error, self.stage, self.by = error, stage, by

    def loader(self, candidate: Candidate, *_: Any) -> Callable[[], Step]:
        self._reach("compile")
        return lambda: self._load(candidate.problem)

    def _load(self, problem: Problem) -> Step:
        self._reach("load")

        def step(weights: Any, hidden: torch.Tensor, out: torch.Tensor) -> None:
            self._reach("run")
            out.copy_(decode(weights, hidden, problem.n_probes)).add_(self.by).remainder_(512)

        return step

    def timer(self, step: Step, workload: Workload) -> WallTimer:
        self._reach("time")
        return WallTimer(step, workload)

    def _reach(self, stage: str) -> None:
        if self.error is not None and stage == self.stage:
            raise self.error


Run = Callable[[Backend], tuple[Outcome, str]]


@pytest.fixture
def race(problem: Problem, device: Device, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(backend: Backend) -> tuple[Outcome, str]:
        monkeypatch.setattr(heat, "backend_of", lambda _: backend)
        monkeypatch.setattr(heat, "target_of", lambda _: backend)
        workload = Workload.create(problem, torch.device("cpu"), cold_bytes=0, seed=0)
        configs: list[Config] = [default_config(problem, device)]
        found = heat.compare(problem, workload.sets[0], device, configs, seconds=20.0)
        measurement = found.entries[0].measurement
        assert measurement is not None
        return measurement.outcome, measurement.error

    return run


@pytest.fixture(params=["measure", "compare"])
def search(
    request: pytest.FixtureRequest,
    problem: Problem,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    def run(backend: Backend) -> tuple[Outcome, str]:
        monkeypatch.setattr(worker, "backend_of", lambda _: backend)
        monkeypatch.setattr(worker, "target_of", lambda _: backend)
        candidate = Candidate(problem, default_config(problem, device), device)
        task = Task(kind=request.param, candidates=(candidate,))
        reply = worker.Worker().answer(task)
        assert reply.measurement is not None
        assert reply.fatal is (reply.measurement.outcome is Outcome.CRASH)
        return reply.measurement.outcome, reply.measurement.error

    return run


@pytest.mark.parametrize("stage", ["compile", "load", "run", "time"])
@pytest.mark.parametrize(("error", "outcome"), CASES)
def test_the_race_and_the_search_agree(
    error: Exception, outcome: Outcome | None, stage: str, race: Run, search: Run
) -> None:
    by_stage = Outcome.CRASH if stage in ("run", "time") else Outcome.COMPILE_ERROR
    text = f"{type(error).__name__}: {error}"
    expected = (outcome or by_stage, text)
    assert race(Backend(error, stage)) == expected
    assert search(Backend(error, stage)) == expected


def test_they_agree_on_what_is_wrong_and_on_what_is_right(race: Run, search: Run) -> None:
    assert race(Backend(by=1))[0] is search(Backend(by=1))[0] is Outcome.WRONG_RESULT
    assert race(Backend()) == search(Backend()) == (Outcome.OK, "")


@pytest.mark.parametrize(("error", "outcome"), CASES)
def test_the_timing_of_a_head_names_them_alike(
    error: Exception, outcome: Outcome | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, clusters = 64, 8
    parts: Any = SimpleNamespace(
        weight=torch.randn(vocab, 16),
        clusters=SimpleNamespace(
            centroids=torch.randn(clusters, 16), assignments=torch.arange(vocab) % clusters
        ),
        special_token_ids=(),
        n_probes=2,
    )
    latency = head_latency.HeadLatency(parts, torch.randn(4, 16))
    problem = Problem(vocab_size=vocab, hidden_size=16, n_clusters=clusters, n_probes=2)
    bound = SimpleNamespace(take_step=lambda: Backend(error, "run")._load(problem))
    monkeypatch.setattr(head_latency, "bind", lambda *_: bound)
    name = (outcome or Outcome.CRASH).value
    with pytest.raises(FlashtuneError) as caught:
        latency.probing(2)
    assert str(caught.value) == (
        f"the head with 2 probes cannot be timed: {name}: {type(error).__name__}: {error}"
    )
