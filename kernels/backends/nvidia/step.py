"""A step that NVIDIA's driver launches, whatever compiled its kernels."""

import ctypes

import torch

from flashtune.kernels.backends.gpu import LaunchedStep


class DriverStep(LaunchedStep):
    """The launches' `prepare` is that of a Binary's kernels (see driver.py)."""

    def __init__(self, device: torch.device) -> None:
        """For this device, or the current one where it has no index."""
        super().__init__()
        self.index = index_of(device)

    def _pointer(self) -> ctypes.c_uint64:
        return ctypes.c_uint64()

    def _number(self) -> ctypes.c_int32:
        return ctypes.c_int32()

    def _value(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.index)


def index_of(device: torch.device) -> int:
    """The number of a GPU: of the current one where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index
