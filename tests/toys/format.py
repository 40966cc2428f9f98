"""The format `ternary`: -1, 0 or 1, times a float32 scale for all of a row."""

import torch

from flashtune.kernels.formats.format import Format, Stored


def _pack(weight: torch.Tensor) -> Stored:
    rows = weight.float()
    scales = rows.abs().mean(dim=1)
    return Stored((rows / scales.clamp(min=1e-30)[:, None]).round().clamp(-1, 1).char(), scales)


def _unpack(stored: Stored, width: int, dtype: torch.dtype) -> torch.Tensor:
    assert stored.scales is not None
    return stored.data.to(dtype) * stored.scales.to(dtype)[:, None]


TERNARY = Format(
    name="ternary",
    bits=8,
    torch_name="int8",
    stored_name="I8",
    triton="",
    cpp="",
    pack=_pack,
    unpack=_unpack,
    scale_name="float32",
)
