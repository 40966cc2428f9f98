"""Which requests need the dense head: a vLLM logits processor that changes no logits.

Usage (the entry point `vllm.logits_processors`, which vLLM's workers load by themselves):
    flashtune = "flashtune.kernels.integrations.vllm_gate:Gate"

vLLM tells its logits processors before each forward pass which requests are in the batch, and
with which sampling parameters. `Gate` is both vLLM's V1 interface (`update_state`) and its V2
interface (`add_request`), whichever this vLLM has. `gate_of(vllm_config)` finds the gate of an
engine; without one nobody may leave the dense head, as nobody would know when to go back to it.
"""

import importlib
from typing import Any
from weakref import WeakValueDictionary, finalize

_INTERFACES = ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor")
_SCORED = ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids")
_CONFINED = ("allowed_token_ids", "structured_outputs", "guided_decoding")
_GATES: "WeakValueDictionary[int, RequestGate]" = WeakValueDictionary()


def why_dense(params: Any) -> str | None:
    """The sampling parameter that only the dense head gets right, or None.

    Logprobs are normalised over the whole vocabulary; a grammar or a list of allowed tokens may
    rule out every candidate; a bias may lift a token that is none. Whatever only lowers logits
    (penalties, bans) or ranks them (top-k, top-p, min-p) works on the candidates.
    """
    for name in (*_SCORED, *_CONFINED):
        if getattr(params, name, None) is not None:
            return name
    bias = getattr(params, "logit_bias", None) or {}
    return "logit_bias" if any(value > 0 for value in bias.values()) else None


def gate_of(vllm_config: Any) -> "RequestGate | None":
    """The gate of the engine with this config, or None where vLLM made none."""
    return _GATES.get(id(vllm_config.compilation_config))


class _Mark:
    """Marks a place as needing the dense head; may hang on the request's parameters."""


class RequestGate:
    """The places in the batch that need the dense head.

    V1 tells of every request that enters, leaves or moves. V2 tells only of those that enter: a
    place is freed in silence, so it counts until the next request takes it, or until the
    request's sampling parameters are gone, where the scheduler lives in this process and keeps
    them while the request runs.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        """As either vLLM calls it: (config, device, pinned) or (config, request states)."""
        # The text part of a vision model has a config of its own, but shares this one
        self._compilation_config = vllm_config.compilation_config
        parallel = getattr(vllm_config, "parallel_config", None)
        self._sees_ends = getattr(parallel, "distributed_executor_backend", None) == "uni"
        self._marks: dict[int, _Mark] = {}
        _GATES[id(self._compilation_config)] = self

    @property
    def dense(self) -> bool:
        """Whether a request of the batch needs the dense head."""
        return bool(self._marks)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Every request is welcome."""

    def is_argmax_invariant(self) -> bool:
        """So that V1 does not call `apply` for greedy requests."""
        return True

    def apply(self, logits: Any, *_: Any) -> Any:
        """Give the logits back: what had to be done was done by the head."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch (V1): removed, then added, then moved, as vLLM documents it."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._put(place, None)
        for place, params, *_ in batch_update.added:
            self._put(place, _Mark() if why_dense(params) else None)
        for source, target, direction in batch_update.moved:
            source_mark, target_mark = self._marks.get(source), self._marks.get(target)
            self._put(target, source_mark)
            self._put(source, target_mark if direction.name == "SWAP" else None)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take in a request (V2). Returns False: no logits are changed for it."""
        if not why_dense(sampling_params):
            self._put(req_idx, None)
            return False
        self._put(req_idx, mark := _Mark())
        if self._sees_ends:
            witness = _Mark()  # held by the parameters alone: it goes when they go
            try:
                sampling_params._flashtune_witness = witness
            except (AttributeError, TypeError):  # the mark stays until the place is taken again
                return False
            finalize(witness, self._end, req_idx, mark)
        return False

    def _end(self, place: int, mark: _Mark) -> None:
        if self._marks.get(place) is mark:
            del self._marks[place]

    def _put(self, place: int, mark: _Mark | None) -> None:
        if mark is None:
            self._marks.pop(place, None)
        else:
            self._marks[place] = mark


def _gate_class() -> type[RequestGate]:
    """The gate as every interface that this vLLM has: its loaders check the base class."""
    bases = []
    for name in _INTERFACES:
        try:
            bases.append(importlib.import_module(name).LogitsProcessor)
        except (ImportError, AttributeError):
            continue
    return type("Gate", (RequestGate, *bases), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Make `Gate` on first use: vLLM is imported only by who serves with it."""
    if name != "Gate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = gate = _gate_class()
    return gate
