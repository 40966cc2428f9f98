"""The format `int4`: whole numbers from -8 to 7, times a float16 scale for every 32 of a row.

Two are packed in a byte, 8 added to each: of every group of 32 weights, byte k of 16 holds number
k in its lower half and number k + 16 in its upper one. A row whose width is not a multiple of 32
ends in zeros.
"""

from typing import TYPE_CHECKING

from flashtune.kernels.formats.format import Format, Stored

if TYPE_CHECKING:
    import torch

_GROUP = 32
_LEAST, _MOST = -8, 7


def _pack(weight: "torch.Tensor") -> Stored:
    """Scales such that the largest magnitude of each group is 7, then rounded to float16."""
    import torch
    from torch.nn.functional import pad

    rows, width = weight.shape
    groups = pad(weight.float(), (0, -width % _GROUP)).view(rows, -1, _GROUP)
    scales = (groups.abs().amax(dim=2) / _MOST).clamp(max=torch.finfo(torch.float16).max)
    scales = scales.to(torch.float16)
    divisors = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    numbers = torch.round(groups / divisors[:, :, None]).clamp(_LEAST, _MOST)
    numbers = torch.where(scales[:, :, None] == 0, 0, numbers)
    halves = (numbers - _LEAST).to(torch.uint8)
    half = _GROUP // 2
    data = halves[:, :, :half] | (halves[:, :, half:] << 4)
    return Stored(data.reshape(rows, -1), scales)


def _unpack(stored: Stored, width: int, dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    assert stored.scales is not None
    rows, n_groups = stored.scales.shape
    data = stored.data.view(rows, n_groups, _GROUP // 2)
    numbers = torch.cat([data & 15, data >> 4], dim=2).to(dtype) + _LEAST
    return (numbers * stored.scales.to(dtype)[:, :, None]).view(rows, -1)[:, :width]


INT4 = Format(
    name="int4",
    bits=4,
    torch_name="uint8",
    stored_name="U8",
    triton="u8",
    cpp="Int4",
    pack=_pack,
    unpack=_unpack,
    group=_GROUP,
    scale_name="float16",
)
