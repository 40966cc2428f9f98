"""A step that is launched through NVIDIA's driver, whatever compiled its kernels."""

import ctypes
from collections.abc import Sequence

import torch

from flashtune.kernels.backends.gpu import LaunchedStep, Run
from flashtune.kernels.backends.nvidia.driver import Binary, recorded
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.errors import FlashtuneError

# A decode loop passes tensors at the same addresses again and again, since torch's allocator
# reuses memory. After a few calls with the same addresses the launches are recorded, and later
# calls launch all kernels at once.
_SEEN_BEFORE = 2
_MOST_SEEN = 32  # places at a time
_MOST_GRAPHS = 8  # graphs that are kept, the latest ones
_MOST_RECORDED = 256  # in a step's life: if addresses always change, recording gains nothing

_Place = tuple[int, int, int]  # of hidden states and output, and the number of the last row


class DriverStep(LaunchedStep):
    """The launches' `prepare` is that of a Binary's kernels (see driver.py).

    Calls with tensors at the same places are recorded in a CUDA graph of the step's own, which
    costs the host one launch instead of several. While others capture, kernels are launched one by
    one, and become part of their graph.
    """

    recordable = True  # whether all of the launches are kernels of ours
    binaries: Sequence[Binary] = ()  # of its kernels, which other steps may share

    def __init__(self, device: torch.device) -> None:
        """For this device, or the current one where it has no index."""
        super().__init__()
        self.index = index_of(device)
        self._seen: dict[_Place, int] = {}
        self._graphs: dict[_Place, Run] = {}
        self._recorded = 0

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Launch the step; `out` is complete when the stream gets there."""
        if self._weights is weights:
            place = (hidden.data_ptr(), out.data_ptr(), hidden.shape[0] - 1)
            graph = self._graphs.get(place)
            if graph is not None and not torch.cuda.is_current_stream_capturing():
                graph(torch._C._cuda_getCurrentRawStream(self.index))
                return
            super().__call__(weights, hidden, out)
            if graph is None and self.recordable:
                self._look_at(place)
        else:
            super().__call__(weights, hidden, out)
            self._seen.clear()
            self._graphs.clear()

    def unload(self) -> None:
        """Unload its kernels, and those of the steps that share them: none is called again."""
        self._runs, self._weights = (), None
        self._seen.clear()
        self._graphs.clear()
        for binary in self.binaries:
            binary.unload()

    def _look_at(self, place: _Place) -> None:
        """Record the launches with what their cells hold, if these addresses came before."""
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        seen = self._seen[place] = self._seen.get(place, 0) + 1
        if seen <= _SEEN_BEFORE or torch.cuda.is_current_stream_capturing():
            return
        del self._seen[place]
        self._recorded += 1
        try:
            self._graphs[place] = recorded(self._runs, self.index)
        except (FlashtuneError, AttributeError):  # of a driver that is too old for it
            self.recordable = False
        else:
            self.recordable = self._recorded < _MOST_RECORDED
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def _pointer(self) -> ctypes.c_uint64:
        return ctypes.c_uint64()

    def _number(self) -> ctypes.c_int32:
        return ctypes.c_int32()

    def _value(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.index)


def index_of(device: torch.device) -> int:
    """The index of a GPU: the current one's if the device has none."""
    return torch.cuda.current_device() if device.index is None else device.index
