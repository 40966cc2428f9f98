"""A format for comparison: six bits per weight with scales per 16, much like llama.cpp's Q6_K.

Numbers from -32 to 31 in blocks of 16, an 8-bit integer as the scale of each block, and a float16
for every 256 weights, of which those scales are multiples: 6.5625 bits per weight. Only the
rounding is here, to compare qualities; nothing is packed. llama.cpp also looks for the scale with
the least error; here the largest magnitude of a block gives it.
"""

import torch
from torch.nn.functional import pad

NAME = "q6_k"
_BLOCK, _BLOCKS = 16, 16  # weights in a block, blocks in a super-block
_LEAST, _MOST = -32, 31
_SUPER_BYTES = _BLOCK * _BLOCKS * 6 // 8 + _BLOCKS + 2


def bytes_of(rows: int, width: int) -> int:
    """Bytes of a matrix `[rows, width]`, each row padded to whole blocks."""
    blocks = -(-width // _BLOCK)
    return rows * blocks * _SUPER_BYTES // _BLOCKS


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight `[rows, width]` after rounding, in float32."""
    rows, width = weight.shape
    filled = pad(weight.float(), (0, -width % (_BLOCK * _BLOCKS)))
    blocks = filled.view(rows, -1, _BLOCKS, _BLOCK)
    least, most = blocks.amin(dim=3), blocks.amax(dim=3)
    # The extreme of larger magnitude becomes -32, which is farther from 0 than 31.
    scales = torch.where(-least > most, least, most) / _LEAST
    steps = (scales.abs().amax(dim=2, keepdim=True) / 127).half().float()
    steps = steps.clamp(min=torch.finfo(torch.float32).tiny)
    scales = (scales / steps).round().clamp(-128, 127) * steps
    divisors = torch.where(scales == 0, 1.0, scales)[..., None]
    numbers = (blocks / divisors).round().clamp(_LEAST, _MOST)
    return (numbers * scales[..., None]).view(rows, -1)[:, :width]
