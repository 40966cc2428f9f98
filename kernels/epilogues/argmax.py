"""The epilogue `argmax`: the best token of each hidden state, int64 `[n_tokens]`."""

from typing import TYPE_CHECKING, Any

from flashtune.kernels.epilogues.epilogue import Epilogue

if TYPE_CHECKING:
    import torch


def _combine(ids: "torch.Tensor", logits: "torch.Tensor", out: "torch.Tensor") -> "torch.Tensor":
    """The smallest id among the best; of logits with a NaN token 0, as torch.argmax of a row."""
    import torch

    best = logits.max(dim=1, keepdim=True).values
    beyond = ids.numel() + ids.max()
    tokens = torch.where(logits == best, ids, beyond).min(dim=1).values.long()
    return out.copy_(torch.where(best[:, 0].isnan(), 0, tokens))


def _why_wrong(
    judge: Any, found: "torch.Tensor", state: "torch.Tensor", clusters: Any
) -> str | None:
    """A token must be the best of its own cluster and of those that must be probed."""
    token, weights = int(found), judge.weights
    ids, must = weights.ids, clusters.must.clone()
    n_clusters, width = weights.centroids.shape
    if not 0 <= token < ids.numel():
        return f"token {token} is not in the vocabulary"
    position = int((ids == token).nonzero()[0])
    cluster = position // (ids.numel() // n_clusters)
    if not clusters.possible[cluster]:
        rank = clusters.rank(cluster)
        return f"token {token} is of the cluster ranked {rank}, of {judge.n_probes} probes"
    must[cluster] = True
    rows = weights.weight.view(n_clusters, -1, width)[must].flatten(0, 1)
    logits, bounds = (each[:, 0] for each in judge.products(rows, state[None]))
    own = weights.weight[position].double() @ state
    best = int(logits.argmax())
    own_bound = judge.products(weights.weight[position : position + 1], state[None])[1]
    slip = own_bound[0, 0] + bounds[best]
    if own < logits[best] - slip:
        return f"token {token} has logit {float(own):.6g}, but there is {float(logits[best]):.6g}"
    candidates = ids.view(n_clusters, -1)[must].flatten()
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
    tokens_of=lambda out: out,
    why_wrong=_why_wrong,
    values=lambda problem, first: {},
)
