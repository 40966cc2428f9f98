"""Rows of a matrix in another order, in place and in bounded memory."""

import torch

_CHUNK_BYTES = 2**26


def permute_rows_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Let row i of `matrix` be what its row `order[i]` was, in its own storage.

    matrix `[rows, columns]`, order int64 `[rows]`, a permutation on the same device. Goes
    through the matrix by blocks of columns: beside one block's copy (64 MiB, or one column if
    that is more) nothing is allocated.
    """
    rows, columns = matrix.shape
    width = max(1, _CHUNK_BYTES // (rows * matrix.element_size()))
    for start in range(0, columns, width):
        block = matrix[:, start : start + width]
        block.copy_(block.index_select(0, order))
