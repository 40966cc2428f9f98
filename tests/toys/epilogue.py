"""The epilogue `best_logit`: the logit of each hidden state's best token, float32 `[n_tokens]`."""

from typing import Any

import torch

from flashtune.kernels.epilogues.epilogue import Epilogue


def _combine(ids: torch.Tensor, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(logits.max(dim=1).values)


def _why_wrong(judge: Any, found: torch.Tensor, state: torch.Tensor, clusters: Any) -> str | None:
    """It must not be below the best of the rows that must be probed, nor above all others'."""
    size = judge.problem.cluster_size
    ends = []
    for which in (clusters.must, clusters.possible):
        first = which.nonzero()[:, 0] * size
        rows = (first[:, None] + torch.arange(size, device=first.device)).flatten()
        logits, bounds = judge.logits(rows, state)
        ends.append((logits.max() - bounds.max(), logits.max() + bounds.max()))
    if ends[0][0] <= found <= ends[1][1]:
        return None
    return f"{float(found):.6g} is not the best logit"


BEST_LOGIT = Epilogue(
    name="best_logit",
    shape=lambda problem: (problem.n_tokens,),
    dtype=lambda problem: "float32",
    poison=float("nan"),
    written_bytes=lambda problem: 4 * problem.n_tokens,
    combine=_combine,
    best_only=True,
    tokens_of=lambda out: out,
    why_wrong=_why_wrong,
    values=lambda problem, first: {},
)
