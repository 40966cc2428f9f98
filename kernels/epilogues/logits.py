"""The epilogue `logits`: each candidate's logit at its id, and `FILL` for all other tokens.

The output is `[n_tokens, vocab]` in the dtype of the model.
"""

import math
from typing import TYPE_CHECKING, Any

from flashtune.kernels.epilogues.epilogue import FILL, Epilogue, FirstLaunch
from flashtune.kernels.formats.format import format_of
from flashtune.tuning_db.problem import Problem

if TYPE_CHECKING:
    import torch

_LINE = 64  # elements of 16 bits that a line of 128 bytes holds


def _combine(ids: "torch.Tensor", logits: "torch.Tensor", out: "torch.Tensor") -> "torch.Tensor":
    """The logits at their ids; if all are NaN, the whole row is, like a dense head's."""
    import torch

    fill = torch.where(logits.isnan().all(dim=1, keepdim=True), math.nan, FILL)
    out.copy_(fill.expand(out.shape))
    return out.scatter_(1, ids.long(), logits.to(out.dtype))


def _why_wrong(
    judge: Any, found: "torch.Tensor", state: "torch.Tensor", clusters: Any
) -> str | None:
    """Each cluster is complete or absent, and those that must be probed are present."""
    import torch

    weights = judge.weights
    ids = weights.ids.long().view(len(weights.centroids), -1)
    must, possible = clusters.must, clusters.possible
    filled = found[ids] == torch.tensor(FILL, dtype=found.dtype)
    astray = ~possible[:, None] & ~filled
    if bool(astray.any()):
        cluster, member = astray.nonzero()[0].tolist()
        return (
            f"token {int(ids[cluster, member])} in the cluster ranked {clusters.rank(cluster)}, "
            f"outside {judge.n_probes} probes, is not filled"
        )
    own, bound, sure = judge.screened(possible, must, state)
    least, most = (own - bound).to(found.dtype), (own + bound).to(found.dtype)
    candidates = found[ids[possible]].flatten()
    right = (least <= candidates) & (candidates <= most)
    if judge.problem.n_rescored:
        exact, slip = judge.decided(ids[possible].flatten(), state)
        again = ((exact - slip).to(found.dtype) <= candidates) & (
            candidates <= (exact + slip).to(found.dtype)
        )
        own = torch.where(sure, exact, own)
        right = again | (right & ~sure)
    whole = right.view(-1, ids.shape[1]).all(dim=1)
    unprobed = filled[possible].all(dim=1) & ~must[possible]
    if not bool((whole | unprobed).all()):
        cluster = int((~(whole | unprobed)).nonzero()[0])
        first = cluster * ids.shape[1]
        row = first + int((~right[first : first + ids.shape[1]]).nonzero()[0])
        return (
            f"token {int(ids[possible].flatten()[row])} of a cluster that is probed has logit "
            f"{float(candidates[row]):.6g}, not {float(own[row]):.6g}"
        )
    if int(whole.sum()) < judge.n_probes:
        return f"{int(whole.sum())} clusters are probed, not {judge.n_probes}"
    return None


def _written_bytes(problem: Problem) -> int:
    size = format_of(problem.state_dtype).bytes_of(problem.n_tokens, problem.vocab_size)
    return size


def _values(problem: Problem, first: FirstLaunch) -> dict[str, int]:
    """How the first launch's programs divide the output to fill it, in whole lines."""
    elements = problem.n_tokens * problem.vocab_size
    share = -(-elements // (_LINE * first.programs)) * _LINE
    block = min(1 << (share - 1).bit_length(), 256 * first.warps)
    return {"fill_share": share, "fill_block": block}


LOGITS = Epilogue(
    name="logits",
    shape=lambda problem: (problem.n_tokens, problem.vocab_size),
    dtype=lambda problem: format_of(problem.state_dtype).torch_name,
    poison=math.nan,
    written_bytes=_written_bytes,
    combine=_combine,
    best_only=False,
    tokens_of=lambda out: out.argmax(dim=1),
    why_wrong=_why_wrong,
    values=_values,
)
