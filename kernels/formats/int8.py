"""The format `int8`: whole numbers from -127 to 127, times a float32 scale for each row."""

from typing import TYPE_CHECKING

from flashtune.kernels.formats.format import Format, Stored

if TYPE_CHECKING:
    import torch

_MOST = 127


def _pack(weight: "torch.Tensor") -> Stored:
    """The largest magnitude of each row becomes 127; a row of zeros has the scale 0."""
    import torch

    rows = weight.float()
    scales = rows.abs().amax(dim=1) / _MOST
    numbers = torch.round(rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    return Stored(numbers.clamp(-_MOST, _MOST).to(torch.int8), scales)


def _unpack(stored: Stored, width: int, dtype: "torch.dtype") -> "torch.Tensor":
    assert stored.scales is not None
    return stored.data.to(dtype) * stored.scales.to(dtype)[:, None]


INT8 = Format(
    name="int8",
    bits=8,
    torch_name="int8",
    stored_name="I8",
    triton="i8",
    cpp="Int8",
    pack=_pack,
    unpack=_unpack,
    scale_name="float32",
)
