"""Which clusters are pinned, and where tokens go that lie in too many."""

import pytest
import torch

from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.kernels.head import FlashHead
from flashtune.kernels.special_token import most_pinned, pin
from flashtune.kernels.weights import token_order

ORDER = token_order(torch.arange(12) % 4, 4)  # 0 4 8, 1 5 9, 2 6 10, 3 7 11


def test_without_special_tokens_nothing_moves() -> None:
    pinned = pin(ORDER, 4, [], most=8)
    assert (pinned.n_pinned, pinned.n_added) == (0, 0)
    assert torch.equal(pinned.order, ORDER)
    centroids = torch.randn(4, 2)
    assert pinned.centroids(centroids) is centroids


def test_clusters_with_special_tokens_come_first_and_keep_their_order() -> None:
    pinned = pin(ORDER, 4, [7, 6, 2], most=2)
    assert pinned.order.tolist() == [2, 6, 10, 3, 7, 11, 0, 4, 8, 1, 5, 9]
    assert pinned.clusters.tolist() == [2, 3, 0, 1]
    assert (pinned.n_pinned, pinned.n_added) == (2, 0)
    centroids = torch.randn(4, 2)
    assert torch.equal(pinned.centroids(centroids), centroids[[2, 3, 0, 1]])


def test_tokens_of_too_many_clusters_get_clusters_of_their_own() -> None:
    pinned = pin(ORDER, 4, [5, 2, 11], most=2)
    assert pinned.order.tolist() == [2, 5, 11, 0, 4, 8, 1, 9, 9, 6, 10, 10, 3, 7, 7]
    assert pinned.clusters.tolist() == [-1, 0, 1, 2, 3]
    assert (pinned.n_pinned, pinned.n_added) == (1, 1)
    centroids = torch.randn(4, 2)
    assert torch.equal(pinned.centroids(centroids), torch.cat([torch.zeros(1, 2), centroids]))


def test_a_cluster_of_special_tokens_alone_is_pinned_as_it_is() -> None:
    pinned = pin(ORDER, 4, [0, 1, 5, 9, 10, 3, 11], most=2)
    assert pinned.order.tolist() == [0, 3, 10, 11, 11, 11, 1, 5, 9, 4, 8, 8, 2, 6, 6, 7, 7, 7]
    assert pinned.clusters.tolist() == [-1, -1, 1, 0, 2, 3]
    assert (pinned.n_pinned, pinned.n_added) == (3, 2)


def test_clusters_are_added_only_where_they_are_fewer() -> None:
    pinned = pin(ORDER, 4, list(range(12)), most=2)
    assert (pinned.n_pinned, pinned.n_added) == (4, 0)
    assert torch.equal(pinned.order, ORDER)


@pytest.mark.parametrize(("n_probes", "most"), [(1, 8), (64, 8), (256, 32)])
def test_what_is_pinned_is_few_beside_what_is_probed(n_probes: int, most: int) -> None:
    assert most_pinned(n_probes) == most


def test_logits_have_special_tokens_and_no_padding(without_kernels: None) -> None:
    """A vocabulary that does not divide: its logits are as wide as it, special ones always in."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1003, 64, generator=generator)
    centroids = torch.nn.functional.normalize(torch.randn(63, 64, generator=generator), dim=1)
    hidden = torch.randn(3, 64, generator=generator)
    dense = hidden @ weight.T
    assignments = torch.arange(1003) % 63
    for n_probes in (2, 63):
        head = FlashHead(
            weight, centroids, assignments, n_probes=n_probes, special_token_ids=(5, 1)
        )
        logits = head.logits(hidden)
        assert logits.shape == dense.shape
        assert logits.is_contiguous()
        known = logits > FILL
        assert bool(known[:, [1, 5]].all())
        assert bool(known.all()) == (n_probes == 63)
        torch.testing.assert_close(logits[known], dense[known])
        assert torch.equal(logits.argmax(dim=1), head(hidden))
