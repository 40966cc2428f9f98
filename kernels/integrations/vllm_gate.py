"""Which requests need the dense head: a vLLM logits processor that changes no logits.

Usage (the entry point `vllm.logits_processors`, which vLLM's workers load by themselves):
    flashtune = "flashtune.kernels.integrations.vllm_gate:Gate"

vLLM tells its logits processors before each forward pass which requests are in the batch, and
with which sampling parameters. `Gate` is both vLLM's V1 interface (`update_state`) and its V2
interface (`add_request`), whichever this vLLM has. `gate_of(vllm_config)` finds the gate of an
engine. Without a gate the engine stays with the dense head, since nothing would tell when to
return to it.
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
    rule out every candidate; a bias may lift a token that is not one. Parameters that only lower
    logits (penalties, bans) or rank them (top-k, top-p, min-p) work on the candidates.
    """
    for name in (*_SCORED, *_CONFINED):
        if getattr(params, name, None) is not None:
            return name
    bias = getattr(params, "logit_bias", None) or {}
    return "logit_bias" if any(value > 0 for value in bias.values()) else None


def gate_of(vllm_config: Any) -> "RequestGate | None":
    """The gate of the engine with this config, or None if vLLM made none."""
    return _GATES.get(id(vllm_config.compilation_config))


class _Mark:
    """Marks a place as needing the dense head; may hang on the request's parameters."""


class RequestGate:
    """The places in the batch that need the dense head.

    V1 reports every request that enters, leaves or moves. V2 reports only those that enter: a
    place is freed without notice, so it counts until the next request takes it. If the scheduler
    runs in this process, it keeps a request's sampling parameters while the request runs, so the
    place counts only until they are gone.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        """Called by V1 with (config, device, pinned), by V2 with (config, request states)."""
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
        """Accept every request."""

    def is_argmax_invariant(self) -> bool:
        """So that V1 does not call `apply` for greedy requests."""
        return True

    def apply(self, logits: Any, *_: Any) -> Any:
        """Return the logits unchanged: the head has done the work."""
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
            witness = _Mark()  # only the parameters hold it: it is freed with them
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
    """The gate with every interface that this vLLM has: its loaders check the base class."""
    bases = []
    for name in _INTERFACES:
        try:
            bases.append(importlib.import_module(name).LogitsProcessor)
        except (ImportError, AttributeError):
            continue
    return type("Gate", (RequestGate, *bases), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Make `Gate` on first use, so that vLLM is imported only to serve with it."""
    if name != "Gate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = gate = _gate_class()
    return gate
