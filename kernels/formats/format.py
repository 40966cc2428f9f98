"""A number format: how a matrix of weights is stored, and what each language calls that.

Usage:
    format_of("bf16").torch_dtype
    format_named(tensor.dtype)           # the format of plain numbers in this dtype, or None
    stored = format_of(problem.weight_dtype).pack(weight)
    stored.data, stored.scales

A format of plain numbers is stored unchanged. A quantised one has scales: the matrix is `data`, of
small whole numbers, times the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import FORMATS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix as a format stores it; `scales` is None for plain numbers."""

    data: "torch.Tensor"
    scales: "torch.Tensor | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format. `bits` are those of one weight.

    torch_name: the dtype that the data is stored in, as torch spells it; stored_name: as
    safetensors does. triton, cpp: what the data's type is called in templates of that language,
    empty where these have no such format. group: how many weights of a row share a scale, 0 for
    all of it; scale_name: the scales' dtype, empty for plain numbers.
    pack: from float numbers `[rows, width]`; unpack: dequantises the result of `pack`, for that
    width, computed in a dtype.
    """

    name: str
    bits: int
    torch_name: str
    stored_name: str
    triton: str
    cpp: str
    pack: Callable[["torch.Tensor"], Stored]
    unpack: Callable[[Stored, int, "torch.dtype"], "torch.Tensor"]
    group: int = 0
    scale_name: str = ""

    @property
    def quantised(self) -> bool:
        """Whether it has scales."""
        return bool(self.scale_name)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype that the data is stored in."""
        return _dtype(self.torch_name)

    @property
    def scale_dtype(self) -> "torch.dtype | None":
        """The dtype of its scales, if it has any."""
        return _dtype(self.scale_name) if self.scale_name else None

    def steps(self, scales: "torch.Tensor", width: int) -> "torch.Tensor":
        """How far apart the numbers are that each weight may stand for: `[rows, width]`, or
        `[rows, 1]` where all of a row share a scale.
        """
        if not self.group:
            return scales.float()[:, None]
        return scales.float().repeat_interleave(self.group, dim=1)[:, :width]

    def bytes_of(self, rows: int, width: int) -> int:
        """Bytes of a matrix `[rows, width]`, scales included."""
        return rows * self.row_bytes(width)

    def row_bytes(self, width: int) -> int:
        """Bytes of one row, including scales; a partly filled group counts in full."""
        if not self.quantised:
            return width * self.bits // 8
        groups = -(-width // self.group) if self.group else 1
        padded = groups * self.group if self.group else width
        return padded * self.bits // 8 + groups * _dtype(self.scale_name).itemsize


def format_of(name: str) -> Format:
    """The format of that name; raises FlashtuneError if there is none."""
    return cast(Format, FORMATS[name])


def format_named(dtype: "torch.dtype") -> Format | None:
    """The format of plain numbers in a torch dtype."""
    known = (cast(Format, each) for each in FORMATS.values())
    return next((f for f in known if not f.quantised and f.torch_dtype is dtype), None)


def dtype_name(tensor: "torch.Tensor") -> str:
    """A tensor's dtype by its name in problems; raises FlashtuneError without such a format."""
    found = format_named(tensor.dtype)
    if found is None:
        raise FlashtuneError(f"there is no format for {tensor.dtype}")
    return found.name


def plain_formats() -> list[Format]:
    """The formats of plain numbers."""
    return [cast(Format, each) for each in FORMATS.values() if not cast(Format, each).quantised]


def plain(name: str, bits: int, torch_name: str, stored_name: str, cpp: str) -> Format:
    """A format of plain numbers, which Triton calls as we do."""

    def pack(weight: "torch.Tensor") -> Stored:
        return Stored(weight.to(_dtype(torch_name)))

    return Format(
        name=name,
        bits=bits,
        torch_name=torch_name,
        stored_name=stored_name,
        triton=name,
        cpp=cpp,
        pack=pack,
        unpack=lambda stored, width, dtype: stored.data.to(dtype),
    )


def _dtype(name: str) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, name)
    return found
