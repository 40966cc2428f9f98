"""FlashHead: a decode head as a module, with the best kernel there is.

Usage:
    head = FlashHead(weight, centroids, cluster_assignments, n_probes=256)
    token = head(hidden)     # int64 [tokens], from hidden [tokens, hidden_size]
    head.logits(hidden)      # [tokens, vocab], for sampling
    head.explain()           # what runs, and why

The first call with a number of tokens chooses, compiles and checks a kernel (seconds); `prepare`
does so ahead of time. What was never measured here is raced for then (docs/tables.md). Later
calls only launch: they can be captured in a CUDA graph, and `torch.compile(head, fullgraph=True)`
traces them as one operator. Whatever is wrong with kernels, compiler or database, the head still
answers, in plain torch if need be, and says so once in the log `flashtune`.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.head_problem import checked_problem, order_of, problem_of
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.permutation import permute_rows_
from flashtune.kernels.runtime.binding import LOG, Bound, TorchStep, bind, give_up
from flashtune.kernels.runtime.choice import Level
from flashtune.kernels.runtime.race import MOST_SECONDS, UNKEPT
from flashtune.kernels.special_token import SpecialTokens, checked_special_tokens
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DEFAULT_PROBES, Problem

StepKey = tuple[str, int, int]  # epilogue, tokens, stream
StepCall = tuple[Weights, torch.Tensor, torch.Tensor]
MOST_TOKENS = 32  # of one step: more are decoded one part after the other
TUNE = ("race", "never")
ALIGNMENT = 16  # bytes, of every tensor that a kernel reads

_HEADS: "WeakValueDictionary[int, FlashHead]" = WeakValueDictionary()
_HANDLES = itertools.count()


class FlashHead(nn.Module):
    """The token with the best logit among the clusters nearest to a hidden state.

    weight `[vocab, hidden]` and centroids `[n_clusters, hidden]`: bf16, fp16 or fp32, on one
    device. The clusters are given by one of cluster_assignments, the cluster of each token
    `[vocab]`, or vocab_maps, the tokens of each cluster `[n_clusters, cluster_size]`. They are
    all of the same size; only where n_clusters does not divide vocab may some, given by
    cluster_assignments, have fewer tokens.

    special_token_ids are candidates of every call, whatever is probed. They are compared by a
    few operations of torch after the kernel (see docs/model-folders.md for what that costs).

    release_weight: keep no second copy of the weight, and never make one: the caller's tensor
    itself is permuted, in place, so that it must not be used afterwards. Don't set it for a
    weight that is tied to the input embedding. It needs clusters all of the same size.

    tune: with `race`, kernels that were only predicted for this device, or measured with other
    tools, are timed on it when they are first needed, and the winner is kept in the user's
    database; all this takes 20 seconds in a head's life at most. With `never` the best record
    there is runs untried.

    A graph that captured a call replays with scratch of the stream it was captured on: graphs
    captured on one stream must not be replayed at the same time.
    Raises FlashtuneError for tensors that are no such head. Nothing is part of the state dict.
    """

    weight: torch.Tensor
    centroids: torch.Tensor
    ids: torch.Tensor
    places: torch.Tensor
    special_token_ids: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        centroids: torch.Tensor,
        cluster_assignments: torch.Tensor | None = None,
        *,
        vocab_maps: torch.Tensor | None = None,
        n_probes: int = DEFAULT_PROBES,
        special_token_ids: Sequence[int] = (),
        release_weight: bool = False,
        tune: str = "race",
    ) -> None:
        """Check the tensors and bring the weight's rows in the order of clusters."""
        super().__init__()
        if tune not in TUNE:
            raise FlashtuneError(f"tune must be one of {', '.join(TUNE)}, not {tune!r}")
        weight, centroids = weight.detach(), centroids.detach()
        problem = checked_problem(weight, centroids, n_probes)
        self.vocab_size = weight.shape[0]
        order = order_of(problem, self.vocab_size, cluster_assignments, vocab_maps)
        order = order.to(weight.device)
        special = checked_special_tokens(special_token_ids, self.vocab_size)
        for name, tensor in (("weight", weight), ("centroids", centroids)):
            if not all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
                raise FlashtuneError(f"{name} has a NaN or an infinity: check how it was loaded")
        if release_weight:
            if not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
                raise FlashtuneError(
                    "release_weight needs a contiguous weight, 16-byte aligned: "
                    "give it weight.contiguous().clone(), or leave release_weight off"
                )
            if order.numel() != self.vocab_size:
                raise FlashtuneError(
                    f"release_weight needs n_clusters to divide vocab, but {problem.n_clusters} "
                    f"does not divide {self.vocab_size}: leave release_weight off"
                )
            permute_rows_(weight, order)
        else:
            weight = weight[order]
        self.n_probes = n_probes
        self.tune = tune
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("centroids", _aligned(centroids), persistent=False)
        self.register_buffer("ids", order.to(torch.int32), persistent=False)
        tokens = SpecialTokens.of(special, order)
        self.register_buffer("special_token_ids", tokens.ids, persistent=False)
        self.register_buffer("places", tokens.places, persistent=False)
        self._start()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        n_probes: int | None = None,
        revision: str | None = None,
        tune: str = "race",
    ) -> "FlashHead":
        """The head of a FlashHead model: `FlashHead.from_pretrained("path/to/model")`.

        source: a model folder, or the name of a repository in Hugging Face's cache (at that
        revision); nothing is downloaded. device: torch's default device unless given. n_probes:
        as many as the model's config says unless given. tune: as for the class. Only the head is
        read, with the config's dtype; docs/model-folders.md says from where. Raises
        FlashtuneError naming the file and the tensor, what was found there and what was expected.
        """
        where = str(torch.get_default_device() if device is None else device)
        parts = ModelFolder.open(source, revision).read_head(where)
        weight, centroids = parts.weight, parts.clusters.centroids
        return cls(
            weight,
            centroids,
            parts.clusters.assignments,
            n_probes=parts.n_probes if n_probes is None else n_probes,
            special_token_ids=parts.special_token_ids,
            tune=tune,
            release_weight=weight.shape[0] % centroids.shape[0] == 0
            and weight.data_ptr() % ALIGNMENT == 0,
        )

    def _start(self) -> None:
        """Everything that neither a copy nor a pickle takes along."""
        self._lock = threading.RLock()
        self._warned = False
        self._race_seconds = MOST_SECONDS if self.tune == "race" else None
        self._handle = next(_HANDLES)
        _HEADS[self._handle] = self
        self._forget()

    def _forget(self) -> None:
        """Drop what is bound to the tensors' device and dtype."""
        with self._lock:
            self._weights = Weights(weight=self.weight, centroids=self.centroids, ids=self.ids)
            self._special = None
            if self.special_token_ids.numel():
                self._special = SpecialTokens(ids=self.special_token_ids, places=self.places)
            self._index = self.weight.device.index if self.weight.is_cuda else None
            self._bounds: dict[tuple[str, int], Bound] = {}
            self._steps: dict[StepKey, Step] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> "FlashHead":
        """Move or convert the tensors, and forget what was bound to the old ones."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The tensors and settings: kernels, locks and choices belong to one process."""
        bound = ("_lock", "_warned", "_handle", "_weights", "_special", "_index")
        dropped = (*bound, "_bounds", "_steps", "_race_seconds")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the tensors and start afresh."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def extra_repr(self) -> str:
        """The shape, for `print`."""
        n_clusters, hidden = self.centroids.shape
        return f"{self.vocab_size}x{hidden}, n_clusters={n_clusters}, n_probes={self.n_probes}"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The best token of each row of hidden `[tokens, hidden_size]`: int64 `[tokens]`.

        Raises FlashtuneError for a hidden state of another shape or device. Another dtype is
        converted to the weight's.
        """
        if torch.compiler.is_compiling():
            token: torch.Tensor = _decode_op(hidden, self._handle)
            return token
        return self._decode(hidden, "argmax")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each row's logits of the tokens of its probed clusters: `[tokens, vocab]`.

        In the weight's dtype, as a dense head's are; -1e4 for every other token, which is finite
        so that whoever masks logits after this is left with legal tokens. hidden as in `forward`.
        """
        if torch.compiler.is_compiling():
            logits: torch.Tensor = _logits_op(hidden, self.weight, self.vocab_size, self._handle)
            return logits
        return self._decode(hidden, "logits")

    def _decode(self, hidden: torch.Tensor, epilogue: str) -> torch.Tensor:
        weights, index = self._weights, self._index
        weight = weights.weight
        if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise FlashtuneError(
                f"hidden must be [tokens, {weight.shape[1]}], not {list(hidden.shape)}: "
                "give hidden[None] for a single token, or flatten the leading dimensions"
            )
        if hidden.device != weight.device:
            raise FlashtuneError(f"hidden is on {hidden.device}, the head on {weight.device}")
        if hidden.requires_grad or hidden.dtype is not weight.dtype:
            hidden = hidden.detach().to(weight.dtype)
        if not hidden.is_contiguous() or hidden.data_ptr() % ALIGNMENT:
            hidden = _aligned(hidden)
        stream = 0
        if index is not None:
            if torch._C._cuda_getDevice() != index:
                with torch.cuda.device(index):
                    return self._decode(hidden, epilogue)
            stream = torch._C._cuda_getCurrentRawStream(index)
        n_tokens = hidden.shape[0]
        if epilogue == "argmax":
            out = torch.empty(n_tokens, dtype=torch.int64, device=weight.device)
        else:
            shape = (n_tokens, weight.shape[0])
            out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        for first in range(0, n_tokens, MOST_TOKENS):
            number = min(MOST_TOKENS, n_tokens - first)
            key = (epilogue, number, stream)
            step = self._steps.get(key) or self._step(*key)
            call = (weights, hidden, out)
            if number < n_tokens:
                part = slice(first, first + number)
                call = (weights, hidden[part], out[part])
            try:
                step(*call)
            except Exception as error:  # whatever a driver raises at a launch
                self._rescue(step, key, call, error)
        if self._special is not None:
            out = self._special(weights, hidden, out)
        if out.dim() == 2 and out.shape[1] > self.vocab_size:
            return out[:, : self.vocab_size].contiguous()
        return out

    def prepare(self, *n_tokens: int, epilogue: str = "argmax") -> None:
        """Choose, compile and check the kernels for these numbers of tokens ahead of time.

        epilogue: `argmax` for calls of the head, `logits` for calls of `logits`.
        """
        for number in n_tokens:
            self._bound(epilogue, number)

    def explain(self, n_tokens: int = 1, epilogue: str = "argmax") -> dict[str, Any]:
        """What runs for that many tokens, and why, as plain data; prepares it if need be.

        `level` is one of exact, nearest_shape, nearest_device, default, torch; `troubles` are
        what went wrong on the way. `raced` says that the config once won a race here, `stale`
        that it was measured with tools that have changed since, and `race` what this process
        timed, if it did, and why each other config was dropped. More tokens than one step takes
        run in several.
        """
        bound = self._bound(epilogue, min(n_tokens, MOST_TOKENS))
        device = device_of(self.weight.device)
        return {
            "problem": asdict(bound.problem),
            "device": device.name if device else str(self.weight.device),
            **bound.choice.explain(),
            "race": bound.race.explain() if bound.race else None,
            "troubles": list(bound.troubles),
        }

    def _decode_compiled(self, hidden: torch.Tensor, epilogue: str) -> torch.Tensor:
        """`_decode` for compiled code, whose CUDA graphs have a pool of memory of their own.

        What is made on first use lasts, and must not lie there: it is made in another thread,
        whose tensors do not.
        """
        sizes = {min(MOST_TOKENS, hidden.shape[0]), hidden.shape[0] % MOST_TOKENS} - {0}
        new = [size for size in sizes if (epilogue, size) not in self._bounds]
        if self._index is not None and new and not torch.cuda.is_current_stream_capturing():
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(self.prepare, *new, epilogue=epilogue).result()
        return self._decode(hidden, epilogue)

    def _step(self, epilogue: str, n_tokens: int, stream: int) -> Step:
        """A step for a stream that has none yet."""
        with self._lock:
            capturing = self._index is not None and torch.cuda.is_current_stream_capturing()
            bound = self._bounds.get((epilogue, n_tokens))
            ready = bound and (bound.spares or bound.choice.level is Level.TORCH)
            if capturing and not ready:
                arguments = f"{n_tokens}" if epilogue == "argmax" else f"{n_tokens}, {epilogue=}"
                self._warn(
                    f"{n_tokens} tokens are captured in a CUDA graph without a kernel ready for "
                    f"this stream: call head.prepare({arguments}) before the capture"
                )
                return TorchStep(self._problem(epilogue, n_tokens), self._weights.centroids)
            bound = self._bound(epilogue, n_tokens)
            with _lasting(self._weights.weight.device):
                step = self._steps[epilogue, n_tokens, stream] = bound.take_step()
            return step

    def _rescue(self, step: Step, key: StepKey, call: StepCall, error: Exception) -> None:
        """Answer a call that failed by plain torch, and if that can, all calls from now on.

        Where torch fails as well, it is not the kernel's fault: the first error is raised.
        """
        epilogue, n_tokens, _ = key
        if isinstance(step, TorchStep):
            raise error
        try:
            TorchStep(self._problem(epilogue, n_tokens), self._weights.centroids)(*call)
        except Exception:
            raise error from None
        with self._lock:
            bound = self._bounds[epilogue, n_tokens]
            give_up(bound, self._weights, error)
            self._warn(f"{bound.troubles[-1]} (plain torch is used instead)")
            self._steps[key] = bound.take_step()

    def _bound(self, epilogue: str, n_tokens: int) -> Bound:
        """The kernels for that many tokens, made on first use."""
        with self._lock:
            bound = self._bounds.get((epilogue, n_tokens))
            if bound is None:
                problem = self._problem(epilogue, n_tokens)
                with _lasting(self._weights.weight.device):
                    bound = bind(problem, self._weights, race_seconds=self._race_seconds)
                self._bounds[epilogue, n_tokens] = bound
                choice, race = bound.choice, bound.race
                why = choice.why
                if race is not None and self._race_seconds is not None:
                    self._race_seconds -= race.seconds
                    why += f" ({race.describe()})"
                LOG.info("%s runs %s: %s", problem.describe(), choice.level.value, why)
                if bound.troubles:
                    runs = "plain torch" if choice.level is Level.TORCH else choice.level.value
                    instead = "" if choice.source == UNKEPT else f" ({runs} is used instead)"
                    self._warn("; ".join(bound.troubles) + instead)
            return bound

    def _problem(self, epilogue: str, n_tokens: int) -> Problem:
        problem = problem_of(self.weight, self.centroids, self.n_probes, n_tokens)
        return replace(problem, epilogue=epilogue)

    def _warn(self, trouble: str) -> None:
        """Warn once in a head's life: later trouble shows in `explain`."""
        if not self._warned:
            self._warned = True
            LOG.warning("FlashHead: %s. See head.explain() for all of it", trouble)


@contextmanager
def _lasting(device: torch.device) -> Iterator[None]:
    """Make tensors that outlive the call: on this device, and free of the caller's modes."""
    index = device.index if device.type == "cuda" else -1  # which changes nothing
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(index):
        yield


def _head_of(handle: int) -> FlashHead:
    head = _HEADS.get(handle)
    if head is None:
        raise FlashtuneError("the FlashHead that was compiled is gone: compile the new one")
    return head


@torch.library.custom_op("flashtune::decode", mutates_args=())
def _decode_op(hidden: torch.Tensor, handle: int) -> torch.Tensor:
    """A head's decode as one operator; heads are known by handle, since they are no tensors."""
    return _head_of(handle)._decode_compiled(hidden, "argmax")


@_decode_op.register_fake
def _(hidden: torch.Tensor, handle: int) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


@torch.library.custom_op("flashtune::logits", mutates_args=())
def _logits_op(
    hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, handle: int
) -> torch.Tensor:
    """A head's logits as one operator; the weight tells tracers the dtype."""
    return _head_of(handle)._decode_compiled(hidden, "logits")


@_logits_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, handle: int) -> torch.Tensor:
    return weight.new_empty(hidden.shape[0], vocab_size)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless it is contiguous and aligned."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
