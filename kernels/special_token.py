"""Special tokens: candidates of every decode step, since clusters that hold them are pinned.

Usage:
    pinned = pin(order, n_clusters, ids, most=most_pinned(n_probes))
    pinned.order, pinned.clusters, pinned.n_pinned

Pinned clusters come first and are always probed, by the same kernels as all others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from flashtune.tuning_db.errors import FlashtuneError

FEW = 8  # clusters: up to so many are always pinned unchanged


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinned:
    """An order of tokens in which the first n_pinned clusters hold the special ones.

    order: int64, the token of each row, ascending inside a cluster. clusters: the previous index
    of each cluster, or -1 for one of the n_added that were made for special tokens.
    """

    order: torch.Tensor
    clusters: torch.Tensor
    n_pinned: int = 0
    n_added: int = 0

    def centroids(self, centroids: torch.Tensor) -> torch.Tensor:
        """The centroids in this order of clusters; zeros for those that were added."""
        if not self.n_pinned:
            return centroids
        return centroids[self.clusters.clamp(min=0)] * (self.clusters >= 0)[:, None]


def most_pinned(n_probes: int) -> int:
    """How many clusters may be pinned unchanged at little cost to a step."""
    return max(FEW, n_probes // 8)


def pin(order: torch.Tensor, n_clusters: int, ids: Sequence[int], most: int) -> Pinned:
    """Bring clusters with special tokens to the front.

    order: the token of each row, `[n_clusters * cluster_size]`. If the tokens are in more than
    `most` clusters, they move to new clusters, which are added in front: pinning all the original
    ones would cost many times as many rows. Another token of the cluster is repeated in the slot
    that a token leaves and at the end of an added cluster, as in `weights.token_order`.
    """
    rows = order.view(n_clusters, -1)
    clusters = torch.arange(n_clusters, device=order.device)
    if not ids:
        return Pinned(order=order, clusters=clusters)
    special = torch.isin(rows, torch.tensor(ids, dtype=order.dtype, device=order.device))
    holding, whole = special.any(dim=1), special.all(dim=1)
    n_holding, n_whole = int(holding.sum()), int(whole.sum())
    moved = torch.unique(rows[special & ~whole[:, None]])
    n_added = -(-len(moved) // rows.shape[1])
    if n_holding <= most or n_added + n_whole >= n_holding:
        first = torch.argsort(~holding, stable=True)
        return Pinned(order=rows[first].flatten(), clusters=first, n_pinned=n_holding)
    last = torch.iinfo(order.dtype).max
    kept = torch.where(special & ~whole[:, None], last, rows).sort(dim=1).values
    kept = _filled(kept, (kept != last).sum(dim=1))
    places = torch.arange(n_added * rows.shape[1], device=order.device)
    added = moved[places.clamp(max=len(moved) - 1)].view(n_added, -1)
    first = torch.argsort(~whole, stable=True)
    new = torch.full((n_added,), -1, device=order.device)
    return Pinned(
        order=torch.cat([added, kept[first]]).flatten(),
        clusters=torch.cat([new, first]),
        n_pinned=n_added + n_whole,
        n_added=n_added,
    )


def _filled(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows whose first `counts` numbers are followed by repetitions of the last of these."""
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return rows.gather(1, torch.minimum(places, counts[:, None] - 1))


def checked_special_tokens(ids: Sequence[int], vocab_size: int) -> list[int]:
    """The distinct ids in ascending order; FlashtuneError if one is not a valid token id."""
    if not isinstance(ids, Iterable):
        raise FlashtuneError(f"special_token_ids must be a list of token ids, not {ids!r}")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise FlashtuneError(
                f"special_token_ids must be whole numbers from 0 to {vocab_size - 1}, "
                f"not {token!r}"
            )
    return sorted(set(ids))
