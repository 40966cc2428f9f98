"""What all backends for GPUs share: steps that launch kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashtune.kernels.weights import Weights

Launches = Sequence[tuple[str, Callable[..., None]]]


class LaunchedStep:
    """A candidate ready to run: `step(weights, hidden, out)` launches it on the current stream.

    hidden `[n_tokens, hidden]`, contiguous and 16-byte aligned; out as `new_out` makes it. Calls
    share one scratch: those that may run at the same time need a step each. `launches` are its
    kernels' names and launchers, which `launch` calls one by one.
    """

    launches: Launches

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Launch the step; `out` is complete when the stream gets there."""
        self.launch(self.launches, weights, hidden, out)

    def launch(
        self, launches: Launches, weights: Weights, hidden: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Launch some of the kernels, in this order."""
        tensors = (hidden, weights.centroids, weights.weight, weights.ids, out)
        arguments = self._arguments(tensors)
        for _, launch in launches:
            launch(*arguments)

    def _arguments(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """What every kernel is given: these tensors, and the step's scratch."""
        raise NotImplementedError
