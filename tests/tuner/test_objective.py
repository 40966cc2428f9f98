"""Energy as an objective: what a search ranks by, what it names as winner, what it refuses."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import flashtune
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.plans.config import Config, config_data
from flashtune.tuner.cli.main import cli
from flashtune.tuner.objective import Objective, front
from flashtune.tuner.search.replay import ReplayEvaluator
from flashtune.tuner.search.search import Budget, Result, search
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.store import Store

TIME, ENERGY, BOTH = Objective
TINY = "vocab=512,hidden=64,clusters=32,probes=4"


def measured(time_us: float, joules: float | None) -> Measurement:
    return Measurement(outcome=Outcome.OK, median_us=time_us, spread_us=0.1, joules=joules)


def test_what_is_minimised() -> None:
    measurement = measured(20.0, 0.008)
    assert TIME.cost(measurement) == 20.0
    assert ENERGY.cost(measurement) == pytest.approx(8000.0)
    assert BOTH.cost(measurement) == pytest.approx(math.sqrt(20.0 * 8000.0))
    assert TIME.seen(measurement) is measurement
    assert ENERGY.seen(measurement).median_us == pytest.approx(8000.0)
    assert not ENERGY.knows(measured(20.0, None)) and TIME.knows(measured(20.0, None))
    failed = Measurement(outcome=Outcome.CRASH, error="x")
    assert ENERGY.cost(failed) is None and ENERGY.knows(failed)
    assert ENERGY.seen(failed) is failed


@pytest.fixture
def timed(recorded: Any) -> Callable[..., Record]:
    def make(config: Config, time_us: float, joules: float | None) -> Record:
        record: Record = recorded(config, time_us)
        return replace(record, measurement=replace(record.measurement, joules=joules))

    return make


@pytest.fixture
def space(free_space: Any) -> Space:
    return free_space("score_rows", "slack")


def costs(config: Config) -> tuple[float, float]:
    """The more rows the faster, and the more it takes; slack makes both worse."""
    data = config_data(config)
    rows, slack = math.log2(int(data["score_rows"])), int(data["slack"]) / 64
    return 20.0 - 2 * rows + slack, 0.001 * (1 + rows + slack)


@pytest.fixture
def run(space: Space, store: Store, toolchain: Toolchain, timed: Any) -> Callable[..., Result]:
    def run(objective: Objective, trials: int = 1000) -> Result:
        records = [timed(config, *costs(config)) for config in space.configs()]
        return search(
            space, ReplayEvaluator(records), store, Budget(trials=trials),
            toolchain=toolchain, sampler="exhaustive", objective=objective,
        )  # fmt: skip

    return run


def test_the_front_holds_what_nothing_beats_in_both(space: Space, timed: Any) -> None:
    records = [timed(config, *costs(config)) for config in space.configs()]
    found = front(records)
    assert {int(each.config["slack"]) for each in found} == {0}
    assert len(found) == len({each.config["score_rows"] for each in records}) > 2
    times = [each.measurement.median_us for each in found]
    energies = [each.measurement.joules for each in found]
    assert times == sorted(times) and energies == sorted(energies, reverse=True)
    assert front([replace_joules(each, None) for each in records]) == []


def replace_joules(record: Record, joules: float | None) -> Record:
    return replace(record, measurement=replace(record.measurement, joules=joules))


def test_each_objective_has_its_winner(run: Any, space: Space) -> None:
    fastest, least = run(TIME).winner, run(ENERGY).winner
    rows = {name: int(each.config["score_rows"]) for name, each in
            (("fastest", fastest), ("least", least))}  # fmt: skip
    every = [int(config_data(config)["score_rows"]) for config in space.configs()]
    assert (rows["fastest"], rows["least"]) == (max(every), min(every))
    both = run(BOTH)
    assert both.winner == fastest
    keys = [each.key for each in both.front]
    assert keys[0] == fastest.key and keys[-1] == least.key and len(keys) > 2
    assert run(TIME).front == ()


def test_times_are_told_as_times(run: Any) -> None:
    result = run(ENERGY)
    assert result.searched_us == result.winner.measurement.median_us
    assert result.default_us is not None and result.default_us < 30.0


def test_what_was_only_timed_is_evaluated_again(
    run: Any, space: Space, store: Store, timed: Any
) -> None:
    configs = list(space.configs())
    store.add(*(timed(config, 5.0, None) for config in configs[:3]))
    assert run(ENERGY).evaluated == len(configs)
    assert all(each.measurement.joules is not None for each in store.records(ok_only=True))


@pytest.mark.parametrize("objective", ["energy", "both"])
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("orin", "energy can only be measured, not predicted: search on orin-nano-super itself"),
        ("cpu", "the energy of cpu cannot be measured here"),
    ],
)
def test_what_has_no_energy_is_refused_in_one_line(
    device: str, said: str, objective: str, tmp_path: Path
) -> None:
    database = str(tmp_path / "a.db")
    words = ["search", "--device", device, "--shape", TINY, "--objective", objective]
    result = CliRunner().invoke(cli, [*words, "--db", database])
    assert result.exit_code == 2
    assert f"Error: {said}" in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(FlashtuneError, match="energy"):
        flashtune.search(device=device, shapes=[TINY], objective=objective, db=database)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(FlashtuneError, match="objective must be one of time, energy, both"):
        flashtune.search(device="orin", shapes=[TINY], objective="speed")


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """This machine's CPU has a counter that every look finds a joule further."""
    from flashtune.tuner.here import this_device, this_gpu
    from flashtune.tuner.search import evaluate, session
    from flashtune.tuner.workers import worker

    looks: list[str] = []

    @contextmanager
    def energy(where: Any) -> Iterator[Callable[[], float]]:
        def joules() -> float:
            looks.append("")
            return float(len(looks))

        yield joules

    assert this_gpu() is None
    target = replace(target_of(this_device()), energy=energy)
    for module in (evaluate, session, worker):
        monkeypatch.setattr(module, "target_of", lambda device: target)
    monkeypatch.setattr("flashtune.kernels.measure.energy.LEAST_SECONDS", 0.02)
    yield looks


def test_a_search_measures_energy_where_there_is_a_counter(
    metered: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its worker answers in this process, whose CPU is pretended to have a counter."""
    from flashtune.tuner.workers.pool import WorkerPool
    from flashtune.tuner.workers.worker import Worker

    answers: list[Any] = []
    worker = Worker()

    def submit(pool: WorkerPool, task: Any, seconds: float, *, owner: Any, **where: Any) -> None:
        answers.append((pool, owner, task, worker.answer(task)))

    def answered(pool: WorkerPool, owner: Any) -> list[Any]:
        return [each for each in answers if each[0] is pool and each[1] is owner]

    def collect(pool: WorkerPool, owner: Any) -> list[Any]:
        mine = answered(pool, owner)
        for each in mine:
            answers.remove(each)
        return [(task, reply) for *_, task, reply in mine]

    monkeypatch.setattr(WorkerPool, "submit", submit)
    monkeypatch.setattr(WorkerPool, "collect", collect)
    monkeypatch.setattr(WorkerPool, "pending", lambda pool, owner=None: len(answered(pool, owner)))
    words = ["search", "--device", "cpu", "--shape", TINY, "--objective", "both", "--trials", "2"]
    database = str(tmp_path / "a.db")
    result = CliRunner().invoke(cli, [*words, "--jobs", "2", "--db", database, "--json"])
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)["results"]
    assert found["objective"] == "both" and found["front"]
    assert found["front"][0]["measurement"]["joules"] > 0
    with Store(Path(database), read_only=True) as store:
        assert all(each.measurement.joules for each in store.records(ok_only=True))
    result = CliRunner().invoke(cli, [*words, "--jobs", "2", "--db", database])
    assert "Pareto front of time and energy" in result.stdout
    assert metered
