"""A head's weight that a checkpoint stores in 8 bits: whole numbers or fp8, times scales.

Usage:
    scales = find_scales(stored, "lm_head.weight")    # Scales, or FlashtuneError in one line
    scales.times(weight, dtype)                       # dequantised

A format is plain where the weight is a matrix `[vocab, hidden]` of int8 or fp8 numbers, and one
tensor beside it has a scale for all of them, for each row, or for each block of rows and columns.
Anything else needs the code that wrote it, and is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch

from flashtune.tuning_db.errors import FlashtuneError

QUANTISED = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
# What is beside `lm_head.weight` under these names is multiplied with, in spite of `inv`.
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "weight_scales", "scale", "SCB")
_SCB_UNIT = 127.0  # of bitsandbytes, whose scales are the rows' largest magnitudes
_OTHER = ("weight_zero_point", "zeros", "weight_scale_2", "absmax", "g_idx")
# Names under which heads are stored that have no tensor called weight, or no matrix in it
PACKED = ("qweight", "weight_packed", "qzeros", "weight_quantized")
_ROWS_AT_ONCE = 2**12
CURE = "load the model in 16 bits and save it with an unquantised head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """A tensor of scales: its name, and the numbers of rows and columns that one is for.

    unit: what the scales are divided by.
    """

    name: str
    rows: int
    columns: int
    unit: float = 1.0

    def times(
        self, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A weight `[vocab, hidden]`, dequantised a few rows at a time."""
        wide = scales.float().view(-(-weight.shape[0] // self.rows), -1) / self.unit
        hidden = weight.shape[1]
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for first in range(0, len(weight), _ROWS_AT_ONCE):
            part = slice(first, min(first + _ROWS_AT_ONCE, len(weight)))
            own = torch.arange(part.start, part.stop, device=weight.device) // self.rows
            each = wide[own].repeat_interleave(self.columns, dim=1)[:, :hidden]
            out[part] = weight[part].float() * each
        return out


def find_scales(
    shapes: dict[str, list[int]], weight: str, kind: str, block: tuple[Any, ...] | None
) -> Scales:
    """The scales of a tensor `[vocab, hidden]`, by the names and shapes of what lies beside it.

    kind: how the weight's numbers are called in messages. block: rows and columns that share a
    scale, as the model's config says. Raises FlashtuneError if the format is not plain.
    """
    stem = weight.removesuffix("weight")
    other = next((stem + name for name in _OTHER if stem + name in shapes), None)
    if other is not None:
        raise FlashtuneError(f"{weight} is {kind} with {other}, which is not supported: {CURE}")
    found = [name for name in _SCALES if stem + name in shapes]
    if len(found) != 1:
        beside = " and ".join(stem + name for name in found) or "no scales"
        raise FlashtuneError(
            f"{weight} is {kind} with {beside} beside it, not one of "
            f"{', '.join(stem + name for name in _SCALES)}: {CURE}"
        )
    name = stem + found[0]
    vocab_size, hidden = shapes[weight]
    shape = shapes[name]
    unit = _SCB_UNIT if found[0] == "SCB" else 1.0
    if all(size == 1 for size in shape):
        return Scales(name=name, rows=vocab_size, columns=hidden, unit=unit)
    if shape in ([vocab_size], [vocab_size, 1]):
        return Scales(name=name, rows=1, columns=hidden, unit=unit)
    whole = block is not None and [type(size) for size in block] == [int, int] and min(block) > 0
    if block and whole and shape == [-(-vocab_size // block[0]), -(-hidden // block[1])]:
        return Scales(name=name, rows=block[0], columns=block[1], unit=unit)
    raise FlashtuneError(
        f"{weight} is {kind} of shape {shapes[weight]} with {name} of shape {shape}, which is "
        f"neither one scale, nor one a row, nor one for each block that the config names: {CURE}"
    )
