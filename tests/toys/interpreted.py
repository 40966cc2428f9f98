"""Steps of Triton kernels that Triton's interpreter runs on CPU tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from flashtune.kernels.backends.gpu import LaunchedStep, Run
from flashtune.kernels.backends.triton.backend import launches_of, load_source, scratch_of
from flashtune.kernels.plans.candidate import Candidate

# What kernels do in inline assembly, which the interpreter has not, for rows of int4.
HALVES = """

@triton.jit
def lower_halves(pairs):
    return ((pairs << 4) ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def upper_halves(pairs):
    return ((pairs & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
"""


class TensorCell:
    """Holds a tensor or a number."""

    value: Any = None


class InterpretedStep(LaunchedStep):
    """Launches a candidate's jit functions themselves: nothing is compiled."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        module, cpu = load_source(candidate.source + HALVES), torch.device("cpu")
        self.scratch = scratch_of(candidate.problem, module, cpu)

        def prepare(launch: dict[str, Any]) -> Any:
            function = getattr(module, launch["kernel"])[(launch["programs"], 1, 1)]

            def prepared(cells: Sequence[TensorCell]) -> Run:
                return lambda _: function(*[cell.value for cell in cells])

            return prepared

        self.launches = launches_of(module, self.scratch, prepare)

    def _pointer(self) -> TensorCell:
        return TensorCell()

    _number = _pointer

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _stream(self) -> int:
        return 0
