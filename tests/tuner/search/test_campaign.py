"""Searches that meet with everything at once: workers that lie, kills, and other searches.

Each with a fixed number that says what goes wrong.
"""

import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loaded import loaded

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.config import config_data
from flashtune.tuner.search.evaluate import MeasuringEvaluator
from flashtune.tuner.search.search import Budget, search
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.transport import LocalTransport, here
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store

SCRIPT = Path(__file__).with_name("lying_worker.py")
FREE = ("score_rows", "select_warps", "slack", "evict")  # 160 configs
MARK = "FLASHTUNE_TEST_CAMPAIGN"
PATIENCE = 60.0  # seconds, on a busy machine
SEARCH = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parents[1])]  # beside it, and tests/
import test_campaign as campaign

campaign.search_and_say(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""
AT_ONCE = "at once"  # an argument: wait for a line before the search


lying = loaded(SCRIPT)


def marked(mark: str) -> list[int]:
    """The other living processes that have a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (process / "environ").read_bytes() and state != "Z":
                found.append(int(process.name))
        except OSError:
            continue
    return [each for each in found if each != os.getpid()]


@pytest.fixture
def mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What tells a test's processes, of which none may be left in the end."""
    mark = f"{request.node.name}-{os.getpid()}"
    monkeypatch.setenv(MARK, mark)
    yield mark
    end = time.monotonic() + PATIENCE
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.02)
    assert marked(mark) == []


@pytest.fixture
def space(free_space) -> Space:
    return free_space(*FREE)


def honest_number(space: Space, first: int) -> int:
    """The first number from there under which the default is honest."""
    default = config_data(default_config(space.problem, space.device))
    number = first
    while lying.fault_of(default, number)[0]:
        number += 1
    return number


def test_of_workers_that_lie_in_every_way_the_best_honest_config_is_found(
    space: Space, store: Store, toolchain: Toolchain, mark: str
) -> None:
    number = honest_number(space, 1)
    descriptors = len(os.listdir("/proc/self/fd"))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    transport = LocalTransport((sys.executable, "-S", str(SCRIPT), str(number)))
    with WorkerPool(here(1, transport)) as measurer:
        evaluator = MeasuringEvaluator(space.problem, space.device, None, measurer, seed=0)
        result = search(
            space, evaluator, store, Budget(trials=100), toolchain=toolchain, sampler="random"
        )
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 64 * 2**10  # KiB
    records = store.records()
    assert len(records) == result.evaluated == 100
    faults = {each.key: lying.fault_of(dict(each.config), number) for each in records}
    for record in records:
        fault, time_us = faults[record.key]
        measurement = record.measurement
        assert measurement.error.isprintable() and len(measurement.error) <= 500
        if not fault:
            assert measurement.outcome in (Outcome.OK, Outcome.PRUNED), measurement
        if measurement.outcome is Outcome.OK and fault not in ("flaky", "late"):
            assert measurement.median_us == pytest.approx(time_us)
    assert {fault for fault, _ in faults.values()} > {"fake", "flaky", "huge", "escapes", "nan"}
    right = ("", "fake", "escapes", "floods")
    best_us = min(time_us for fault, time_us in faults.values() if fault in right)
    assert result.winner is not None
    assert faults[result.winner.key] in [(fault, pytest.approx(best_us)) for fault in right]
    assert result.winner.measurement.policy == "final-behind"


def search_and_say(path: Path, number: int, trials: int) -> None:
    """Search, and print the key of every record that was written."""
    from flashtune.tuning_db.device import find_device
    from flashtune.tuning_db.problem import Problem

    problem = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
    device = find_device("orin")
    transport = LocalTransport((sys.executable, "-S", str(SCRIPT), str(number)))
    with Store(path) as store, WorkerPool(here(1, transport)) as measurer:
        add = store.add

        def said(*records: object) -> None:
            add(*records)
            for record in records:
                print(record.key, flush=True)

        store.add = said
        print("begun", flush=True)
        if AT_ONCE in sys.argv:
            sys.stdin.readline()
        search(
            Space(problem, device), MeasuringEvaluator(problem, device, None, measurer, seed=0),
            store, Budget(trials=trials), toolchain=Toolchain(triton="3.6.0"),
            sampler="exhaustive",
        )  # fmt: skip


def start(path: Path, number: int, trials: int, *words: str) -> "subprocess.Popen[str]":
    folder = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, folder, str(path), str(number), str(trials), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holds(path: Path, said: list[str]) -> None:
    """Every record that a search said it had written is in the database, which is whole."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = {key for (key,) in connection.execute("SELECT key FROM records")}
        measurements = connection.execute("SELECT count(*) FROM measurements").fetchone()[0]
    connection.close()
    assert kept >= set(said)
    assert measurements >= len(said)


def test_a_search_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, mark: str) -> None:
    generator, path, said = random.Random(3), tmp_path / "tuning.db", list[str]()
    for _ in range(2):
        process = start(path, 3, 10_000)
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        for _ in range(generator.randrange(3, 20)):
            said.append(process.stdout.readline().strip())
        time.sleep(generator.random() / 10)
        process.kill()
        out, errors = process.communicate()
        assert (process.returncode, errors) == (-9, "")
        said += out.split()
        end = time.monotonic() + PATIENCE
        while marked(mark) and time.monotonic() < end:
            time.sleep(0.02)
        assert marked(mark) == []
        holds(path, said)
    assert len(said) > 10
    process = start(path, 3, len(said) + 5)
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    holds(path, [*said, *out.split()[1:]])


def test_searches_at_once_on_one_database_lose_nothing(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "tuning.db"
    processes = [start(path, number, 15, AT_ONCE) for number in (5, 5, 6)]
    said = []
    for process in processes:  # all are there: none takes over what another has written
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, errors = process.communicate(timeout=2 * PATIENCE)
        assert (process.returncode, errors) == (0, "")
        said += out.split()
    assert len(said) >= 3 * 15
    holds(path, said)
