"""The tensors of a head as a module: checked, in cluster order, in the screen's formats.

`weights` holds what steps read; this module handles moves, conversions and memory use. `FlashHead`
(head.py) decodes with it.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flashtune.kernels.formats.format import Stored, format_of
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.memory import free_bytes
from flashtune.kernels.special_token import checked_special_tokens, most_pinned, pin
from flashtune.kernels.weights import (
    Weights,
    aligned,
    check_finite,
    checked_dense,
    checked_problem,
    enough_rows,
    in_order,
    marks_of,
    order_of,
    packed,
    rows_at_once,
    stored_weights,
)
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import IN_ORDER, IN_PLACE, ROWS, Problem

LOG = logging.getLogger("flashtune")


class HeadTensors(nn.Module):
    """A head's tensors; the arguments are those of `FlashHead`, which says what they are.

    Raises FlashtuneError if they do not form a valid head. Nothing is part of the state dict.
    """

    weight: torch.Tensor
    centroids: torch.Tensor
    ids: torch.Tensor
    like: torch.Tensor  # empty, [0, hidden], in the dtype of hidden states and logits
    problem: Problem  # for one token, as the head was made: `explain` gives the current one
    _marks: torch.Tensor | None
    _weight_scales: torch.Tensor | None
    _centroid_scales: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        centroids: torch.Tensor,
        cluster_assignments: torch.Tensor | None,
        *,
        vocab_maps: torch.Tensor | None,
        n_probes: int,
        special_token_ids: Sequence[int],
        screen: Screen | None,
        rows: str | None,
        release_weight: bool,
    ) -> None:
        """Check the tensors and put the weight's rows in cluster order."""
        super().__init__()
        self.screen = screen
        if self.screen and release_weight:
            raise FlashtuneError(
                "release_weight permutes the weight, which a screen leaves to the model: give "
                "only one of them"
            )
        _check_rows(rows, screen, release_weight)
        model = checked_dense("weight", weight)
        weight = model.detach()
        centroids = checked_dense("centroids", centroids).detach()
        problem = checked_problem(weight, centroids, n_probes)
        self.vocab_size, self.n_probes = weight.shape[0], n_probes
        order = order_of(problem, self.vocab_size, cluster_assignments, vocab_maps)
        special = checked_special_tokens(special_token_ids, self.vocab_size)
        check_finite("weight", weight)
        check_finite("centroids", centroids)
        all_probed = n_probes == problem.n_clusters
        most = problem.n_clusters if release_weight else most_pinned(n_probes)
        pinned = pin(
            order.to(weight.device), problem.n_clusters, () if all_probed else special, most
        )
        copied = None if screen or release_weight else pinned.order.numel() * weight[0].nbytes
        self.problem = self._screened(
            replace(
                problem,
                vocab_size=pinned.order.numel(),
                n_clusters=problem.n_clusters + pinned.n_added,
                n_probes=n_probes
                + pinned.n_added,  # it is unknown which of the added ones are best
                n_pinned=pinned.n_pinned,
                in_place=_read_in_place(rows, copied, weight.device),
            ),
            pinned.order,
        )
        self.special_token_ids = tuple(special)
        scored = packed(self.problem.centroid_dtype, pinned.centroids(centroids))
        self._released = release_weight
        self._keep(self._laid_out(model, scored, pinned.order))
        self.register_buffer("like", weight.new_empty(0, weight.shape[1]), persistent=False)

    def _screened(self, problem: Problem, order: torch.Tensor) -> Problem:
        """The problem with the screen's formats; it decides more rows if some are repeated."""
        if self.screen is None:
            return problem
        problem = self.screen.problem(problem)
        return replace(problem, n_rescored=enough_rows(order, problem.n_rescored))

    def _laid_out(self, model: torch.Tensor, scored: Stored, order: torch.Tensor) -> Weights:
        """The tensors in cluster order, and references to the model's own."""
        weight = model.detach()
        self._referred: tuple[torch.Tensor, ...] = ()
        self._copied = ""
        if self.problem.n_rescored or self.problem.in_place:
            whole = aligned(weight)
            # The caller's own tensor, so that copies of its model and moves find it to be one
            self._referred = (model if whole is weight and model.is_leaf else whole,)
            if whole is not weight:
                self._copied = "the one given is not contiguous, or not 16-byte aligned"
            weight = whole
        if self._released:
            n_clusters = self.problem.n_clusters
            return Weights(
                weight=in_order(weight, order, n_clusters, in_place=True),
                centroids=aligned(scored.data),
                ids=order.to(torch.int32),
            )
        stored = Stored(aligned(scored.data), scored.scales)
        return stored_weights(self.problem, weight, stored, order)

    def _keep(self, weights: Weights) -> None:
        """Register the tensors. Scales go by their bits, which no change of dtype may touch.

        A weight that is read in place is the model's to move and convert.
        """
        own = ("centroids", "ids") if self.problem.in_place else ("weight", "centroids", "ids")
        for name in own:
            self.register_buffer(name, getattr(weights, name), persistent=False)
        marks = self._marked(weights.ids) if self.problem.in_place else None
        self.register_buffer("_marks", marks, persistent=False)
        for name in ("weight_scales", "centroid_scales"):
            scales: torch.Tensor | None = getattr(weights, name)
            bits = None if scales is None else scales.view(_bits(scales.dtype))
            self.register_buffer(f"_{name}", bits, persistent=False)

    @property
    def weights(self) -> Weights:
        """The tensors as they are now, as steps read them."""
        scales = {}
        for name, kind in (("weight", "weight_dtype"), ("centroid", "centroid_dtype")):
            bits = getattr(self, f"_{name}_scales")
            dtype = format_of(getattr(self.problem, kind)).scale_dtype
            scales[name] = None if bits is None else bits.view(dtype)
        model = None if self.model_weight is None else self.model_weight.detach()
        in_place = self.problem.in_place
        return Weights(
            weight=model if in_place and model is not None else self.weight,
            centroids=self.centroids,
            ids=self.ids,
            weight_scales=scales["weight"],
            centroid_scales=scales["centroid"],
            model_weight=None if in_place else model,
            marks=self._marks,
        )

    def _marked(self, ids: torch.Tensor) -> torch.Tensor:
        """The current rows of the model's weight, in cluster order."""
        model = self._referred[0].detach()
        self._marked_dtype = model.dtype
        marks = ids.new_empty(len(model), dtype=torch.int64)
        at_once = rows_at_once(model.shape[1])
        for rows, part in zip(
            torch.split(model, at_once), torch.split(marks, at_once), strict=True
        ):
            part.copy_(marks_of(rows))
        return marks[ids.long()]

    @property
    def model_weight(self) -> torch.Tensor | None:
        """The weight `[vocab, hidden]` that decides among a screen's candidates, or that rows are
        read from in place; None if the head has its own rows.

        This is the tensor that was given, not a copy. It is converted as the model's parameter is.
        """
        return self._referred[0] if self._referred else None

    def refer_to(self, weight: torch.Tensor) -> None:
        """Take another tensor with the same values as the model's weight."""
        self._referred = (weight,)
        self._mark_again()
        self._renew()

    def _mark_again(self) -> None:
        """Record the rows again after the model's weight has changed its dtype."""
        if self.problem.in_place and self._referred[0].dtype is not self._marked_dtype:
            self._marks = self._marked(self.ids)

    def _renew(self) -> None:
        """Called after the tensors have changed."""
        raise NotImplementedError

    @property
    def rows(self) -> str:
        """Where the rows that steps read first are stored: `in_order` of clusters, or
        `in_place`."""
        return IN_PLACE if self.problem.in_place else IN_ORDER

    @property
    def added_bytes(self) -> int:
        """Bytes that the head keeps beyond the model's own weight."""
        kept = [self.centroids, self.ids, self._weight_scales, self._centroid_scales, self._marks]
        kept += [] if self._released or self.problem.in_place else [self.weight]
        kept += self._referred if self._copied else ()
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> "HeadTensors":
        """Move or convert the tensors. Calls running in other threads finish with the old ones.

        A screen stays as it is; the converted weight decides among its candidates.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():  # what is there already, as its model was converted, stays itself
            referred = tuple(fn(weight) for weight in self._referred)
        if any(new is not old for new, old in zip(referred, self._referred, strict=True)):
            self._copied = "the head was moved or converted separately from its model"
        self._referred = referred
        self._mark_again()
        self._renew()
        return self

    @property
    def whose_weight(self) -> str | None:
        """Whether `model_weight` is the one given, or why it is a copy; None without one."""
        if not self._referred:
            return None
        return f"a copy: {self._copied}" if self._copied else "the one given"


def _check_rows(rows: str | None, screen: Screen | None, release_weight: bool) -> None:
    """Raise FlashtuneError unless rows can be stored there."""
    if rows not in (None, *ROWS):
        raise FlashtuneError(f"rows must be one of {', '.join(ROWS)}, not {rows!r}")
    if rows == IN_PLACE and (screen or release_weight):
        other = "a screen has rows of its own" if screen else "release_weight moves the rows"
        raise FlashtuneError(
            f"rows in_place are the model's own, but {other}: give only one of them"
        )


def _read_in_place(rows: str | None, copied: int | None, device: torch.device) -> bool:
    """Whether rows are read in place, from the model's weight.

    copied: bytes of a copy in cluster order; None if no copy would be made. Unless `rows` decides,
    rows are read in place if the copy would take more than half of the free memory.
    """
    if rows is not None or copied is None:
        return rows == IN_PLACE
    free = free_bytes(device)
    if not free or 2 * copied <= free:
        return False
    LOG.info(
        "rows are read in place: a copy in the order of clusters takes %.0f MiB, and only %.0f "
        "MiB are free (rows=%r makes one nevertheless)",
        copied / 2**20,
        free / 2**20,
        IN_ORDER,
    )
    return True


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Whole numbers of the same size."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]
