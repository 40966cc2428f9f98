"""This machine's devices by name, and the bandwidth that times are judged by."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from flashtune.kernels.backends.cpp.this_cpu import describe_cpu
from flashtune.tuner import here
from flashtune.tuner.search import session
from flashtune.tuner.search.result_data import result_data
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.store import Store

H200 = find_device("h200")


@pytest.fixture(params=[True, False], ids=["gpu", "none"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(here, "this_gpu", lambda: H200 if request.param else None)
    return bool(request.param)


def test_work_is_done_on_a_device_of_this_machine(gpu: bool) -> None:
    assert here.torch_device_named(None) == ("cuda" if gpu else "cpu")
    for name in ("cpu", "CPU", describe_cpu().name):
        assert here.torch_device_named(name) == "cpu"
    for name in ("gpu", "cuda", "h200", "nvidia-h200"):
        if gpu:
            assert here.torch_device_named(name) == "cuda"
        else:
            with pytest.raises(FlashtuneError, match=r"finds no GPU|not a device of"):
                here.torch_device_named(name)
    with pytest.raises(FlashtuneError, match="A40 is not a device of this machine"):
        here.torch_device_named("a40")


def test_devices_by_name(gpu: bool) -> None:
    assert here.device_named("a40") == find_device("a40")
    if gpu:
        assert here.device_named("gpu") == here.device_named("cuda") == H200
    else:
        with pytest.raises(FlashtuneError, match="finds no GPU here"):
            here.device_named("gpu")


def test_a_cpus_bandwidth_is_measured_in_the_run_that_it_judges(
    store: Store, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after: the floor is of the faster, whatever an earlier run found."""
    rates = iter([2e10, 3e10])
    monkeypatch.setattr(here, "fresh_bandwidth", lambda device: next(rates))
    floors = []

    class Display:
        def note(self, text: str) -> None: ...

        def start(self, problem: Problem, trials: int, floor_us: float | None) -> object:
            floors.append(floor_us)
            raise KeyboardInterrupt

    cpu = replace(describe_cpu(), memory_bandwidth=1e9)
    request = session.SearchRequest(device=cpu, problems=[problem], trials=1)
    outcome = session.Session(request, store).run(Display())  # type: ignore[arg-type]
    assert floors == [pytest.approx(1e6 * problem.minimum_bytes / 2e10)]
    assert outcome.cancelled and outcome.device.memory_bandwidth == 2e10
    assert here.as_it_is_now(cpu).memory_bandwidth == 3e10
    monkeypatch.setattr(here, "fresh_bandwidth", lambda device: 0.0)
    assert here.as_it_is_now(cpu) == cpu, "what is known is better than nothing"
    assert here.as_it_is_now(H200) == H200


def session_without_searches(self: session.Session, display: object) -> Iterator[float]:
    self._device = here.as_it_is_now(self.request.device)
    yield from ()


def test_the_faster_of_both_measurements_counts(
    store: Store, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([2e10, 3e10])
    monkeypatch.setattr(here, "fresh_bandwidth", lambda device: next(rates))
    monkeypatch.setattr(session.Session, "steps", session_without_searches)
    request = session.SearchRequest(device=describe_cpu(), problems=[problem], trials=1)
    outcome = session.Session(request, store).run(None)  # type: ignore[arg-type]
    assert result_data(outcome)["memory_bandwidth"] == 3e10
