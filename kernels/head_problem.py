"""The problem and the order of rows that a head's tensors pose, checked.

Usage:
    problem = checked_problem(weight, centroids, n_probes=256)
    order = order_of(problem, len(weight), cluster_assignments, None)
"""

import torch

from flashtune.kernels.weights import DTYPE_NAMES, order_from_maps, token_order
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


def problem_of(
    weight: torch.Tensor, centroids: torch.Tensor, n_probes: int, n_tokens: int
) -> Problem:
    """The problem, its vocabulary rounded up to whole clusters."""
    for name, tensor in (("weight", weight), ("centroids", centroids)):
        if tensor.dtype not in DTYPE_NAMES:
            raise FlashtuneError(f"{name} must be bf16, fp16 or fp32, not {tensor.dtype}")
    n_clusters = centroids.shape[0]
    return Problem(
        vocab_size=-(-weight.shape[0] // n_clusters) * n_clusters,
        hidden_size=weight.shape[1],
        n_clusters=n_clusters,
        n_probes=n_probes,
        n_tokens=n_tokens,
        weight_dtype=DTYPE_NAMES[weight.dtype],
        centroid_dtype=DTYPE_NAMES[centroids.dtype],
    )


def checked_problem(weight: torch.Tensor, centroids: torch.Tensor, n_probes: int) -> Problem:
    """The problem that the two matrices pose; FlashtuneError where they don't fit together."""
    for name, tensor in (("weight", weight), ("centroids", centroids)):
        if tensor.dim() != 2:
            raise FlashtuneError(f"{name} must have two dimensions, not {list(tensor.shape)}")
        if not tensor.numel():
            raise FlashtuneError(f"{name} must have rows and columns, not {list(tensor.shape)}")
    if weight.shape[1] != centroids.shape[1]:
        raise FlashtuneError(
            f"weight has rows of {weight.shape[1]} elements, centroids of {centroids.shape[1]}"
        )
    if weight.device != centroids.device:
        raise FlashtuneError(
            f"weight is on {weight.device}, centroids on {centroids.device}: move one"
        )
    return problem_of(weight, centroids, n_probes, n_tokens=1)


def order_of(
    problem: Problem,
    vocab_size: int,
    assignments: torch.Tensor | None,
    vocab_maps: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids in the order of the rows, from the one of the two that is given."""
    if (assignments is None) == (vocab_maps is None):
        raise FlashtuneError("give just one of cluster_assignments and vocab_maps")
    given = assignments if assignments is not None else vocab_maps
    assert given is not None
    name = "vocab_maps" if assignments is None else "cluster_assignments"
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
