"""What a step reads and writes: weights whose rows of a cluster adjoin, tokens or logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Of every token that is no candidate. Finite: with -inf or a dtype's minimum, serving engines that
# mask logits of their own end up with nothing but illegal tokens, and take token 0.
FILL = -1e4


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What a step reads, on one device: `weight` permuted so that a cluster's rows adjoin.

    Shapes: weight `[rows, hidden]`, centroids `[n_clusters, hidden]`, ids int32 `[rows]`,
    the token id of each row of weight, ascending inside a cluster. rows is n_clusters times
    cluster_size: more than the vocabulary where that does not divide (see `token_order`).
    """

    weight: torch.Tensor
    centroids: torch.Tensor
    ids: torch.Tensor


Step = Callable[[Weights, torch.Tensor, torch.Tensor], None]
"""A decode step: `step(weights, hidden, out)` with hidden `[n_tokens, hidden]` writes to `out`,
which is as `new_out` makes it."""


def new_out(problem: Problem, device: torch.device) -> torch.Tensor:
    """Room for a step's output: token ids, int64 `[n_tokens]`, or with the epilogue `logits`
    `[n_tokens, vocab]` in the weight's dtype, each token's logit at its id and `FILL` elsewhere.
    """
    if problem.epilogue == "argmax":
        return torch.empty(problem.n_tokens, dtype=torch.int64, device=device)
    shape, dtype = (problem.n_tokens, problem.vocab_size), TORCH_DTYPES[problem.weight_dtype]
    return torch.empty(shape, dtype=dtype, device=device)


def poisoned_out(problem: Problem, device: torch.device) -> torch.Tensor:
    """`new_out` full of what no step may leave there: -1, no token id, or NaN, no logit."""
    return new_out(problem, device).fill_(-1 if problem.epilogue == "argmax" else math.nan)


def token_order(cluster_assignments: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """Token ids sorted by cluster, ascending inside each: int64 `[n_clusters * cluster_size]`.

    cluster_assignments: the cluster of each token, integers `[vocab]`. cluster_size is
    vocab / n_clusters, rounded up; a cluster with fewer tokens repeats its last one, which the
    kernels then meet twice, with the same row. Raises FlashtuneError unless every cluster has
    a token and none has more than cluster_size.
    """
    assignments = cluster_assignments.reshape(-1).to(torch.int64)
    if assignments.numel() == 0 or assignments.min() < 0 or assignments.max() >= n_clusters:
        raise FlashtuneError(f"cluster_assignments must lie in 0 … {n_clusters - 1}")
    sizes = torch.bincount(assignments, minlength=n_clusters)
    cluster_size = -(-assignments.numel() // n_clusters)
    if sizes.min() == 0 or sizes.max() > cluster_size:
        raise FlashtuneError(
            f"clusters must be of equal size, {cluster_size}, or have a little less, but they "
            f"have {int(sizes.min())} to {int(sizes.max())} tokens: cluster the vocabulary "
            "again with equal sizes, as `flashtune cluster` does"
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
    counts = torch.bincount(order.clamp(min=0), minlength=order.numel())
    if counts.numel() != order.numel() or counts.min() != 1 or order.min() < 0:
        raise FlashtuneError("vocab_maps must hold every token id from 0 to vocab - 1 just once")
    return order
