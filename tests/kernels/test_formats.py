"""Number formats: what each takes, and that packing loses no more than it says."""

import pytest
import torch

from flashtune.kernels.formats.format import Format, format_named, format_of, plain_formats
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import FORMATS, Problem

ALL = [format_of(name) for name in FORMATS]
WIDTHS = (1, 31, 32, 33, 640)


def matrix(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width))


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_packed_matrix_takes_the_bytes_that_the_format_says(each: Format, width: int) -> None:
    stored = each.pack(matrix(6, width))
    found = stored.data.nbytes + (stored.scales.nbytes if stored.scales is not None else 0)
    assert found == each.bytes_of(6, width)
    assert stored.data.dtype is each.torch_dtype
    assert each.quantised is (stored.scales is not None)


@pytest.mark.parametrize("each", plain_formats(), ids=lambda each: each.name)
def test_plain_numbers_are_stored_as_they_are(each: Format) -> None:
    weight = matrix(4, 33).to(each.torch_dtype)
    stored = each.pack(weight)
    assert torch.equal(stored.data, weight)
    assert torch.equal(each.unpack(stored, 33), weight.float())
    assert format_named(weight.dtype) is each


def test_a_format_that_is_not_there_is_named() -> None:
    with pytest.raises(FlashtuneError, match="a format must be one of bf16, fp16, fp32"):
        format_of("fp7")
    with pytest.raises(FlashtuneError, match="weight_dtype must be one of bf16"):
        Problem(vocab_size=4, hidden_size=2, n_clusters=2, n_probes=1, weight_dtype="fp7")
    assert format_named(torch.int64) is None


def test_bytes_of_a_problem_are_those_of_its_formats() -> None:
    problem = Problem(
        vocab_size=12,
        hidden_size=10,
        n_clusters=3,
        n_probes=1,
        weight_dtype="fp32",
        centroid_dtype="bf16",
        epilogue="logits",
        n_tokens=2,
    )
    assert problem.centroid_bytes == 3 * 10 * 2
    assert problem.cluster_bytes == 4 * 10 * 4
    assert problem.written_bytes == 2 * 12 * 4
