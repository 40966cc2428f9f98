"""FlashHead: a decode head as a module, with the best kernel there is.

Usage:
    head = FlashHead(weight, centroids, cluster_assignments, n_probes=256)
    token = head(hidden)     # int64 [tokens], from hidden [tokens, hidden_size]
    head.logits(hidden)      # [tokens, vocab], for sampling
    head.explain()           # what runs, and why
    FlashHead(weight, centroids, cluster_assignments, screen="int8")    # docs/formats.md
    FlashHead.screened(weight, "int4")                                  # without clusters

The first call with a number of tokens chooses, compiles and checks a kernel (seconds); `prepare`
does so ahead of time. What was never measured here is raced for then (docs/tables.md). Later
calls only launch: they can be captured in a CUDA graph, and `torch.compile(head, fullgraph=True)`
traces them as one operator. Whatever is wrong with kernels, compiler or database, the head still
answers, in plain torch if need be, and says so once in the log `flashtune`.
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
# Tokens of a cluster of a head without clusters, the first that divides its vocabulary, so that
# no row is there twice. Every cluster is probed, and its centroid only fills its place: large
# clusters keep these small. Those of 16 are what tables have records for, and will do at worst.
_SCREENED_TOGETHER = (128, 64, 32, 16)


class FlashHead(HeadTensors):
    """The token with the best logit among the clusters nearest to a hidden state.

    weight `[vocab, hidden]` and centroids `[n_clusters, hidden]`: bf16, fp16 or fp32, on one
    device. The clusters are given by one of cluster_assignments, the cluster of each token
    `[vocab]`, or vocab_maps, the tokens of each cluster `[n_clusters, cluster_size]`. They are
    all of the same size; only where n_clusters does not divide vocab may some, given by
    cluster_assignments, have fewer tokens.

    special_token_ids are candidates of every call, whatever is probed: the clusters that hold them
    are probed too (docs/model-folders.md says what that costs).

    screen: centroids and rows are stored in 8 or 4 bits, and find the candidates; the best few are
    decided by the rows of `weight`, which the head refers to and never copies: it must stay as it
    is. A Screen or its text, like `int8` or `int4/int8:16` (docs/formats.md).

    rows: where the rows lie that steps read. `in_order`: in a copy of the weight, a cluster's side
    by side. `in_place`: in `weight` itself, which the head refers to and never copies: it must
    stay as it is, and a step takes longer (docs/formats.md). Unless given, in place where the copy
    would take more than half of the memory that is free. A screen has rows of its own.

    release_weight: keep no second copy of the weight, and never make one: the caller's tensor
    itself is permuted, in place, so that it must not be used afterwards. Don't set it for a
    weight that is tied to the input embedding. It needs clusters all of the same size, and no
    screen.

    tune: with `race`, kernels that were only predicted for this device, or measured with other
    tools, are timed on it when they are first needed, and the winner is kept in the user's
    database; all this takes 20 seconds in a head's life at most. With `never` the best record
    there is runs untried.

    A graph that captured a call replays with scratch of the stream it was captured on: graphs
    captured on one stream must not be replayed at the same time.
    Raises FlashtuneError if they do not form a valid head. Nothing is part of the state dict.
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
        """Check the tensors and bring the weight's rows in the order of clusters."""
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
        """A head without clusters: all rows are screened, and the model's own decide the best.

        weight `[vocab, hidden]`, as for the class; of any model, for there is nothing to prepare.
        Every token has a logit, those that are not decided by the screen's.
        """
        if screen_of(screen) is None:
            raise FlashtuneError("a head without clusters needs a screen: int4, int8 or the like")
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

        source: a model folder, or the name of a repository in Hugging Face's cache (at that
        revision); nothing is downloaded. device: torch's default device unless given. n_probes:
        as many as the model's config says unless given. screen: the config's unless given, and
        `none` for none. rows, tune: as for the class; rows that are the head's own are brought in
        order without a copy where they can be. Only the head is read, with the config's dtype;
        docs/model-folders.md says from where. Raises FlashtuneError naming the file and the
        tensor, what was found there and what was expected.
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
        """Everything that neither a copy nor a pickle takes along."""
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
        """Take the tensors and start afresh."""
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
                hidden, self.like, self.vocab_size, self._handle
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
        run in several. `screen` is None without one, `rows` says where a 16-bit head's lie,
        `added_bytes` what the head keeps beyond the model's own weight, and `model_weight`, where
        there is a screen or rows are in place, whether it is that.
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
