"""An epilogue: what is done with the candidates' logits.

Usage:
    out = new_out(problem, device)
    epilogue_of(problem.epilogue).tokens_of(out)      # each row's best token
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from flashtune.tuning_db.problem import EPILOGUES, Problem

if TYPE_CHECKING:
    import torch

# Of every token that is no candidate. Finite: with -inf or a dtype's minimum, serving engines that
# mask logits of their own end up with nothing but illegal tokens, and take token 0.
FILL = -1e4


class FirstLaunch(Protocol):
    """What an epilogue may know about the launch that fills its output."""

    @property
    def programs(self) -> int:
        """How many programs it has."""

    @property
    def warps(self) -> int:
        """Warps of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epilogue:
    """The output of a step, for a problem.

    shape, dtype: of the output, the dtype as torch names it. poison: what no step may leave there.
    written_bytes: how many bytes of it are written, at least.
    combine: writes the output of candidates, from ids and float32 logits `[n_tokens, rows]` each.
    best_only: whether nothing but the best candidate shows in the output.
    tokens_of: each row's best token `[n_tokens]`, from the output.
    why_wrong: None if one token's output is right, else why not; `judge` and `clusters` are those
    of measure/judge.py.
    values: further values for templates, given the first launch.
    """

    name: str
    shape: Callable[[Problem], tuple[int, ...]]
    dtype: Callable[[Problem], str]
    poison: float
    written_bytes: Callable[[Problem], int]
    combine: Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
    best_only: bool
    tokens_of: Callable[["torch.Tensor"], "torch.Tensor"]
    why_wrong: Callable[[Any, "torch.Tensor", "torch.Tensor", Any], str | None]
    values: Callable[[Problem, FirstLaunch], Mapping[str, int]]


def epilogue_of(name: str) -> Epilogue:
    """The epilogue of that name; raises FlashtuneError if there is none."""
    return cast(Epilogue, EPILOGUES[name])


def new_out(problem: Problem, device: "torch.device") -> "torch.Tensor":
    """An empty tensor for the output of a step: token ids or logits."""
    import torch

    epilogue = epilogue_of(problem.epilogue)
    dtype: torch.dtype = getattr(torch, epilogue.dtype(problem))
    return torch.empty(epilogue.shape(problem), dtype=dtype, device=device)


def poisoned_out(problem: Problem, device: "torch.device") -> "torch.Tensor":
    """`new_out` filled with the poison, which no step may leave there."""
    return new_out(problem, device).fill_(epilogue_of(problem.epilogue).poison)
