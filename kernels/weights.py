"""A head's tensors, checked and in cluster order; what a step reads and writes.

Usage:
    problem = checked_problem(weight, centroids, n_probes=256)
    order = order_of(problem, len(weight), cluster_assignments, None)
    check_finite("weight", weight)
    weight = in_order(weight, order, problem.n_clusters, in_place=False)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from flashtune.kernels.formats.format import (
    Stored,
    dtype_name,
    format_named,
    format_of,
    plain_formats,
)
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

ALIGNMENT = 16  # bytes, of every tensor that a kernel reads
_CHUNK_BYTES = 2**26
_AT_ONCE_BYTES = 2**22  # of rows in float32; packing them makes a few tensors of that size
# Error bounds of a packed number: half a step plus float32's rounding, bf16's rounding, and the
# loss for numbers so small that their scale is not a normal float16.
_HALF, _CONVERTED, _TINY = 0.501, 2.0**-8, 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What a step reads, on one device: `weight` permuted so that a cluster's rows adjoin.

    Shapes: weight `[rows, hidden]`, centroids `[n_clusters, hidden]`, ids int32 `[rows]`,
    the token id of each row of weight, ascending inside a cluster. rows is n_clusters times
    cluster_size: more than the vocabulary if n_clusters does not divide it (see `token_order`).
    In a quantised format both hold its data, and the scales are separate tensors. model_weight
    `[vocab, hidden]`, in the order of token ids, decides among candidates, if the problem has
    them. If the problem is `in_place`, weight is the model's own `[vocab, hidden]`: row i of the
    head is its row ids[i]. marks int64 `[rows]` then say what each row was (`marks_of`).
    """

    weight: torch.Tensor
    centroids: torch.Tensor
    ids: torch.Tensor
    weight_scales: torch.Tensor | None = None
    centroid_scales: torch.Tensor | None = None
    model_weight: torch.Tensor | None = None
    marks: torch.Tensor | None = None

    def rows(
        self, problem: Problem, which: torch.Tensor | slice, dtype: torch.dtype
    ) -> torch.Tensor:
        """Some rows of the weight, dequantised in a dtype."""
        if problem.in_place:
            return self.weight[self.ids[which].long()].to(dtype)
        scales = None if self.weight_scales is None else self.weight_scales[which]
        stored = Stored(self.weight[which], scales)
        return format_of(problem.weight_dtype).unpack(stored, problem.hidden_size, dtype)

    def centroid_rows(
        self, problem: Problem, which: torch.Tensor | slice, dtype: torch.dtype
    ) -> torch.Tensor:
        """Some centroids, dequantised in a dtype."""
        scales = None if self.centroid_scales is None else self.centroid_scales[which]
        stored = Stored(self.centroids[which], scales)
        return format_of(problem.centroid_dtype).unpack(stored, problem.hidden_size, dtype)

    def holds(self, problem: Problem, which: slice, rows: torch.Tensor) -> bool:
        """Whether some rows of the weight represent these, `[rows, hidden]`.

        Quantised numbers may be off by half a step, plus the rounding of any later conversion of
        the model's weight to another dtype. Rows read in place are compared by their marks.
        """
        if self.marks is not None:
            return torch.equal(self.marks[which], marks_of(rows))
        if self.weight_scales is None:
            return torch.equal(self.weight[which], rows)
        steps = format_of(problem.weight_dtype).steps(self.weight_scales[which], rows.shape[1])
        wide = rows.float()
        off = (self.rows(problem, which, torch.float32) - wide).abs()
        return bool((off <= _HALF * steps + _CONVERTED * wide.abs() + _TINY).all())

    def put(self, problem: Problem, row: int, values: torch.Tensor) -> None:
        """Overwrite a row with another `[hidden]`, here and in the model's own weight."""
        if problem.in_place:
            self.weight[self.ids[row]] = values.to(self.weight.dtype)
            return
        stored = format_of(problem.weight_dtype).pack(values[None])
        self.weight[row] = stored.data[0]
        if self.weight_scales is not None and stored.scales is not None:
            self.weight_scales[row] = stored.scales[0]
        if self.model_weight is not None:
            self.model_weight[self.ids[row]] = values.to(self.model_weight.dtype)


def stored_weights(
    problem: Problem, model: torch.Tensor, centroids: Stored, order: torch.Tensor
) -> Weights:
    """A head's tensors in the problem's formats.

    model: the weight `[vocab, hidden]` by token ids, kept if it decides among candidates or rows
    are read in place. order: the token of each row, in cluster order.
    """
    stored = packed(problem.weight_dtype, model, None if problem.in_place else order)
    return Weights(
        weight=stored.data,
        centroids=centroids.data,
        ids=order.to(torch.int32),
        weight_scales=stored.scales,
        centroid_scales=centroids.scales,
        model_weight=model if problem.n_rescored else None,
    )


def packed(format_name: str, matrix: torch.Tensor, order: torch.Tensor | None = None) -> Stored:
    """A matrix's rows, in this order if one is given, in a format.

    Those of a quantised format are packed a few at a time, since that works in float32.
    """
    made = format_of(format_name)
    if not made.quantised:
        return made.pack(matrix if order is None else matrix[order])
    order = torch.arange(len(matrix), device=matrix.device) if order is None else order
    first = made.pack(matrix[:1])
    whole = [each.new_empty(len(order), *each.shape[1:]) for each in _parts(first)]
    at_once = rows_at_once(matrix.shape[1])
    for start in range(0, len(order), at_once):
        some = slice(start, start + at_once)
        for tensor, part in zip(whole, _parts(made.pack(matrix[order[some]])), strict=True):
            tensor[some] = part
    return Stored(*whole)


def _parts(stored: Stored) -> list[torch.Tensor]:
    return [each for each in (stored.data, stored.scales) if each is not None]


def rows_at_once(width: int) -> int:
    """How many rows of a matrix to work on at a time, so that what that takes stays small."""
    return max(1, _AT_ONCE_BYTES // (4 * width))


def marks_of(rows: torch.Tensor) -> torch.Tensor:
    """An int64 checksum of each row `[n, hidden]` of unquantised numbers, to detect changes.

    It is the sum of the numbers' bits, the same on every device.
    """
    whole = {2: torch.int16, 4: torch.int32}[rows.element_size()]
    return rows.contiguous().view(whole).sum(dim=1, dtype=torch.int64)


Step = Callable[[Weights, torch.Tensor, torch.Tensor], None]
"""A decode step: `step(weights, hidden, out)` with hidden `[n_tokens, hidden]` writes to `out`,
which `epilogue.new_out` makes. If hidden has fewer rows, the last one is repeated."""


@runtime_checkable
class Unloadable(Protocol):
    """A step of kernels that can be unloaded."""

    def unload(self) -> None:
        """Unload them: this step and those that share its kernels must not be called again."""


def filled_up(hidden: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """hidden with as many rows as a step has tokens, the last one repeated."""
    missing = n_tokens - hidden.shape[0]
    return torch.cat([hidden, hidden[-1:].expand(missing, -1)]) if missing else hidden


def checked_dense(name: str, given: object) -> torch.Tensor:
    """What was given under this name; FlashtuneError unless it is a dense tensor."""
    if not isinstance(given, torch.Tensor):
        kind = type(given).__name__
    elif given.is_nested:
        kind = "nested"
    elif given.layout is not torch.strided:
        kind = str(given.layout)
    else:
        return given
    raise FlashtuneError(f"{name} must be a dense tensor, not {kind}")


def token_order(cluster_assignments: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """Token ids sorted by cluster, ascending inside each: int64 `[n_clusters * cluster_size]`.

    cluster_assignments: the cluster of each token, integers `[vocab]`. cluster_size is
    vocab / n_clusters, rounded up; a cluster with fewer tokens repeats its last one, which the
    kernels then see more than once, with the same row. Raises FlashtuneError unless every cluster
    has a token and none has more than cluster_size.
    """
    assignments = cluster_assignments.reshape(-1).to(torch.int64)
    if assignments.numel() == 0 or assignments.min() < 0 or assignments.max() >= n_clusters:
        raise FlashtuneError(f"cluster_assignments must lie in 0 … {n_clusters - 1}")
    sizes = torch.bincount(assignments, minlength=n_clusters)
    cluster_size = -(-assignments.numel() // n_clusters)
    if sizes.min() == 0 or sizes.max() > cluster_size:
        raise FlashtuneError(
            f"clusters must have equal sizes ({cluster_size} tokens, or a little less), but they "
            f"have {int(sizes.min())} to {int(sizes.max())} tokens: cluster the vocabulary again "
            "with equal sizes, as `flashtune cluster` does"
        )
    order = torch.argsort(assignments, stable=True)
    if order.numel() == n_clusters * cluster_size:
        return order
    places = torch.arange(cluster_size, device=order.device).expand(n_clusters, -1)
    starts = sizes.cumsum(0) - sizes
    return order[(starts[:, None] + torch.minimum(places, sizes[:, None] - 1)).flatten()]


def order_from_maps(vocab_maps: torch.Tensor) -> torch.Tensor:
    """Token ids sorted by cluster from the tokens of each cluster, `[n_clusters, cluster_size]`.

    Raises FlashtuneError unless every token id occurs just once.
    """
    order = vocab_maps.to(torch.int64).sort(dim=-1).values.reshape(-1)
    within = order.min() >= 0 and order.max() < order.numel()
    if not within or torch.bincount(order, minlength=order.numel()).min() != 1:
        raise FlashtuneError(
            "vocab_maps must contain every token id from 0 to vocab - 1 exactly once"
        )
    return order


def problem_of(
    weight: torch.Tensor, centroids: torch.Tensor, n_probes: int, n_tokens: int
) -> Problem:
    """The problem, its vocabulary rounded up to whole clusters."""
    for name, tensor in (("weight", weight), ("centroids", centroids)):
        if format_named(tensor.dtype) is None:
            known = ", ".join(each.name for each in plain_formats())
            raise FlashtuneError(f"{name} must be one of {known}, not {tensor.dtype}")
    n_clusters = centroids.shape[0]
    return Problem(
        vocab_size=-(-weight.shape[0] // n_clusters) * n_clusters,
        hidden_size=weight.shape[1],
        n_clusters=n_clusters,
        n_probes=n_probes,
        n_tokens=n_tokens,
        weight_dtype=dtype_name(weight),
        centroid_dtype=dtype_name(centroids),
    )


def posed(problem: Problem, weights: Weights, dtype: torch.dtype) -> Problem:
    """A head's problem after a conversion: the model's dtype changes, the screen's formats do not.

    Raises FlashtuneError if the dtype is not a supported format.
    """
    found = format_named(dtype)
    if found is None:
        known = ", ".join(each.name for each in plain_formats())
        raise FlashtuneError(f"the head must be one of {known}, not {dtype}")
    if problem.model_dtype:
        return replace(problem, model_dtype=found.name)
    centroids = dtype_name(weights.centroids)
    return replace(problem, weight_dtype=found.name, centroid_dtype=centroids)


def enough_rows(order: torch.Tensor, n_tokens: int) -> int:
    """How many rows are needed so that any such set holds at least so many distinct tokens.

    Rows that pad a cluster repeat a token and add no distinct one.
    """
    counts = torch.bincount(order)
    return int(counts.topk(min(n_tokens, len(counts))).values.sum())


def checked_problem(weight: torch.Tensor, centroids: torch.Tensor, n_probes: int) -> Problem:
    """The problem that the two matrices define; FlashtuneError if their shapes don't match."""
    for name, tensor in (("weight", weight), ("centroids", centroids)):
        if tensor.dim() != 2:
            raise FlashtuneError(f"{name} must have two dimensions, not {list(tensor.shape)}")
        if not tensor.numel():
            raise FlashtuneError(f"{name} must have rows and columns, not {list(tensor.shape)}")
    if weight.shape[1] != centroids.shape[1]:
        raise FlashtuneError(
            f"weight has rows of {weight.shape[1]} elements, but centroids of "
            f"{centroids.shape[1]}: they are of different models"
        )
    if weight.device != centroids.device:
        raise FlashtuneError(
            f"weight is on {weight.device}, but centroids on {centroids.device}: move one of them"
        )
    return problem_of(weight, centroids, n_probes, n_tokens=1)


def order_of(
    problem: Problem,
    vocab_size: int,
    assignments: torch.Tensor | None,
    vocab_maps: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids in row order, from whichever of the two arguments is given."""
    if (assignments is None) == (vocab_maps is None):
        raise FlashtuneError("give either cluster_assignments or vocab_maps")
    name = "vocab_maps" if assignments is None else "cluster_assignments"
    given = checked_dense(name, vocab_maps if assignments is None else assignments)
    shape = [vocab_size]
    if assignments is None:
        shape = [problem.n_clusters, problem.cluster_size]
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype is torch.bool:
        raise FlashtuneError(f"{name} must be whole numbers, not {given.dtype}")
    if list(given.shape) != shape:
        raise FlashtuneError(f"{name} must be {shape}, not {list(given.shape)}")
    if vocab_size != problem.vocab_size and assignments is None:
        raise FlashtuneError(
            f"vocab_maps need a vocabulary that is a multiple of n_clusters, but {vocab_size} "
            f"is not one of {problem.n_clusters}: give cluster_assignments"
        )
    return (
        order_from_maps(given) if assignments is None else token_order(given, problem.n_clusters)
    )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise FlashtuneError if the tensor has a NaN or an infinity."""
    if not all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
        raise FlashtuneError(f"{name} contains NaN or infinity: check how it was loaded")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless it is contiguous and aligned."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def in_order(
    weight: torch.Tensor, order: torch.Tensor, n_clusters: int, *, in_place: bool
) -> torch.Tensor:
    """The weight's rows in this order, in storage of its own or in the weight's.

    in_place: needs a weight that is contiguous and aligned, and an order with each row once;
    FlashtuneError otherwise.
    """
    if not in_place:
        return weight[order]
    if not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
        raise FlashtuneError(
            "release_weight needs a contiguous weight, 16-byte aligned: "
            "give it weight.contiguous().clone(), or leave release_weight off"
        )
    if order.numel() != len(weight):
        raise FlashtuneError(
            f"release_weight needs n_clusters to divide vocab, but {n_clusters} "
            f"does not divide {len(weight)}: leave release_weight off"
        )
    permute_rows_(weight, order)
    return weight


def permute_rows_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Permute the rows of `matrix` in its own storage: row i becomes the former row `order[i]`.

    matrix `[rows, columns]`, order int64 `[rows]`, a permutation on the same device. Works by
    blocks of columns: it allocates only one block's copy (64 MiB, or one column if that is more).
    """
    rows, columns = matrix.shape
    width = max(1, _CHUNK_BYTES // (rows * matrix.element_size()))
    for start in range(0, columns, width):
        block = matrix[:, start : start + width]
        block.copy_(block.index_select(0, order))
