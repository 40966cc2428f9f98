"""Assign tokens to clusters of limited size: an auction, then whatever places are free.

Usage:
    clusters = assign(scores, candidates, places, best_free)     # int64 [tokens]

Every token bids for its best candidate the margin over its second best, each less its current
price. A cluster keeps the best bids, and its price is the lowest of them (Bertsekas, Linear
network optimization, 1991, chapter 4). A few rounds come close to the best assignment; the
remaining tokens take the best of the clusters that have free places.
"""

from collections.abc import Callable

import torch

ROUNDS = 60
_STEP = 1e-3  # least increment of a bid, so that ties end; scores are about 1

BestFree = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def assign(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    places: torch.Tensor,
    best_free: BestFree,
    rounds: int = ROUNDS,
) -> torch.Tensor:
    """The cluster of each token, int64 `[tokens]`; no cluster exceeds its places.

    scores `[tokens, n]` are those of the candidates, clusters int64 `[tokens, n]`; places int64
    `[clusters]`, in total at least one per token. best_free(tokens, clusters) gives, for each of
    the given tokens, the score and the position of the best of the given clusters.
    """
    clusters = torch.full_like(candidates[:, 0], -1)
    bids = torch.zeros_like(scores[:, 0])
    costs = torch.zeros(len(places), device=scores.device)
    waiting = torch.arange(len(clusters), device=scores.device)
    for _ in range(rounds):
        options = candidates[waiting]
        top, at = (scores[waiting] - costs[options]).topk(min(2, scores.shape[1]))
        choice = options.gather(1, at[:, :1])[:, 0]
        clusters[waiting] = choice
        bids[waiting] = costs[choice] + top[:, 0] - top[:, -1] + _STEP
        waiting = _evict(clusters, bids, places, costs)
        if not len(waiting):
            return clusters
    while len(left := (clusters < 0).nonzero()[:, 0]):
        room = places - torch.bincount(clusters[clusters >= 0], minlength=len(places))
        free = room.nonzero()[:, 0]
        score, at = best_free(left, free)
        _evict(at, score, room[free], torch.zeros(len(free), device=score.device))
        clusters[left[at >= 0]] = free[at[at >= 0]]
    return clusters


def _evict(
    clusters: torch.Tensor, bids: torch.Tensor, places: torch.Tensor, costs: torch.Tensor
) -> torch.Tensor:
    """Keep the best bids for each cluster's places; returns the evicted tokens, now in cluster -1.

    The price of a cluster that is then full is its lowest bid.
    """
    held = (clusters >= 0).nonzero()[:, 0]
    held = held[bids[held].argsort(descending=True, stable=True)]
    held = held[clusters[held].argsort(stable=True)]
    owners = clusters[held]
    counts = torch.bincount(owners, minlength=len(places))
    ranks = torch.arange(len(held), device=held.device) - (counts.cumsum(0) - counts)[owners]
    last = ranks == places[owners] - 1
    costs[owners[last]] = bids[held[last]]
    evicted = held[ranks >= places[owners]]
    clusters[evicted] = -1
    return evicted
