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

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.runtime import custom_op
from flashtune.kernels.runtime.decoder import MOST_TOKENS, Allowance, Decoder
from flashtune.kernels.special_token import SpecialTokens, checked_special_tokens
from flashtune.kernels.weights import (
    ALIGNMENT,
    Weights,
    aligned,
    check_finite,
    checked_problem,
    in_order,
    order_of,
)
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DEFAULT_PROBES

TUNE = ("race", "never")


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
        check_finite("weight", weight)
        check_finite("centroids", centroids)
        weight = in_order(weight, order, problem.n_clusters, in_place=release_weight)
        self.n_probes = n_probes
        self.tune = tune
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("centroids", aligned(centroids), persistent=False)
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
        self._allowance = Allowance.full(may_race=self.tune == "race")
        self._handle = custom_op.register(self)
        self.decoder = self._new_decoder()

    def _new_decoder(self) -> Decoder:
        """A decoder of the tensors as they are now."""
        special = None
        if self.special_token_ids.numel():
            special = SpecialTokens(ids=self.special_token_ids, places=self.places)
        return Decoder(
            Weights(weight=self.weight, centroids=self.centroids, ids=self.ids),
            vocab_size=self.vocab_size,
            n_probes=self.n_probes,
            special=special,
            allowance=self._allowance,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "FlashHead":
        """Move or convert the tensors. Calls that other threads are in end with the old ones."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.decoder = self._new_decoder()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The tensors and settings: kernels, locks and choices belong to one process."""
        dropped = ("_allowance", "_handle", "decoder")
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
            token: torch.Tensor = custom_op.decode(hidden, self._handle)
            return token
        return self.decoder.decode(hidden, "argmax")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each row's logits of the tokens of its probed clusters: `[tokens, vocab]`.

        In the weight's dtype, as a dense head's are; -1e4 for every other token, which is finite
        so that whoever masks logits after this is left with legal tokens. hidden as in `forward`.
        """
        if torch.compiler.is_compiling():
            logits: torch.Tensor = custom_op.logits(
                hidden, self.weight, self.vocab_size, self._handle
            )
            return logits
        return self.decoder.decode(hidden, "logits")

    def prepare(self, *n_tokens: int, epilogue: str = "argmax") -> None:
        """Choose, compile and check the kernels for these numbers of tokens ahead of time.

        epilogue: `argmax` for calls of the head, `logits` for calls of `logits`.
        """
        for number in n_tokens:
            self.decoder.prepare(number, epilogue)

    def explain(self, n_tokens: int = 1, epilogue: str = "argmax") -> dict[str, Any]:
        """What runs for that many tokens, and why, as plain data; prepares it if need be.

        `level` is one of exact, nearest_shape, nearest_device, default, torch; `troubles` are
        what went wrong on the way. `raced` says that the config once won a race here, `stale`
        that it was measured with tools that have changed since, and `race` what this process
        timed, if it did, and why each other config was dropped. More tokens than one step takes
        run in several.
        """
        decoder = self.decoder
        bound = decoder.bound(epilogue, min(n_tokens, MOST_TOKENS))
        where = decoder.weights.weight.device
        device = device_of(where)
        return {
            "problem": asdict(bound.problem),
            "device": device.name,
            **bound.choice.explain(),
            "race": bound.race.explain() if bound.race else None,
            "troubles": list(bound.troubles),
        }
