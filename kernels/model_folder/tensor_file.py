"""Safetensors files, with a one-line error for anything wrong with them.

Usage:
    with open_tensors(path) as tensors:
        tensors.keys(), tensors.metadata(), tensors.get_tensor("centroids")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import check_file


@contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[Any]:
    """The file, opened; its tensors are read onto `device`.

    Raises FlashtuneError if a file is absent, unreadable or truncated, even if that shows only
    when a tensor is read.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt", device=device) as tensors:
            yield tensors
    except OSError as error:
        raise FlashtuneError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FlashtuneError(
            f"{path}: is not a complete safetensors file ({error}): download it again"
        ) from error


def shape_of(tensors: Any, name: str) -> list[int]:
    """A tensor's shape, from the file's header."""
    return list(tensors.get_slice(name).get_shape())


def dtype_of(tensors: Any, name: str) -> str:
    """A tensor's dtype as safetensors spells it: BF16, F16, F32, …"""
    return str(tensors.get_slice(name).get_dtype())
