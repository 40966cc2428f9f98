"""The race at first load: what is raced, what is kept, and when none is held.

Configs of a pretended CPU take the times they are told to (pretended.py); the last test races
C++ kernels on this machine's own.
"""

import copy
import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loaded import loaded
from torch.profiler import ProfilerActivity, profile

from flashtune.kernels.backends.cpp.compiler import compiler_version
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.measure.memory import scratch_bytes
from flashtune.kernels.measure.trial import Trial
from flashtune.kernels.measure.workload import Workload, _sets_for
from flashtune.kernels.plans.candidate import PLANS
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.runtime import decoder, heat, race
from flashtune.kernels.runtime.binding import N_SPARES
from flashtune.kernels.runtime.compilers import Compilers
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.lock import hold
from flashtune.tuning_db.policy import RACE
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

SCRIPT = Path(__file__).with_name("pretended.py")
MEASURED = Provenance.MEASURED
Explain = dict[str, Any]
pretended = loaded(SCRIPT)
N_SETS = _sets_for(pretended.PROBLEM, pretended.CPU.l2_bytes)
JUDGED = (  # bytes that judge, states, and two steps with their timers need here
    8 * (3 * 64 * 4096 + 8 * 512)
    + 8 * (N_SETS + 2) * 64
    + 2 * (20 * 8 + scratch_bytes(pretended.PROBLEM))
)

pytestmark = pytest.mark.usefixtures("racing")


DEFAULT = pretended.DEFAULT.parts
record, make_head = pretended.record, pretended.make_head


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("FLASHTUNE_DB", str(path))
    return path


@pytest.fixture
def backend(database: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pretended CPU; set its `times`."""
    found = pretended.Backend({})
    for module, name, value in pretended.places(found):
        monkeypatch.setattr(module, name, value)
    return found


def add(database: Path, *records: Record) -> None:
    with Store(database) as store:
        for each in records:
            store.add(each)


def kept(database: Path, policy: str = RACE) -> list[Record]:
    with Store(database, read_only=True) as store:
        return [each for each in store.records() if each.measurement.policy == policy]


def timed(data: Explain) -> dict[int, Explain]:
    """What a race says of each config, by its parts."""
    return {each["config"]["parts"]: each for each in data["race"]["timed"]}


@pytest.mark.parametrize("cut", [False, True])
def test_a_plan_on_tensor_cores_is_judged_as_one(
    database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    seen: list[bool] = []
    plan = replace(PLANS["cpp_fused"], tensor_cores=cut)
    monkeypatch.setattr(heat, "PLANS", {"cpp_fused": plan})
    monkeypatch.setattr(Workload, "why_wrong", lambda *_, tensor_cores: seen.append(tensor_cores))
    add(database, record(2, 1.0))
    make_head().explain()
    assert len(seen) > 1 and set(seen) == {cut}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]


def test_the_fastest_of_the_predicted_is_kept_and_runs_at_once_from_then_on(
    database: Path, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flashtune")
    add(database, record(1, 5.0), record(2, 6.0), record(4, 7.0))
    backend.times = {1: 12.0, 2: 8.0, 4: 9.0}
    data = json.loads(json.dumps(make_head().explain()))
    assert (data["level"], data["config"]["parts"]) == ("exact", 2)
    assert (data["provenance"], data["source"]) == ("measured", "user database")
    assert (data["raced"], data["stale"], data["median_us"]) == (True, False, 8.0)
    assert {parts: each["median_us"] for parts, each in timed(data).items()} == {
        DEFAULT: 10.0, 1: 12.0, 2: 8.0, 4: 9.0,
    }  # fmt: skip
    assert [parts for parts, each in timed(data).items() if each["dropped"] is None] == [2]
    assert data["race"]["centroids"] == "cold"
    [found] = kept(database)
    assert (found.config["parts"], found.provenance, found.key) == (2, MEASURED, data["record"])
    assert "raced 4 configs" in caplog.messages[-1]
    assert "8.0 us; the default took 10.0" in caplog.messages[-1]

    backend.compiled.clear()
    again = make_head().explain()
    assert (again["config"], again["raced"], again["race"]) == (data["config"], True, None)
    assert backend.compiled == [2]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("favourite_us", [9.95, 10.0, 12.0, 50.0])
def test_one_that_does_not_beat_the_default_by_more_than_the_noise_is_dropped(
    favourite_us: float, database: Path, backend: Any
) -> None:
    add(database, record(1, 5.0))
    backend.times = {1: favourite_us}
    data = make_head().explain()
    assert data["config"]["parts"] == DEFAULT
    assert "the default won a race of 2 configs here with 10.0 us" in data["why"]
    reason = timed(data)[1]["dropped"]
    assert reason == ("slower" if favourite_us > 13 else
                      "not faster than the default by more than the noise, 0.10 us")  # fmt: skip
    assert [each.config["parts"] for each in kept(database)] == [DEFAULT]
    again = make_head(tune="never").explain()
    assert (again["level"], again["config"]["parts"], again["raced"]) == ("exact", DEFAULT, True)


def test_configs_that_fail_are_dropped_and_remembered_if_it_was_when_they_ran(
    database: Path, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(database, *(record(parts, float(parts)) for parts in (1, 2, 4, 8)))
    backend.times = {1: "wrong", 2: "raises", 4: "broken", 8: 9.0}
    data = make_head().explain()
    assert data["config"]["parts"] == 8
    outcomes = {parts: each["outcome"] for parts, each in timed(data).items()}
    assert outcomes == {
        DEFAULT: "ok", 1: "wrong_result", 2: "crash", 4: "compile_error", 8: "ok",
    }  # fmt: skip
    assert "a fault on the device" in timed(data)[2]["dropped"]
    assert "is in the cluster" in timed(data)[1]["dropped"] or "logit" in timed(data)[1]["dropped"]
    assert {each.config["parts"]: each.measurement.outcome for each in kept(database)} == {
        8: Outcome.OK, 1: Outcome.WRONG_RESULT, 2: Outcome.CRASH,
    }  # fmt: skip
    assert warnings_of(caplog) == []


def test_where_the_default_fails_the_fastest_of_the_others_wins(
    database: Path, backend: Any
) -> None:
    add(database, record(1, 5.0), record(2, 6.0))
    backend.times = {DEFAULT: "wrong", 1: 30.0, 2: 20.0}
    data = make_head().explain()
    assert data["config"]["parts"] == 2
    assert "the default failed" in data["why"]


def test_where_nothing_works_plain_torch_answers(
    database: Path, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(database, record(1, 5.0))
    backend.times = {DEFAULT: "raises", 1: "raises"}
    found = make_head()
    assert found(torch.ones(1, 64).bfloat16()).shape == (1,)
    data = found.explain()
    assert data["level"] == "torch"
    assert "too few" in data["race"]["why_not"]
    assert len(warnings_of(caplog)) == 1
    assert backend.compiled.count(1) == 1  # what failed in the race is not tried after it
    make_head().explain()  # races what is known to be good, all of which has the same parts
    assert make_head().explain()["race"]["why_not"] == "the default is the only config"


def test_a_time_measured_with_other_tools_is_stale_and_raced_again(
    database: Path, backend: Any
) -> None:
    old = Toolchain(compiler="pretended 0.9")
    add(database, record(1, 3.0, provenance=MEASURED, toolchain=old))
    unraced = make_head(tune="never").explain()
    assert (unraced["config"]["parts"], unraced["stale"], unraced["race"]) == (1, True, None)
    assert "stale, for compiler changed since" in unraced["why"]
    backend.times = {1: 8.0}
    data = make_head().explain()
    assert (data["config"]["parts"], data["stale"], data["median_us"]) == (1, False, 8.0)
    [found] = kept(database)
    assert found.toolchain == pretended.TOOLS
    assert make_head().explain()["race"] is None


def test_a_stale_winner_that_loses_is_not_chosen_again_with_these_tools(
    database: Path, backend: Any
) -> None:
    old = Toolchain(compiler="pretended 0.9")
    add(database, record(1, 3.0, provenance=MEASURED, toolchain=old))
    backend.times = {1: 11.0}
    assert make_head().explain()["config"]["parts"] == DEFAULT
    again = make_head().explain()
    assert (again["config"]["parts"], again["raced"], again["race"]) == (DEFAULT, True, None)


@pytest.mark.parametrize(
    ("change", "outdated"),
    [
        ({}, ()),
        ({"triton": "3.6.1", "torch": "2.11.1+cu130"}, ()),
        ({"triton": "3.7.0"}, ("triton",)),
        ({"torch": "2.12.0", "driver": "590.1"}, ("torch", "driver")),
        ({"driver": "580.2"}, ("driver",)),
        ({"compiler": "c++ 14"}, ("compiler",)),
    ],
)
def test_which_changes_of_tools_make_a_time_stale(
    change: dict[str, str], outdated: tuple[str, ...]
) -> None:
    now = Toolchain(triton="3.6.0", torch="2.11.0+cu128", driver="580.1", compiler="c++ 12")
    then = Toolchain(**{**{name: getattr(now, name) for name in now.__slots__}, **change})
    assert then.outdated(now) == outdated


def test_what_was_measured_here_is_not_raced(database: Path, backend: Any) -> None:
    add(database, record(1, 30.0, provenance=MEASURED), record(2, 5.0))
    backend.times = {1: 30.0, 2: 5.0}
    data = make_head().explain()
    assert (data["config"]["parts"], data["race"], data["raced"]) == (1, None, False)
    assert backend.compiled == [1]


def test_where_nothing_is_known_what_is_good_elsewhere_is_raced(
    database: Path, backend: Any
) -> None:
    near = pretended.replace(pretended.PROBLEM, hidden_size=128)
    add(database, record(2, 5.0, problem=near, provenance=MEASURED))
    backend.times = {2: 7.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flashtune.kernels.runtime.choice.known_good", lambda *_: [pretended.config(4)]
        )
        data = make_head().explain()
    assert list(timed(data)) == [DEFAULT, 2, 4]
    assert (data["level"], data["config"]["parts"]) == ("exact", 2)


def test_logits_are_raced_for_by_themselves(database: Path, backend: Any) -> None:
    logits = pretended.replace(pretended.PROBLEM, n_tokens=2, epilogue="logits")
    add(database, record(1, 5.0, problem=logits), record(2, 5.0))
    backend.times = {1: 8.0, 2: "wrong"}
    found = make_head()
    data = found.explain(2, epilogue="logits")
    assert list(timed(data)) == [DEFAULT, 1]
    assert (data["config"]["parts"], data["raced"]) == (1, True)
    assert found.logits(torch.ones(2, 64)).shape == (2, 512)
    tokens = found.explain()
    assert timed(tokens)[2]["outcome"] == "wrong_result", "its own record"
    assert tokens["config"]["parts"] == 1, "the winner for logits ran beside it"


@pytest.mark.parametrize("tune", ["always", "", None])
def test_tune_is_one_of_two(tune: Any) -> None:
    with pytest.raises(FlashtuneError, match="tune must be one of race, never"):
        make_head(tune=tune)


def test_never_races_never_and_copies_keep_to_it(database: Path, backend: Any) -> None:
    add(database, record(1, 5.0))
    original = make_head(tune="never")
    for found in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        data = found.explain()
        assert (data["config"]["parts"], data["provenance"]) == (1, "predicted")
        assert data["race"] is None
    assert set(backend.compiled) == {1}
    assert pickle.loads(pickle.dumps(make_head())).explain()["race"]["timed"]


def test_nothing_is_raced_while_a_graph_is_captured(
    database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    start = race.Start(
        problem=pretended.PROBLEM,
        weights=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)),  # type: ignore[arg-type]
        device=pretended.CPU,
        toolchain=pretended.TOOLS,
        seconds=20.0,
        troubles=[],
    )
    monkeypatch.setattr(race, "look", lambda *_: pytest.fail("looked"))
    choice: Any = object()
    found, held = race.hold(start, choice)
    assert found is choice
    assert held.explain() == {"why_not": "a CUDA graph is being captured", "seconds": 0.0}
    assert not database.exists()


@pytest.mark.parametrize(
    ("room", "centroids"), [(0, None), (2**25, "cold"), (2 * JUDGED + 2**14, "warm")]
)
def test_without_room_nothing_is_raced_and_with_little_the_centroids_stay_warm(
    room: int, centroids: str | None, database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heat, "free_bytes", lambda _: room)
    add(database, record(1, 5.0))
    backend.times = {1: 8.0}
    data = make_head().explain()
    assert data["config"]["parts"] == 1
    if centroids is None:
        assert "0 MiB are free on cpu, but verifying" in data["race"]["why_not"]
        assert (data["provenance"], kept(database)) == ("predicted", [])
    else:
        assert data["race"]["centroids"].startswith(centroids)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_winner_that_cannot_be_kept_serves_this_process_with_one_warning(
    when: str,
    database: Path,
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    add(database, record(1, 5.0))
    backend.times = {1: 8.0}

    class Unwritable(Store):
        def __init__(self, path: Path, **options: Any) -> None:
            if when == "before":
                raise FlashtuneError(f"cannot open or write {path}")
            super().__init__(path, **options)

        def add(self, record: Record) -> None:
            raise FlashtuneError("the disk is full")

    monkeypatch.setattr(race, "Store", Unwritable)
    found = make_head()
    for _ in range(2):
        found(torch.ones(1, 64).bfloat16())
    data = found.explain()
    assert (data["config"]["parts"], data["provenance"]) == (1, "measured")
    assert data["source"] == "this process"
    [warning] = warnings_of(caplog)
    assert "the winner of a race is used, but not kept" in warning
    assert "instead" not in warning
    assert kept(database) == []


def test_a_config_that_compiles_too_long_is_left_out(database: Path, backend: Any) -> None:
    backend.times = {1: "slow", 2: 8.0}
    configs = [pretended.DEFAULT, pretended.config(2), pretended.config(1)]
    weights = make_head(tune="never").decoder.weights
    found = heat.compare(pretended.PROBLEM, weights, pretended.CPU, configs, seconds=1.0)
    assert [bool(each.measurement) for each in found.entries] == [True, True, False]
    assert found.entries[2].why == "it was not compiled in time"
    assert found.compile_s < 2.0


@pytest.mark.parametrize("fate", [8.0, "wrong", "raises", "broken"])
def test_what_a_race_loaded_is_unloaded(fate: float | str, database: Path, backend: Any) -> None:
    backend.times = {1: 8.0, 2: fate, 4: 90.0}
    add(database, *(record(parts, 5.0 + parts) for parts in (1, 2, 4)))
    data = make_head().explain()
    assert data["raced"]
    n_raced = 4 - (fate == "broken")
    assert backend.unloaded == n_raced
    assert backend.loads == n_raced + N_SPARES + 1, "the winner is loaded again, for the head"


def test_what_a_race_takes_is_said_before_it_is_taken(
    database: Path, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flashtune")
    weights = make_head(tune="never").decoder.weights
    configs = [pretended.DEFAULT, *(pretended.config(parts) for parts in (1, 2, 4))]
    heat.compare(pretended.PROBLEM, weights, pretended.CPU, configs, seconds=5.0)  # loads things
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = heat.compare(pretended.PROBLEM, weights, pretended.CPU, configs, seconds=5.0)
    now = peak = 0
    for event in sorted(seen.events(), key=lambda each: each.time_range.start):
        if event.name == "[memory]":
            now += event.cpu_memory_usage
            peak = max(peak, now)
    assert 0 < peak <= found.most_bytes
    said = [each for each in caplog.messages if each.startswith("a race takes up to ")]
    assert len(said) == 2
    assert f"a race takes up to {found.most_bytes / 2**20:.0f} MiB of the " in said[-1]


def test_a_hung_compiler_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = tmp_path / "hung"
    script.write_text("#!/bin/sh\necho $$ >> pids\nsleep 600 &\necho $! >> pids\nwait\n")
    script.chmod(0o755)
    compilers = Compilers(2)
    begun = time.monotonic()
    hung = compilers.submit(lambda: subprocess.run([script], cwd=tmp_path, check=True))
    after = compilers.submit(lambda: 5)
    waiting = [compilers.submit(lambda: time.sleep(0.3)) for _ in range(4)]
    assert after.result(timeout=10) == 5
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        time.sleep(0.01)
    compilers.wait(0.1)
    compilers.end()
    assert isinstance(hung.exception(timeout=1), subprocess.CalledProcessError)
    assert waiting[-1].cancelled()
    assert time.monotonic() - begun < 10
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_compiles_in_this_process_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    program = (
        "import time; from flashtune.kernels.runtime.compilers import Compilers\n"
        "compilers = Compilers(1); compilers.submit(lambda: time.sleep(600))\n"
        "compilers.wait(0.1); compilers.end(); print('over')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "over\n"


def test_a_default_that_is_not_compiled_in_time_leaves_nothing_to_compare_with(
    database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(race, "LEAST_SECONDS", 0.1)
    backend.times = {DEFAULT: "slow", 1: 8.0}
    add(database, record(1, 5.0))
    data = make_head().explain()
    assert (data["config"]["parts"], data["provenance"]) == (1, "predicted")
    assert data["race"]["why_not"] == "there were too few to compare"
    assert kept(database) == []


@pytest.mark.parametrize("when", ["verified", "timed"])
def test_only_the_config_that_lost_the_device_is_blamed(
    when: str, database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(database, record(1, 5.0), record(2, 6.0))
    lost, fail = [], Trial._fail

    def lose(self: Any, entrant: Any, error: Exception) -> None:
        fail(self, entrant, error)
        self.lost = True

    def make_timer(step: Any, _: Any) -> Any:
        guilty = backend._loaded[step] == 1

        def sample(replays: int) -> list[float]:
            if guilty and (when == "verified" or replays == 1):
                lost.append(step)
                raise RuntimeError("an illegal memory access was encountered")
            return [10.0] * replays

        return SimpleNamespace(sample=sample)

    monkeypatch.setattr(Trial, "_fail", lose)
    monkeypatch.setattr(backend, "timer", make_timer)
    data = make_head().explain()
    assert len(lost) == 1
    outcomes = {parts: each["outcome"] for parts, each in timed(data).items()}
    assert outcomes == {DEFAULT: None, 1: "crash", 2: None}
    reasons = [timed(data)[parts]["dropped"] for parts in (DEFAULT, 2)]
    early = "the device was lost before its turn came"
    late = "the device was lost while it was timed"
    assert reasons == [late, early if when == "verified" else late]
    assert [each.config["parts"] for each in kept(database)] == [1]


def test_all_races_of_a_head_share_its_time(
    database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(race.time, "monotonic", lambda: float(next(clock)))
    problems = [pretended.replace(pretended.PROBLEM, n_tokens=n) for n in range(1, 9)]
    add(database, *(record(1, 5.0, problem=each) for each in problems))
    found = make_head()
    found.prepare(*range(1, 9))
    reasons = [found.explain(n)["race"]["why_not"] for n in range(1, 9)]
    assert reasons[0] is None
    assert reasons[-1] == "the 20 s that a head may spend on races are used up"


def test_a_lock_kept_too_long_leaves_the_default(
    database: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(database, record(1, 5.0))
    make_head().explain()  # makes the lock's file
    [path] = database.parent.glob("tuning.db.race-*")
    database.unlink()
    add(database, record(1, 5.0))
    monkeypatch.setattr(race, "WAIT_SECONDS", 0.3)
    with hold(path, 0.0):
        data = make_head().explain()
    assert (data["level"], data["config"]["parts"]) == ("default", DEFAULT)
    assert "another process has raced for 0 s" in data["race"]["why_not"]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(database: Path) -> Iterator[Start]:
    """A racing process that waits for a line: `start({1: 8.0})`."""
    processes = []

    def begin(times: dict[int, float | str]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(database), json.dumps(times)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_of_processes_at_once_one_races_and_all_agree(database: Path, start: Start) -> None:
    add(database, record(1, 5.0), record(2, 6.0))
    fates: list[dict[int, float | str]] = [{1: 5.0, 2: 9.0}, {1: 9.0, 2: 5.0}, {1: 5.0, 2: 9.0}]
    processes = [start(times) for times in fates]
    assert [line_of(process) for process in processes] == ["ready"] * 3
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(line_of(process)) for process in processes]
    assert len({json.dumps(each["config"]) for each in answers}) == 1
    assert sum(bool((each["race"] or {}).get("timed")) for each in answers) == 1
    assert all(each["raced"] and each["troubles"] == [] for each in answers)
    [winner] = kept(database)
    assert answers[0]["config"] == winner.config


def test_a_process_that_dies_in_a_race_is_followed_and_its_config_passed_over(
    database: Path, start: Start
) -> None:
    add(database, record(1, 5.0), record(2, 6.0))
    first, second = start({1: "hangs", 2: 8.0}), start({1: 1.0, 2: 8.0})
    assert [line_of(first), line_of(second)] == ["ready", "ready"]
    for process in (first, second):
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
        if process is first:
            assert line_of(first) == "hanging"
    first.kill()
    data = json.loads(line_of(second))
    assert data["config"]["parts"] == 2
    assert timed(data)[1]["dropped"] == "a process died while it ran"
    assert [each.config["parts"] for each in kept(database)] == [2]


@pytest.mark.skipif(not compiler_version(), reason="no C++ compiler")
def test_cpp_kernels_race_on_this_cpu(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a table for this CPU were only predicted; others may use it at the same time."""
    monkeypatch.setattr(decoder, "MOST_SECONDS", 120.0)
    cpu = this_cpu()
    own = pretended.default_config(pretended.PROBLEM, cpu)
    others = [pretended.replace(own, parts=parts, threads=1) for parts in (2, 4)]
    add(
        database,
        *(record(1, 5.0, device=cpu.name, config=config_data(each)) for each in others),
    )
    data = make_head().explain()
    assert (data["level"], data["raced"]) == ("exact", True)
    assert [each["outcome"] in ("ok", "pruned") for each in data["race"]["timed"]] == [True] * 3
    [winner] = kept(database)
    assert (winner.device, winner.toolchain) == (cpu.name, toolchain(cpu))
    again = make_head().explain()
    assert (again["race"], again["config"]) == (None, data["config"])
