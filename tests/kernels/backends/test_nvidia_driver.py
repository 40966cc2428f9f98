"""Launches through NVIDIA's driver, with a driver that writes down what it is asked for."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.cuda.backend import CudaStep
from flashtune.kernels.backends.nvidia import driver as nvidia
from flashtune.kernels.backends.nvidia.driver import Binary, Shape
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

PROBLEM = Problem(vocab_size=4096, hidden_size=512, n_clusters=256, n_probes=16)
PRIMARY = 77  # the context of torch


class FakeDriver:
    """Calls by name; a launch with its shape, stream, flags and the arguments' values."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.launches: list[dict[str, Any]] = []
        self.refused: dict[str, int] = {}
        self.current = self.instantiated = 0
        self.replayed: list[tuple[int, int]] = []
        self.capturing = False

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name in self.refused:
                return self.refused[name]
            known = vars(FakeDriver).get(f"_{name}")
            return (known and known(self, *arguments)) or 0

        return call

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context._obj.value = self.current

    def _cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        self.current = context.value or 0

    def _cuDevicePrimaryCtxRetain(self, context: Any, _: Any) -> None:
        context._obj.value = PRIMARY

    def _cuModuleGetFunction(self, function: Any, _: Any, name: bytes) -> None:
        function._obj.value = len(name)

    def _cuGetErrorName(self, _: int, name: Any) -> None:
        name._obj.value = b"CUDA_ERROR_OF_SOME_KIND"

    def _cuStreamCreate(self, stream: Any, _: int) -> None:
        stream._obj.value = 99

    def _cuGraphInstantiateWithFlags(self, handle: Any, *_: Any) -> None:
        self.instantiated += 1
        handle._obj.value = self.instantiated

    def _cuGraphLaunch(self, handle: Any, stream: int) -> int:
        if not self.current:
            return 201
        self.replayed.append((handle.value, stream))
        return 0

    def _cuLaunchKernelEx(self, where: Any, function: Any, arguments: Any, _: None) -> int:
        if not self.current:
            return 201
        config = where._obj
        self.launches.append(
            {
                "function": function.value,
                "shape": (config.grid[0], config.block[0], config.dynamic_bytes),
                "stream": config.stream,
                "flags": [config.attributes[i].id for i in range(config.n_attributes)],
                "values": [ctypes.c_uint64.from_address(each).value for each in arguments],
            }
        )
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver that answers everything; torch's streams are all number 5."""
    found = FakeDriver()
    monkeypatch.setattr(nvidia, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    nvidia._primary_context.cache_clear()
    yield found
    nvidia._primary_context.cache_clear()


def make_step() -> CudaStep:
    candidate = Candidate(PROBLEM, StreamedConfig(), find_device("h200"))
    return CudaStep(candidate, Binary(b"binary", 0), torch.device("cpu"))


def test_a_step_launches_both_kernels_on_the_current_stream(fake: FakeDriver) -> None:
    step = make_step()
    hidden, centroids, weight, ids, out = (torch.zeros(1, 8) for _ in range(5))
    weights = Weights(weight=weight, centroids=centroids, ids=ids)
    scratch = [step.scratch.scores, step.scratch.moments, step.scratch.state]
    for states in (hidden, torch.zeros(1, 8)):
        fake.launches.clear()
        step(weights, states, out)
        tensors = (states, centroids, weight, ids, out, *scratch)
        pointers = [each.data_ptr() for each in tensors]
        expected = Candidate(PROBLEM, StreamedConfig(), find_device("h200")).launches
        for launched, use in zip(fake.launches, expected, strict=True):
            assert launched["values"] == [*pointers, 0, 0, 0, 0]
            assert launched["shape"] == (use.programs, 32 * use.warps, use.dynamic_bytes)
            assert (launched["stream"], launched["flags"]) == (5, [6])
            assert launched["function"] == len(use.kernel)


def test_other_weights_are_prepared_anew(fake: FakeDriver) -> None:
    step, out, hidden = make_step(), torch.zeros(1), torch.zeros(1, 8)
    for _ in range(2):
        tensors = [torch.zeros(8) for _ in range(3)]
        weights = Weights(weight=tensors[0], centroids=tensors[1], ids=tensors[2])
        fake.launches.clear()
        step(weights, hidden, out)
        (first, *_) = fake.launches
        assert first["values"][1:4] == [tensors[i].data_ptr() for i in (1, 0, 2)]


@pytest.mark.parametrize(("current", "expected"), [(0, PRIMARY), (5, 5)])
def test_a_thread_without_a_context_is_given_the_primary_one(
    fake: FakeDriver, current: int, expected: int
) -> None:
    step = make_step()
    weights = Weights(weight=torch.zeros(8), centroids=torch.zeros(8), ids=torch.zeros(8))
    fake.current = current
    step(weights, torch.zeros(1, 8), torch.zeros(8))
    assert (fake.current, len(fake.launches)) == (expected, 2)


def test_what_the_driver_refuses_is_said(fake: FakeDriver) -> None:
    fake.refused = {"cuModuleLoadData": 200}
    with pytest.raises(FlashtuneError, match="the CUDA driver says CUDA_ERROR_OF_SOME_KIND"):
        make_step()
    fake.refused = {}
    step = make_step()
    weights = Weights(weight=torch.zeros(8), centroids=torch.zeros(8), ids=torch.zeros(8))
    fake.refused = {"cuLaunchKernelEx": 700}
    with pytest.raises(FlashtuneError, match="CUDA_ERROR_OF_SOME_KIND"):
        step(weights, torch.zeros(1, 8), torch.zeros(8))


def test_what_is_unloaded_is_unloaded_once_and_counted(fake: FakeDriver) -> None:
    def unloaded() -> int:
        return sum(name == "cuModuleUnload" for name, *_ in fake.calls)

    before = nvidia.loaded()
    step, other = make_step(), make_step()
    assert nvidia.loaded() == (before[0] + 2, before[1] + 2 * len(b"binary"))
    step.unload()
    step.unload()
    assert (unloaded(), nvidia.loaded()[0]) == (1, before[0] + 1)
    other.unload()
    assert (unloaded(), nvidia.loaded()) == (2, before)


def test_steps_that_share_kernels_unload_them_together(fake: FakeDriver) -> None:
    candidate = Candidate(PROBLEM, StreamedConfig(), find_device("h200"))
    before, binary = nvidia.loaded(), Binary(b"binary", 0)
    steps = [CudaStep(candidate, binary, torch.device("cpu")) for _ in range(2)]
    for step in steps:
        step.unload()
    assert nvidia.loaded() == before


def test_only_much_shared_memory_is_asked_for(fake: FakeDriver) -> None:
    binary = Binary(b"binary", 0)
    for dynamic_bytes, most_shared, expected in (
        (1000, False, []),
        (50_000, False, [(8, 50_000)]),
        (1000, True, [(8, 1000), (9, 100)]),
    ):
        fake.calls.clear()
        binary.prepared(Shape("score", 1, 32, dynamic_bytes, most_shared=most_shared), [])
        asked = [call[2:] for call in fake.calls if call[0] == "cuFuncSetAttribute"]
        assert asked == expected


def test_flags_and_32_bit_arguments_reach_the_driver(fake: FakeDriver) -> None:
    number = ctypes.c_int32(7)
    run = Binary(b"binary", 0).prepared(Shape("score", 3, 64, cooperative=True), [number])
    run(9)
    (launched,) = fake.launches
    assert launched["values"][0] & (2**32 - 1) == 7
    assert (launched["flags"], launched["stream"]) == ([2], 9)


def weights_of_zeros() -> Weights:
    return Weights(weight=torch.zeros(8), centroids=torch.zeros(8), ids=torch.zeros(8))


def test_calls_with_the_same_places_become_one_launch(fake: FakeDriver) -> None:
    step, weights, out = make_step(), weights_of_zeros(), torch.zeros(8)
    hidden = torch.zeros(1, 8)
    for _ in range(4):
        step(weights, hidden, out)
    assert fake.replayed == []
    assert [each["stream"] for each in fake.launches] == [5] * 8 + [99] * 2  # those recorded
    step(weights, hidden, out)
    assert fake.replayed == [(1, 5)]
    assert len(fake.launches) == 10
    other = torch.zeros(1, 8)
    step(weights, other, out)  # other places are launched
    assert len(fake.launches) == 12
    step(weights, hidden, out)
    assert fake.replayed == [(1, 5)] * 2
    again = weights_of_zeros()
    for launched in (14, 16):  # and so is whatever belonged to other weights
        step(again, hidden, out)
        assert len(fake.launches) == launched
    assert fake.replayed == [(1, 5)] * 2


def test_a_replay_in_a_thread_without_a_context_is_given_the_primary_one(fake: FakeDriver) -> None:
    step, weights, out, hidden = make_step(), weights_of_zeros(), torch.zeros(8), torch.zeros(1, 8)
    for _ in range(4):
        step(weights, hidden, out)
    fake.current = 0
    step(weights, hidden, out)
    assert (fake.current, len(fake.replayed)) == (PRIMARY, 1)


def test_under_a_capture_kernels_are_launched_one_by_one(fake: FakeDriver) -> None:
    step, weights, out, hidden = make_step(), weights_of_zeros(), torch.zeros(8), torch.zeros(1, 8)
    fake.capturing = True
    for _ in range(5):
        step(weights, hidden, out)
    assert (fake.instantiated, len(fake.launches)) == (0, 10)
    fake.capturing = False
    step(weights, hidden, out)
    fake.capturing = True
    step(weights, hidden, out)
    assert (fake.instantiated, fake.replayed) == (1, [])


def test_what_cannot_be_recorded_is_launched(fake: FakeDriver) -> None:
    step, weights, out, hidden = make_step(), weights_of_zeros(), torch.zeros(8), torch.zeros(1, 8)
    fake.refused = {"cuGraphInstantiateWithFlags": 801}
    for _ in range(6):
        step(weights, hidden, out)
    assert fake.replayed == []
    assert [each["stream"] for each in fake.launches].count(5) == 12
    assert [call[0] for call in fake.calls].count("cuStreamBeginCapture_v2") == 1


def test_places_that_never_come_again_are_forgotten(fake: FakeDriver) -> None:
    step, weights, out = make_step(), weights_of_zeros(), torch.zeros(8)
    states = [torch.zeros(1, 8) for _ in range(100)]
    for hidden in states:
        step(weights, hidden, out)
    assert len(step._seen) <= 32
    for hidden in states[:12] * 5:
        step(weights, hidden, out)
    assert len(step._graphs) == 8
