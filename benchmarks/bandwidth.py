"""This GPU's read bandwidth: the rate from which byte floors are computed."""

import statistics

import torch
import triton
import triton.language as tl

TILE = tl.constexpr(8192)
BYTES = 2**32


@triton.jit
def read(source_ptr, sums_ptr):
    """Sum one tile of int32, so that every byte has to be read."""
    tile = tl.program_id(0).to(tl.int64)
    values = tl.load(source_ptr + tile * TILE + tl.arange(0, TILE), eviction_policy="evict_first")
    tl.store(sums_ptr + tile, tl.sum(values, axis=0))


def read_bandwidth(repeats: int = 10) -> float:
    """Bytes per second: the median of reading 4 GiB of random int32 several times."""
    source = torch.randint(-(2**31), 2**31 - 1, (BYTES // 4,), dtype=torch.int32, device="cuda")
    tiles = source.numel() // TILE.value
    sums = torch.empty(tiles, dtype=torch.int32, device="cuda")
    seconds = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read[(tiles,)](source, sums, num_warps=8)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return BYTES / statistics.median(seconds[2:])
