"""Huge pages for large tensors: a decode step reads far more memory than a TLB covers.

Usage:
    advise(weight)      # a hint to the kernel; the tensor does not change
"""

import ctypes
import functools
import sys
from typing import Any

import torch

_PAGE = 2**21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux; the second since 6.1


def advise(tensor: torch.Tensor) -> None:
    """Ask the kernel to back the tensor's memory with huge pages, as far as it fills them.

    Takes about as long as a copy the first time. If the system can't or won't, nothing happens.
    """
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _PAGE * _PAGE
    madvise = _madvise()
    if madvise is not None and end > start:
        madvise(start, end - start, _MADV_HUGEPAGE)
        madvise(start, end - start, _MADV_COLLAPSE)


@functools.cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
