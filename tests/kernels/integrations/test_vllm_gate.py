"""Which requests need the dense head, and that the gate follows them through the batch."""

import random
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flashtune.kernels.integrations import vllm_gate
from flashtune.kernels.integrations.vllm_gate import RequestGate, gate_of, why_dense


class Params(SimpleNamespace):
    """Sampling parameters; unlike a SimpleNamespace, equal only to themselves."""

    __hash__ = object.__hash__


def scored() -> Params:
    return Params(logprobs=0)


def config(backend: str | None = "uni") -> Any:
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    return SimpleNamespace(compilation_config=SimpleNamespace(), parallel_config=parallel)


def update(
    removed: list[int] | None = None,
    added: list[tuple[Any, ...]] | None = None,
    moved: list[tuple[int, int, str]] | None = None,
) -> Any:
    return SimpleNamespace(
        removed=removed or [],
        added=[(place, params, None, []) for place, params in added or []],
        moved=[(a, b, SimpleNamespace(name=name)) for a, b, name in moved or []],
    )


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprob_token_ids": [3]}, "logprob_token_ids"),
        ({"prompt_logprob_token_ids": [3]}, "prompt_logprob_token_ids"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"structured_outputs": object()}, "structured_outputs"),
        ({"guided_decoding": object()}, "guided_decoding"),
        ({"logit_bias": {7: 0.5}}, "logit_bias"),
        ({"logit_bias": {7: -100.0, 8: 1.0}}, "logit_bias"),
        ({"logit_bias": {7: -100.0}}, None),
        ({"logit_bias": None, "logprobs": None}, None),
        ({"temperature": 0.7, "top_p": 0.9, "presence_penalty": 1.0, "bad_words": ["x"]}, None),
        ({}, None),
    ],
)
def test_why_dense(params: dict[str, Any], why: str | None) -> None:
    assert why_dense(Params(**params)) == why


def test_v1_follows_requests_through_the_batch() -> None:
    gate = RequestGate(config(), None, False)
    assert not gate.dense
    gate.update_state(update(added=[(0, Params()), (1, scored()), (2, Params())]))
    assert gate.dense
    gate.update_state(None)
    assert gate.dense
    gate.update_state(update(removed=[1], moved=[(2, 1, "UNIDIRECTIONAL")]))
    assert not gate.dense
    gate.update_state(update(added=[(2, scored())]))
    gate.update_state(update(moved=[(0, 2, "SWAP")]))
    gate.update_state(update(removed=[2]))
    assert gate.dense  # the scored one is at 0 now
    gate.update_state(update(added=[(0, Params())]))
    assert not gate.dense


def test_v1_moves_one_request_onto_another() -> None:
    gate = RequestGate(config(), None, False)
    gate.update_state(update(added=[(0, scored()), (1, Params())]))
    gate.update_state(update(moved=[(1, 0, "UNIDIRECTIONAL")]))
    assert not gate.dense  # the scored one was moved over, and is at neither place


def test_v1_agrees_with_a_list_of_requests() -> None:
    rng = random.Random(0)
    gate = RequestGate(config(), None, False)
    batch: list[bool] = []  # whether the request at each place needs the dense head
    seen = set()
    for _ in range(2000):
        size = len(batch)
        what = rng.choice(("add", "replace", "remove", "swap"))
        if what == "add" and size < 6:
            batch.append(rng.random() < 0.2)
            gate.update_state(update(added=[(size, scored() if batch[-1] else Params())]))
        elif what == "replace" and size:
            place = rng.randrange(size)
            batch[place] = rng.random() < 0.2
            gate.update_state(
                update(removed=[place], added=[(place, scored() if batch[place] else Params())])
            )
        elif what == "remove" and size:
            place, last = rng.randrange(size), batch.pop()
            moved = [(size - 1, place, "UNIDIRECTIONAL")] if place < size - 1 else []
            if moved:
                batch[place] = last
            gate.update_state(update(removed=[place], moved=moved))
        elif what == "swap" and size > 1:
            a, b = rng.sample(range(size), 2)
            batch[a], batch[b] = batch[b], batch[a]
            gate.update_state(update(moved=[(a, b, "SWAP")]))
        assert gate.dense == any(batch)
        seen.add(gate.dense)
    assert seen == {True, False}


def test_v2_frees_a_place_when_another_request_takes_it() -> None:
    gate = RequestGate(config(), object())
    held = scored()
    assert gate.add_request(3, held) is False
    assert gate.add_request(2, Params()) is False
    assert gate.dense
    gate.add_request(3, Params())
    assert not gate.dense


def test_v2_sees_a_request_end_with_its_parameters() -> None:
    gate = RequestGate(config(), object())
    first, second = scored(), scored()
    gate.add_request(0, first)
    gate.add_request(1, second)
    del first
    assert gate.dense
    del second
    assert not gate.dense


def test_v2_keeps_the_place_of_a_later_request_when_an_earlier_one_ends() -> None:
    gate = RequestGate(config(), object())
    first, second = scored(), scored()
    gate.add_request(0, first)
    gate.add_request(0, second)
    del first
    assert gate.dense


@pytest.mark.parametrize("backend", ["mp", "ray", None])
def test_v2_trusts_no_parameters_that_came_from_another_process(backend: str | None) -> None:
    gate = RequestGate(config(backend), object())
    gate.add_request(0, scored())
    assert gate.dense
    gate.add_request(0, Params())
    assert not gate.dense


def test_v2_keeps_the_mark_where_parameters_take_no_attribute() -> None:
    class Frozen:
        __slots__ = ()
        logprobs = 1

    gate = RequestGate(config(), object())
    gate.add_request(0, Frozen())
    assert gate.dense


def test_the_gate_changes_no_logits() -> None:
    gate = RequestGate(config(), None, False)
    logits = object()
    assert gate.apply(logits) is logits  # as V1 calls it
    assert gate.apply(logits, object()) is logits  # as V2 does
    assert gate.is_argmax_invariant()


def test_a_gate_is_found_by_its_engine_alone_and_goes_with_it() -> None:
    one, other = config(), config()
    text_part = SimpleNamespace(compilation_config=one.compilation_config)
    gate = RequestGate(one, object())
    assert gate_of(one) is gate
    assert gate_of(text_part) is gate
    assert gate_of(other) is None
    del gate
    assert gate_of(one) is None


def v1_interface() -> type:
    """The base class that V1's loader wants."""

    class LogitsProcessor(ABC):
        @abstractmethod
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...
        @abstractmethod
        def apply(self, logits: Any) -> Any: ...
        @abstractmethod
        def is_argmax_invariant(self) -> bool: ...
        @abstractmethod
        def update_state(self, batch_update: Any) -> None: ...

    return LogitsProcessor


def v2_interface() -> type:
    """The base class that V2's loader wants."""

    class LogitsProcessor(ABC):
        @abstractmethod
        def apply(self, logits: Any, ctx: Any) -> Any: ...

    return LogitsProcessor


@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_gate_is_each_interface_that_this_vllm_has(
    monkeypatch: pytest.MonkeyPatch, present: tuple[int, ...]
) -> None:
    for name in vllm_gate._INTERFACES:
        monkeypatch.setitem(sys.modules, name, None)  # not importable
    bases = [(v1_interface(), v2_interface())[index] for index in present]
    for index, base in zip(present, bases, strict=True):
        module = ModuleType(vllm_gate._INTERFACES[index])
        module.LogitsProcessor = base  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    made = vllm_gate._gate_class()
    assert all(issubclass(made, base) for base in bases)
    assert issubclass(made, RequestGate)
    assert not made(config(), object()).dense
