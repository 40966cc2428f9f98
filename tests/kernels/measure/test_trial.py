"""What becomes of steps on trial, and what an error is called."""

import errno
import math
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.measure.failure import (
    DoesNotFitError,
    WrongResultError,
    failure,
    outcome_of,
)
from flashtune.kernels.measure.trial import FIRST_SAMPLES, Trial
from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.record import Outcome


class Step:
    """Takes its times one after the other, the last one for ever; an error among them is raised.

    verified: how often it was; a step that is `wrong` gives its reason.
    """

    def __init__(self, *times: float | Exception, wrong: str = "") -> None:
        self.times, self.wrong, self.verified, self.taken = list(times), wrong, 0, 0

    def sample(self, replays: int) -> list[float]:
        samples = []
        for _ in range(replays):
            now = self.times[min(self.taken, len(self.times) - 1)]
            self.taken += 1
            if isinstance(now, Exception):
                raise now
            samples.append(now)
        return samples


class Workload:
    """Verifies steps by their own word."""

    def __init__(self, is_cuda: bool = False) -> None:
        self.sets = (SimpleNamespace(weight=SimpleNamespace(is_cuda=is_cuda)),)

    def why_wrong(self, step: Step, slack: int, *, tensor_cores: bool) -> str | None:
        step.verified += 1
        return step.wrong or None


def make_trial(is_cuda: bool = False, **steps: Step) -> Trial[str]:
    """A trial to which these steps were admitted."""
    make_timer: Any = lambda step, workload: step  # noqa: E731
    workload: Any = Workload(is_cuda)
    trial: Trial[str] = Trial(workload, make_timer, policy="race")
    for name, step in steps.items():
        trial.load(name, lambda step=step: step)  # type: ignore[misc]
        trial.admit(name, slack=0)
    return trial


def test_steps_take_turns_and_first_samples_do_not_count() -> None:
    order = []
    steps = {name: Step(99.0, 99.0, 10.0, 11.0, 12.0) for name in "ab"}
    trial = make_trial(**steps)
    for name, step in steps.items():
        sample = step.sample
        step.sample = lambda n, name=name, sample=sample: order.append(name) or sample(n)  # type: ignore
    trial.take_turns(rounds=3)
    assert order == ["a", "b"] * 3
    for measurement in trial.finish().values():
        assert (measurement.outcome, measurement.policy) == (Outcome.OK, "race")
        assert (measurement.median_us, measurement.samples) == (11.0, 3)


def test_replays_are_taken_together() -> None:
    trial = make_trial(a=Step(10.0))
    trial.take_turns(rounds=2, replays=5)
    assert trial.finish()["a"].samples == 10


def test_far_losers_are_dropped_with_their_first_samples() -> None:
    steps = {"fast": Step(10.0), "near": Step(13.0), "far": Step(13.1), "default": Step(50.0)}
    trial = make_trial(**steps)
    assert trial.fastest_us == 10.0
    trial.drop_slower_than(13.0, spared=("default",))
    trial.take_turns(rounds=4)
    found = trial.finish()
    assert {name: each.outcome.value for name, each in found.items()} == {
        "fast": "ok", "near": "ok", "far": "pruned", "default": "ok",
    }  # fmt: skip
    assert (found["far"].median_us, found["far"].samples) == (13.1, FIRST_SAMPLES)
    assert steps["far"].taken == FIRST_SAMPLES


def test_a_failure_ends_one_and_the_others_go_on() -> None:
    steps = {
        "wrong": Step(1.0, wrong="token 3 is of another cluster"),
        "first": Step(ValueError("at once")),
        "later": Step(5.0, 5.0, 5.0, ValueError("then")),
        "fine": Step(10.0),
    }
    trial = make_trial(**steps)
    trial.load("broken", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    trial.admit("broken", slack=0)
    assert set(trial.loaded) == set(steps)
    assert set(trial.running) == {"later", "fine"}
    trial.take_turns(rounds=4)
    assert {name: (each.outcome.value, each.error) for name, each in trial.finish().items()} == {
        "wrong": ("wrong_result", "WrongResultError: token 3 is of another cluster"),
        "first": ("crash", "ValueError: at once"),
        "later": ("crash", "ValueError: then"),
        "fine": ("ok", ""),
        "broken": ("compile_error", "ZeroDivisionError: division by zero"),
    }
    assert steps["wrong"].taken == 0


def test_nothing_runs_where_nothing_was_admitted() -> None:
    trial = make_trial(only=Step(1.0, wrong="no"))
    assert trial.fastest_us == math.inf
    trial.drop_slower_than(1.3 * trial.fastest_us)
    trial.take_turns(rounds=3)
    assert list(trial.finish()) == ["only"]


def test_turns_end_with_the_time_though_not_before_the_least() -> None:
    trial = make_trial(a=Step(10.0))
    trial.take_turns(rounds=20, least=3, until=-math.inf)
    assert trial.finish()["a"].samples == 3


@pytest.mark.parametrize("when", [0, FIRST_SAMPLES + 1])
def test_only_the_step_that_took_the_device_along_is_blamed(
    when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An illegal access stays with the process: all that runs after it fails as well."""
    error = RuntimeError("an illegal memory access was encountered")

    def synchronize() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    steps = {
        "before": Step(10.0), "guilty": Step(*[10.0] * when, error), "after": Step(10.0),
    }  # fmt: skip
    trial = make_trial(is_cuda=True, **steps)
    assert trial.lost is (when == 0)
    trial.take_turns(rounds=5)
    assert trial.lost
    [(name, measurement)] = trial.finish().items()
    assert (name, measurement.outcome) == ("guilty", Outcome.CRASH)
    assert steps["after"].verified == (when > 0)


def test_a_device_that_answers_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trial = make_trial(is_cuda=True, bad=Step(ValueError("no")), good=Step(10.0))
    trial.take_turns(rounds=2)
    assert not trial.lost
    assert [each.outcome.value for each in trial.finish().values()] == ["crash", "ok"]


@pytest.mark.parametrize("stage", [Outcome.COMPILE_ERROR, Outcome.CRASH])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (FlashtuneError("the tile is wider than the row"), Outcome.INVALID),
        (MachineTroubleError("no C++ compiler"), Outcome.ENVIRONMENT),
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.ENVIRONMENT),
        (PermissionError(errno.EACCES, "Permission denied"), Outcome.ENVIRONMENT),
        (subprocess.CalledProcessError(1, ["gcc"]), Outcome.ENVIRONMENT),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), Outcome.ENVIRONMENT),
        (RuntimeError("ptxas fatal: write: No space left on device"), Outcome.ENVIRONMENT),
        (OSError("a library's own words, without a number"), None),
        (FlashtuneError("out of memory"), Outcome.INVALID),
        (WrongResultError("token 3"), Outcome.WRONG_RESULT),
        (DoesNotFitError("300 KiB, of 163"), Outcome.OUT_OF_RESOURCES),
        (torch.OutOfMemoryError("tried to allocate 3 TiB"), Outcome.OUT_OF_RESOURCES),
        (RuntimeError("CUDA error: Out of Memory"), Outcome.OUT_OF_RESOURCES),
        (RuntimeError("too many blocks in cooperative launch"), Outcome.OUT_OF_RESOURCES),
        (RuntimeError("out of resource: shared memory"), Outcome.OUT_OF_RESOURCES),
        (RuntimeError("an illegal memory access"), None),
        (SyntaxError("invalid syntax"), None),
    ],
)
def test_an_error_has_one_outcome(
    error: Exception, outcome: Outcome | None, stage: Outcome
) -> None:
    assert outcome_of(error, stage) is (outcome or stage)


def test_a_file_that_is_missing_is_the_machines_trouble_until_the_step_runs() -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file", "g++")
    assert outcome_of(missing, Outcome.COMPILE_ERROR) is Outcome.ENVIRONMENT
    assert outcome_of(missing, Outcome.CRASH) is Outcome.CRASH


def test_an_error_is_one_line_with_its_cause_and_no_longer_than_is_kept() -> None:
    error = RuntimeError("ptxas\n fell over")
    error.__cause__ = MemoryError("out of memory")
    found = failure(error, Outcome.COMPILE_ERROR, policy="search")
    assert found.error == "RuntimeError: ptxas fell over (out of memory)"
    assert found.outcome is Outcome.OUT_OF_RESOURCES
    assert len(failure(RuntimeError("x" * 9000), Outcome.CRASH, policy="search").error) == 500


def test_the_machines_trouble_may_be_the_cause() -> None:
    """But not what was merely being handled, as a look into a cache."""
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        raise FlashtuneError("no kernel") from OSError(errno.EROFS, "Read-only")
    except FlashtuneError as error:
        assert outcome_of(error, Outcome.CRASH) is Outcome.ENVIRONMENT
    try:
        try:
            raise FileNotFoundError(errno.ENOENT, "not in the cache")
        except FileNotFoundError:
            raise FlashtuneError("the tile is too wide")  # noqa: B904
    except FlashtuneError as error:
        assert outcome_of(error, Outcome.CRASH) is Outcome.INVALID
    assert failure(full, Outcome.CRASH, "search").error.endswith("No space left on device")
