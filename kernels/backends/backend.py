"""What turns a candidate into something that runs: one interface, a folder for each way to do so.

Usage:
    backend = backend_of(candidate)                           # kernels/backends/target.py
    backend.compile(candidate)                                # no device needed, in any process
    load = backend.loader(candidate, torch.device("cuda"))
    step = load()                                             # with scratch of its own
    step(weights, hidden, out)
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step


class Backend(Protocol):
    """Compiles and loads the candidates of some plans."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        """Compile into the compiler's own cache, and report what the kernels need.

        source: the candidate's, if it was rendered elsewhere. Needs no device. Raises
        DoesNotFitError; lets the compiler's exceptions through.
        """

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads a step with scratch of its own.

        source: the candidate's, if it was rendered elsewhere.
        """
