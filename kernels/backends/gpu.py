"""What all backends for GPUs share: steps whose launches are prepared once.

A launch's arguments are cells. The cells for weights and scratch are filled when a step first
sees the weights, those for hidden states and output at each call, so a call costs the host
little more than the launches themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from flashtune.kernels.weights import Weights


class Cell(Protocol):
    """Holds the value of a launch argument."""

    value: Any


Run = Callable[[int], None]
"""Launches a kernel on a stream."""
Prepare = Callable[[Sequence[Any]], Run]
"""From cells for a kernel's arguments to what launches it with the values that they then hold."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One of a step's kernels: its name, what prepares it, and its arguments by name.

    The names are those of the fields of Weights and of the step's scratch, `hidden` and `out`,
    and `last`, the index of the last row of hidden.
    """

    kernel: str
    prepare: Prepare
    arguments: tuple[str, ...]


class LaunchedStep:
    """A candidate ready to run: `step(weights, hidden, out)` launches it on the current stream.

    hidden `[rows, hidden]`, contiguous and 16-byte aligned, with as many rows as the problem has
    tokens, or fewer: its last row is then repeated. out: as `new_out` makes it. Calls share one
    scratch: calls that may run at the same time need separate steps.
    """

    launches: Sequence[Launch]
    scratch: Any  # a dataclass whose fields are tensors

    def __init__(self) -> None:
        """Nothing is prepared before the first call."""
        self._weights: Weights | None = None
        self._runs: Sequence[Run] = ()
        self._hidden, self._out = self._pointer(), self._pointer()
        self._last = self._number()

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Launch the step; `out` is complete when the stream gets there."""
        if self._weights is not weights:
            self._runs = self._prepared(self.launches, weights)
            self._weights = weights
        self._run(self._runs, hidden, out)

    def launch(
        self,
        launches: Sequence[Launch],
        weights: Weights,
        hidden: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch some of the kernels, in this order."""
        self._run(self._prepared(launches, weights), hidden, out)

    def _run(self, runs: Sequence[Run], hidden: torch.Tensor, out: torch.Tensor) -> None:
        value = self._value
        self._hidden.value, self._out.value = value(hidden), value(out)
        self._last.value = hidden.shape[0] - 1
        stream = self._stream()
        for run in runs:
            run(stream)

    def _prepared(self, launches: Sequence[Launch], weights: Weights) -> list[Run]:
        cells = {"hidden": self._hidden, "out": self._out, "last": self._last}
        for name, tensor in {**_tensors(weights), **_tensors(self.scratch)}.items():
            cells[name] = self._pointer()
            cells[name].value = self._value(tensor)
        return [launch.prepare([cells[name] for name in launch.arguments]) for launch in launches]

    def _pointer(self) -> Cell:
        """A cell for a tensor."""
        raise NotImplementedError

    def _number(self) -> Cell:
        """A cell for an int32."""
        raise NotImplementedError

    def _value(self, tensor: torch.Tensor) -> Any:
        """The launch argument for a tensor."""
        raise NotImplementedError

    def _stream(self) -> int:
        """The current stream of the step's device."""
        raise NotImplementedError


def _tensors(parts: Any) -> Mapping[str, torch.Tensor]:
    """The fields of a dataclass that hold tensors."""
    found = {each.name: getattr(parts, each.name) for each in fields(parts)}
    return {name: value for name, value in found.items() if value is not None}
