"""FlashHead: a decode head as a module that runs the best available kernel.

Usage:
    head = FlashHead(weight, centroids, cluster_assignments, n_probes=256)
    token = head(hidden)     # int64 [tokens], from hidden [tokens, hidden_size]
    head.logits(hidden)      # [tokens, vocab], for sampling
    head.explain()           # what runs, and why
    FlashHead(weight, centroids, cluster_assignments, screen="int8")    # docs/formats.md
    FlashHead.screened(weight, "int4")                                  # without clusters

The first call with a number of tokens chooses, compiles and checks a kernel (seconds); `prepare`
does so ahead of time. Kernels that were never measured here are raced then (docs/tables.md). Later
calls only launch: they can be captured in a CUDA graph, and `torch.compile(head, fullgraph=True)`
traces them as one operator. If kernels, compiler or database fail, the head still answers, in
plain torch if necessary, and logs one warning to `flashtune`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.formats.screen import Screen, screen_of
from flashtune.kernels.head_tensors import HeadTensors
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.runtime import custom_op
from flashtune.kernels.runtime.decoder import Allowance, Decoder
from flashtune.kernels.special_token import FEW
from flashtune.kernels.weights import aligned, checked_dense, posed
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DEFAULT_PROBES, IN_PLACE

TUNE = ("race", "never")
# Cluster sizes for a head without clusters: the first that divides its vocabulary, so that no row
# is repeated. Every cluster is probed, and its centroid only fills its place: large clusters keep
# these small. Tables have records for size 16, which is the last resort.
_SCREENED_TOGETHER = (128, 64, 32, 16)


class FlashHead(HeadTensors):
    """The token with the best logit among the clusters nearest to a hidden state.

    A graph that captured a call replays with the scratch memory of the stream it was captured on:
    graphs captured on one stream must not be replayed at the same time. The head adds nothing to
    the state dict.

    Args:
        weight: The dense head's weight `[vocab, hidden]`, in bf16, fp16 or fp32.
        centroids: `[n_clusters, hidden]`, in bf16, fp16 or fp32, on the same device.
        cluster_assignments: The cluster of each token `[vocab]`. Clusters have equal sizes; only
            if n_clusters does not divide vocab may some have fewer tokens.
        vocab_maps: Instead of cluster_assignments, the tokens of each cluster `[n_clusters,
            cluster_size]`.
        n_probes: How many of the best clusters a step probes, at least.
        special_token_ids: Tokens that are candidates in every call: the clusters that hold them
            are always probed (docs/model-folders.md says what that costs).
        screen: A Screen or its text, like `int8` or `int4/int8:16` (docs/formats.md). Centroids
            and rows are stored in 8 or 4 bits and find the candidates; the best few are decided by
            the rows of `weight`, which the head refers to and never copies: it must not change.
        rows: Where the rows that steps read are stored. `in_order`: in a copy of the weight, in
            the order of clusters. `in_place`: in `weight` itself, which is never copied and must
            not change; a step takes longer (docs/formats.md). Default: in place if the copy would
            take more than half of the free memory. A screen has rows of its own.
        release_weight: Keep no second copy of the weight, and never make one: the caller's tensor
            is permuted in place, so it must not be used afterwards. Do not set it for a weight
            that is tied to the input embedding. It needs clusters of equal size, and no screen.
        tune: With `race`, kernels that were only predicted for this device, or measured with other
            tools, are timed on it when they are first needed, and the winner is kept in the user's
            database; this takes at most 20 seconds over the life of a head. With `never`, the best
            record runs without a race.

    Raises:
        FlashtuneError: If the tensors do not form a valid head.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        centroids: torch.Tensor,
        cluster_assignments: torch.Tensor | None = None,
        *,
        vocab_maps: torch.Tensor | None = None,
        n_probes: int = DEFAULT_PROBES,
        special_token_ids: Sequence[int] = (),
        screen: Screen | str | None = None,
        rows: str | None = None,
        release_weight: bool = False,
        tune: str = "race",
    ) -> None:
        """Check the tensors and put the weight's rows in cluster order."""
        if tune not in TUNE:
            raise FlashtuneError(f"tune must be one of {', '.join(TUNE)}, not {tune!r}")
        super().__init__(
            weight,
            centroids,
            cluster_assignments,
            vocab_maps=vocab_maps,
            n_probes=n_probes,
            special_token_ids=special_token_ids,
            screen=screen_of(screen),
            rows=rows,
            release_weight=release_weight,
        )
        self.tune = tune
        self._start()

    @classmethod
    def screened(
        cls, weight: torch.Tensor, screen: Screen | str = "int4", *, tune: str = "race"
    ) -> "FlashHead":
        """A head without clusters: all rows are screened, the model's rows decide among the best.

        It works for any model, since there is nothing to prepare. Every token has a logit; tokens
        outside the best keep the screen's logit.

        Args:
            weight: `[vocab, hidden]`, as for the class.
            screen: As for the class.
            tune: As for the class.

        Raises:
            FlashtuneError: If the weight has another shape, or the screen is `none`.
        """
        if screen_of(screen) is None:
            raise FlashtuneError("a head without clusters needs a screen, such as int4 or int8")
        weight = checked_dense("weight", weight)
        if weight.dim() != 2 or not weight.numel():
            raise FlashtuneError(f"weight must be [vocab, hidden], not {list(weight.shape)}")
        vocab_size, hidden = weight.shape
        size = next((s for s in _SCREENED_TOGETHER if vocab_size % s == 0), _SCREENED_TOGETHER[-1])
        n_clusters = -(-vocab_size // size)
        assignments = torch.arange(vocab_size) // -(-vocab_size // n_clusters)
        centroids = weight.new_zeros(n_clusters, hidden)
        return cls(weight, centroids, assignments, n_probes=n_clusters, screen=screen, tune=tune)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        n_probes: int | None = None,
        screen: Screen | str | None = None,
        rows: str | None = None,
        revision: str | None = None,
        tune: str = "race",
    ) -> "FlashHead":
        """The head of a FlashHead model: `FlashHead.from_pretrained("path/to/model")`.

        Only the head is read, with the config's dtype; docs/model-folders.md says from where.
        Nothing is downloaded.

        Args:
            source: A model folder, or the name of a repository in Hugging Face's cache.
            device: Default: torch's default device.
            n_probes: Default: as many as the model's config says.
            screen: Default: the config's; `none` for none.
            rows: As for the class; the head's own rows are reordered without a copy if possible.
            revision: Of the repository.
            tune: As for the class.

        Raises:
            FlashtuneError: Names the file and the tensor, what was found and what was expected.
        """
        where = str(torch.get_default_device() if device is None else device)
        folder = ModelFolder.open(source, revision)
        own_screen = screen_of(screen) if screen is not None else folder.screen
        own_rows = rows if rows is not None else folder.rows(own_screen)
        parts = folder.read_head(where)
        weight, centroids = aligned(parts.weight), parts.clusters.centroids
        return cls(
            weight,
            centroids,
            parts.clusters.assignments,
            n_probes=parts.n_probes if n_probes is None else n_probes,
            special_token_ids=parts.special_token_ids,
            tune=tune,
            screen=own_screen,
            rows=own_rows,
            release_weight=own_screen is None
            and own_rows != IN_PLACE
            and weight.shape[0] % centroids.shape[0] == 0
            and len(parts.special_token_ids) <= FEW,  # else clusters may be added for them
        )

    def _start(self) -> None:
        """Set up the state that copies and pickles leave out."""
        self._allowance = Allowance.full(may_race=self.tune == "race")
        self._handle = custom_op.register(self)
        self._renew()

    def _renew(self) -> None:
        """Decode with the tensors as they are now."""
        weights = self.weights
        self.decoder = Decoder(
            weights,
            self.like,
            partial(posed, self.problem, weights, self.like.dtype),
            vocab_size=self.vocab_size,
            allowance=self._allowance,
        )

    def __getstate__(self) -> dict[str, Any]:
        """The tensors and settings: kernels, locks and choices belong to one process."""
        dropped = ("_allowance", "_handle", "decoder")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the tensors; kernels are chosen again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def extra_repr(self) -> str:
        """The shape, for `print`."""
        problem = self.problem
        text = (
            f"{self.vocab_size}x{problem.hidden_size}, n_clusters={problem.n_clusters}, "
            f"n_probes={self.n_probes}"
        )
        if self.problem.in_place:
            return f"{text}, rows={IN_PLACE}"
        return text if self.screen is None else f"{text}, screen={self.screen}"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The best token for each row of a hidden state.

        Args:
            hidden: `[tokens, hidden]`; converted if its dtype differs from the weight's.

        Returns:
            int64 `[tokens]`; ties give the smallest id.

        Raises:
            FlashtuneError: If the hidden state has the wrong shape or device.
        """
        if torch.compiler.is_compiling():
            token: torch.Tensor = custom_op.decode(hidden, self._handle)
            return token
        return self.decoder.decode(hidden, "argmax")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the tokens of the probed clusters, for sampling.

        Args:
            hidden: `[tokens, hidden]`, as in `forward`.

        Returns:
            `[tokens, vocab]` in the weight's dtype, like a dense head's. Every other token has
            -1e4, which is finite so that code that masks logits afterwards still has legal tokens
            left.
        """
        if torch.compiler.is_compiling():
            logits: torch.Tensor = custom_op.logits(
                hidden, self.like, self.vocab_size, self._handle
            )
            return logits
        return self.decoder.decode(hidden, "logits")

    def prepare(self, *n_tokens: int, epilogue: str = "argmax") -> None:
        """Choose, compile and check the kernels for some numbers of tokens ahead of time.

        Args:
            n_tokens: The numbers of tokens per call.
            epilogue: `argmax` for calls of the head, `logits` for calls of `logits`.
        """
        for number in n_tokens:
            self.decoder.prepare(number, epilogue)

    def explain(self, n_tokens: int = 1, epilogue: str = "argmax") -> dict[str, Any]:
        """What runs for a number of tokens, and why; prepares it if necessary.

        Args:
            n_tokens: Tokens per call; if one step cannot take them all, several steps run.
            epilogue: `argmax` or `logits`.

        Returns:
            Plain data. `level` is one of exact, nearest_shape, nearest_device, default, torch.
            `troubles` lists what went wrong on the way. `raced`: the config once won a race here.
            `stale`: it was measured with tools that have changed since. `race`: what this process
            timed, if it did, and why each other config was dropped. `screen`: None without one.
            `rows`: where a 16-bit head's rows are stored. `added_bytes`: what the head keeps
            beyond the model's own weight. `model_weight`: if there is a screen or rows are in
            place, whether the weight is the model's own.
        """
        (size, *_) = self.decoder.step_sizes(n_tokens)
        bound = self.decoder.bound(epilogue, size)
        return {
            "problem": bound.problem.data(),
            "device": device_of(self.decoder.like.device).name,
            "screen": None if self.screen is None else str(self.screen),
            "rows": self.rows,
            "added_bytes": self.added_bytes,
            "model_weight": self.whose_weight,
            **bound.choice.explain(),
            "race": bound.race.explain() if bound.race else None,
            "troubles": list(bound.troubles),
        }
