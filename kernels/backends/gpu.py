"""What all backends for GPUs share: steps that launch kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from flashtune.kernels.weights import Weights


@dataclass(frozen=True, slots=True)
class Launch:
    """One of a step's kernels: its name, what launches it, and its arguments by name.

    The names are those of the fields of Weights and of the step's scratch, `hidden` and `out`.
    """

    kernel: str
    run: Callable[..., None]
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """A launch whose arguments are all there but for a call's own, and where those go."""

    run: Callable[..., None]
    values: list[Any]
    hidden_at: tuple[int, ...]
    out_at: tuple[int, ...]


class LaunchedStep:
    """A candidate ready to run: `step(weights, hidden, out)` launches it on the current stream.

    hidden `[n_tokens, hidden]`, contiguous and 16-byte aligned; out as `new_out` makes it. Calls
    share one scratch: those that may run at the same time need a step each.
    """

    launches: Sequence[Launch]
    scratch: Any  # a dataclass whose fields are tensors
    _prepared: tuple[Weights, Sequence[_Call]] | None = None

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Launch the step; `out` is complete when the stream gets there."""
        prepared = self._prepared
        if prepared is None or prepared[0] is not weights:
            prepared = self._prepared = (weights, self._calls(self.launches, weights))
        self._run(prepared[1], hidden, out)

    def launch(
        self,
        launches: Sequence[Launch],
        weights: Weights,
        hidden: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch some of the kernels, in this order."""
        self._run(self._calls(launches, weights), hidden, out)

    def _calls(self, launches: Sequence[Launch], weights: Weights) -> list[_Call]:
        known = {
            name: self._value(tensor)
            for name, tensor in {**_tensors(weights), **_tensors(self.scratch)}.items()
        }
        return [
            _Call(
                launch.run,
                [known.get(name) for name in launch.arguments],
                tuple(i for i, name in enumerate(launch.arguments) if name == "hidden"),
                tuple(i for i, name in enumerate(launch.arguments) if name == "out"),
            )
            for launch in launches
        ]

    def _run(self, calls: Sequence[_Call], hidden: torch.Tensor, out: torch.Tensor) -> None:
        state, result = self._value(hidden), self._value(out)
        for call in calls:
            values = call.values.copy()
            for place in call.hidden_at:
                values[place] = state
            for place in call.out_at:
                values[place] = result
            call.run(*values)

    def _value(self, tensor: torch.Tensor) -> Any:
        """What a launch is given for a tensor."""
        return tensor


def _tensors(parts: Any) -> Mapping[str, torch.Tensor]:
    """The fields of a dataclass that hold tensors."""
    found = {each.name: getattr(parts, each.name) for each in fields(parts)}
    return {name: value for name, value in found.items() if value is not None}
