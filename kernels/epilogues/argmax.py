"""The epilogue `argmax`: the best token of each hidden state, int64 `[n_tokens]`."""

from typing import TYPE_CHECKING, Any

from flashtune.kernels.epilogues.epilogue import Epilogue

if TYPE_CHECKING:
    import torch


def _combine(ids: "torch.Tensor", logits: "torch.Tensor", out: "torch.Tensor") -> "torch.Tensor":
    """The smallest id among the best; NaN counts as the largest, as in torch.argmax.

    If all are NaN, so are a dense head's logits, and its token is 0.
    """
    import torch

    best = logits.max(dim=1, keepdim=True).values
    among = torch.where(best.isnan(), logits.isnan(), logits == best)
    beyond = ids.numel() + ids.max()
    tokens = torch.where(among, ids, beyond).min(dim=1).values.long()
    return out.copy_(tokens.masked_fill(logits.isnan().all(dim=1), 0))


def _why_wrong(
    judge: Any, found: "torch.Tensor", state: "torch.Tensor", clusters: Any
) -> str | None:
    """A token must be the best of its own cluster and of those that must be probed.

    If the model's own rows decide among candidates, it must have the best of their logits among
    those that must be decided; deciding more is allowed.
    """
    token, weights = int(found), judge.weights
    ids, must = weights.ids, clusters.must.clone()
    n_clusters = judge.problem.n_clusters
    if not 0 <= token < ids.numel():
        return f"token {token} is not in the vocabulary"
    position = int((ids == token).nonzero()[0])
    cluster = position // (ids.numel() // n_clusters)
    if not clusters.possible[cluster]:
        rank = clusters.rank(cluster)
        return (
            f"token {token} is in the cluster ranked {rank}, but only {judge.n_probes} are probed"
        )
    must[cluster] = True
    own, own_bound, logits, bounds, candidates = judge.contest(position, must, clusters, state)
    best = int(logits.argmax())
    if own < logits[best] - own_bound - bounds[best]:
        return (
            f"token {token} has logit {float(own):.6g}, but the best has {float(logits[best]):.6g}"
        )
    tied = candidates[logits == own]
    if tied.numel() and int(tied.min()) < token:
        return f"token {token} ties with the smaller id {int(tied.min())}"
    return None


ARGMAX = Epilogue(
    name="argmax",
    shape=lambda problem: (problem.n_tokens,),
    dtype=lambda problem: "int64",
    poison=-1,
    written_bytes=lambda problem: 0,  # a token's id counts nothing
    combine=_combine,
    best_only=True,
    tokens_of=lambda out: out,
    why_wrong=_why_wrong,
    values=lambda problem, first: {},
)
