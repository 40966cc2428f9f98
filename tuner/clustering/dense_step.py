"""The dense head as a step, plain and quantised, with torch's own matrix products.

Usage:
    step = dense_step("int8", weight)     # None if torch has none for it here
    step(weights, hidden, out)            # like any step; it has its own weights
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import linear

from flashtune.kernels.formats.format import dtype_name, format_of
from flashtune.kernels.formats.int4 import INT4
from flashtune.kernels.weights import Step, Weights

_ROWS_AT_ONCE = 2**14
_WIDTHS = 32  # of quantised products are multiples of this
_Product = Callable[[torch.Tensor], torch.Tensor]


def dense_step(rows: str, weight: torch.Tensor) -> Step | None:
    """A product with all of the weight `[vocab, hidden]`, its rows in a format, then argmax.

    None if torch has no product of that format for this device or shape.
    """
    makers = {"int8": _int8, "int4": _int4, dtype_name(weight): _plain}
    if rows not in makers or (rows != dtype_name(weight) and weight.shape[1] % _WIDTHS):
        return None
    try:
        product = makers[rows](weight)
        product(torch.zeros_like(weight[:1]))
    except (AttributeError, RuntimeError, NotImplementedError):  # private torch operators
        return None

    def step(_: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        torch.argmax(product(hidden), dim=-1, out=out)

    return step


def _plain(weight: torch.Tensor) -> _Product:
    return lambda hidden: linear(hidden, weight)


def _int8(weight: torch.Tensor) -> _Product:
    kept = format_of("int8")
    parts = [kept.pack(part) for part in torch.split(weight, _ROWS_AT_ONCE)]
    data = torch.cat([part.data for part in parts])
    scales = torch.cat([part.scales for part in parts if part.scales is not None])
    scales = scales.to(weight.dtype)
    # A copy, which is aligned: on an unaligned hidden state torch's operator may crash the process
    return lambda hidden: torch._weight_int8pack_mm(hidden.clone(), data, scales)


def _int4(weight: torch.Tensor) -> _Product:
    """One scale for every 32 weights; torch has this layout for CPUs only."""
    width = weight.shape[1]
    numbers, scales = [], []
    for part in torch.split(weight, _ROWS_AT_ONCE):
        stored = INT4.pack(part)
        assert stored.scales is not None
        ones = replace(stored, scales=torch.ones_like(stored.scales))
        numbers.append(INT4.unpack(ones, width, torch.float32).to(torch.int32) + 8)
        scales.append(stored.scales.to(weight.dtype))
    data = torch._convert_weight_to_int4pack_for_cpu(torch.cat(numbers), 1)
    steps = torch.cat(scales).T
    scales_and_zeros = torch.stack([steps, torch.zeros_like(steps)], dim=2).contiguous()
    return lambda hidden: torch._weight_int4pack_mm_for_cpu(
        hidden.clone(), data, INT4.group, scales_and_zeros
    )
