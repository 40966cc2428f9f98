"""The order of tokens that makes a cluster's rows adjoin."""

import pytest
import torch

from flashtune.kernels.weights import order_from_maps, token_order
from flashtune.tuning_db.errors import FlashtuneError


def test_tokens_are_sorted_by_cluster_and_ascend_in_it() -> None:
    order = token_order(torch.tensor([2, 0, 1, 0, 2, 1]), n_clusters=3)
    assert order.tolist() == [1, 3, 2, 5, 0, 4]
    assert order.dtype is torch.int64


@pytest.mark.parametrize(
    ("assignments", "order"),
    [
        ([0, 0, 1, 2], [0, 1, 2, 2, 3, 3]),
        ([2, 1, 2, 0, 2, 1, 0], [3, 6, 6, 1, 5, 5, 0, 2, 4]),
    ],
)
def test_a_cluster_with_fewer_tokens_repeats_its_last(
    assignments: list[int], order: list[int]
) -> None:
    assert token_order(torch.tensor(assignments), n_clusters=3).tolist() == order


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_assignments_of_any_integer_type_and_shape_are_taken(dtype: torch.dtype) -> None:
    assignments = torch.tensor([[1, 0], [0, 1]], dtype=dtype)
    assert token_order(assignments, 2).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([0, 1, 3], r"must lie in 0 … 2"),
        ([0, -1, 2], r"must lie in 0 … 2"),
        ([], r"must lie in 0 … 2"),
        ([0, 0, 1, 2, 2, 2], r"equal sizes \(2 tokens, or a little less\), but they have 1 to 3"),
        ([0, 0, 0, 1, 2], r"equal sizes \(2 tokens, or a little less\), but they have 1 to 3"),
        ([0, 1, 0, 1], "but they have 0 to 2 tokens"),
    ],
)
def test_bad_assignments_are_refused(assignments: list[int], message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        token_order(torch.tensor(assignments, dtype=torch.int64), 3)


def test_maps_and_assignments_give_one_order() -> None:
    generator = torch.Generator().manual_seed(0)
    assignments = torch.randperm(60, generator=generator) % 12
    maps = torch.stack([(assignments == c).nonzero()[:, 0].flip(0) for c in range(12)])
    assert torch.equal(order_from_maps(maps), token_order(assignments, 12))


@pytest.mark.parametrize("maps", [[[0, 1], [1, 2]], [[0, 1], [2, 4]], [[0, 1], [2, -1]]])
def test_maps_must_hold_each_token_once(maps: list[list[int]]) -> None:
    with pytest.raises(FlashtuneError, match="exactly once"):
        order_from_maps(torch.tensor(maps))
