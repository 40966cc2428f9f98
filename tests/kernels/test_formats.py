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
    assert torch.equal(each.unpack(stored, 33, torch.float32), weight.float())
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


@pytest.mark.parametrize("each", [f for f in ALL if f.quantised], ids=lambda each: each.name)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_unpacked_is_off_by_half_a_step_at_most(each: Format, width: int) -> None:
    weight = matrix(6, width)
    weight[0] = 0.0
    weight[1, 0] = 1000.0  # an outlier costs its own group alone
    stored = each.pack(weight)
    found = each.unpack(stored, width, torch.float64)
    assert found.shape == weight.shape
    assert bool((found[0] == 0).all())
    assert stored.scales is not None
    group = each.group or width
    steps = stored.scales.double().view(6, -1).repeat_interleave(group, dim=1)[:, :width]
    # scales are rounded to their own dtype, after which the largest number may be cut off
    eps = torch.finfo(stored.scales.dtype).eps
    assert bool(((found - weight.double()).abs() <= steps / 2 + 8 * eps * weight.abs()).all())


def test_numbers_of_int4_lie_where_the_format_says() -> None:
    weight = torch.arange(-7.0, 57.0)[None].clamp(-7, 7)
    stored = format_of("int4").pack(weight)
    assert stored.data.shape == (1, 32) and stored.scales is not None
    assert stored.scales.tolist() == [[1.0, 1.0]]
    first = [int(byte) & 15 for byte in stored.data[0, :16]]
    assert [number - 8 for number in first] == weight[0, :16].int().tolist()
    second = [int(byte) >> 4 for byte in stored.data[0, :16]]
    assert [number - 8 for number in second] == weight[0, 16:32].int().tolist()


def test_rescored_rows_and_scales_count_as_bytes() -> None:
    problem = Problem(
        vocab_size=1600,
        hidden_size=64,
        n_clusters=100,
        n_probes=10,
        weight_dtype="int8",
        centroid_dtype="int4",
        model_dtype="bf16",
        n_rescored=8,
    )
    assert problem.centroid_bytes == 100 * (32 + 2 * 2)
    assert problem.cluster_bytes == 16 * (64 + 4)
    assert problem.read_bytes == problem.centroid_bytes + 10 * problem.cluster_bytes + 8 * 128
    assert problem.state_dtype == "bf16"
    assert "int8 centroids int4 r8" in problem.describe()
