"""The C++ backend: CPUs, through the machine's own compiler.

Usage:
    step = CppStep(load_library(source, arch, simd), problem)
    step(weights, hidden, out)        # done when it returns
"""

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence

import torch

from flashtune.kernels.backends.cpp.compiler import build_library, load_library
from flashtune.kernels.backends.cpp.huge_pages import advise
from flashtune.kernels.backends.torch import TorchStep
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step, Weights, filled_up
from flashtune.tuning_db.problem import Problem


class CppStep:
    """A candidate ready to run, with scratch and threads of its own.

    hidden `[n_tokens, hidden]`, contiguous; out as `new_out` makes it, complete on return. The
    threads start with the first call and sleep between calls. One call at a time.
    """

    def __init__(self, library: ctypes.CDLL, problem: Problem) -> None:
        """Raises MemoryError if there is not enough for the scratch."""
        formats = format_of(problem.weight_dtype), format_of(problem.centroid_dtype)
        self._quantised = any(each.quantised for each in formats)
        self._problem = problem
        library.flashtune_open.restype = ctypes.c_void_p
        library.flashtune_close.argtypes = (ctypes.c_void_p,)
        library.flashtune_decode.argtypes = (ctypes.c_void_p,) * (9 if self._quantised else 6)
        library.flashtune_decode.restype = None
        self._handle = library.flashtune_open()
        if not self._handle:
            raise MemoryError("not enough memory for the scratch buffers of a decode step")
        self._decode = library.flashtune_decode
        self._advised: set[tuple[int, int]] = set()
        weakref.finalize(self, library.flashtune_close, self._handle)

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Run the step; states that are not finite go to plain torch, which answers with NaN."""
        if not math.isfinite(hidden.sum(dtype=torch.float32).item()):
            TorchStep(self._problem)(weights, hidden, out)
            return
        hidden = filled_up(hidden, out.shape[0])
        place = (weights.centroids.data_ptr(), weights.weight.data_ptr())
        if place not in self._advised:
            self._advised.add(place)
            advise(weights.centroids)
            advise(weights.weight)
        pointers = [self._handle, *place]
        pointers += [each.data_ptr() for each in (weights.ids, hidden, out)]
        if self._quantised:
            beside = (weights.centroid_scales, weights.weight_scales, weights.model_weight)
            pointers += [None if each is None else each.data_ptr() for each in beside]
        self._decode(*pointers)


class CppBackend:
    """CPUs, through C++."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        """Compile into the cache; what the code needs is not reported for CPUs."""
        build_library(source or candidate.source, candidate.device.arch, candidate.config.simd)
        return ()

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        """Compile; each call of the result makes a step with scratch and threads of its own."""
        arch, simd = candidate.device.arch, candidate.config.simd
        library = load_library(source or candidate.source, arch, simd)
        return lambda: CppStep(library, candidate.problem)
