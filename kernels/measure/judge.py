"""FlashHead in plain torch: the implementation for tensors without a kernel, and the judge.

`decode` and `decode_logits` are what runs on a CPU, and the runtime's last fallback. `Judge`
compares tokens or logits with a float64 reference and says what is wrong with them.
"""

from dataclasses import dataclass

import torch

from flashtune.kernels.weights import FILL, Weights

_ROWS_AT_ONCE = 4096  # that are judged in float64


def decode(weights: Weights, hidden: torch.Tensor, n_probes: int) -> torch.Tensor:
    """Best token among the rows of the `n_probes` best clusters: int64 `[n_tokens]`.

    hidden `[n_tokens, hidden]`. Products are accumulated in float32; ties give the smallest id. A
    NaN counts as the best logit, and a hidden state with a NaN gives token 0, as `torch.argmax`
    does of a dense head's logits.
    """
    ids, logits = _candidates(weights, hidden, n_probes)
    best = logits.max(dim=1, keepdim=True).values
    among = torch.where(best.isnan(), logits.isnan(), logits == best)
    tokens = torch.where(among, ids, ids.numel() + ids.max()).min(dim=1).values.long()
    return tokens.masked_fill(hidden.isnan().any(dim=1), 0)


def decode_logits(weights: Weights, hidden: torch.Tensor, n_probes: int) -> torch.Tensor:
    """Logits of the rows of the `n_probes` best clusters, `FILL` elsewhere: `[n_tokens, vocab]`.

    hidden `[n_tokens, hidden]`. Products are accumulated in float32, then rounded to the weight's
    dtype. A hidden state with a NaN gives a row of NaN, as a dense head does.
    """
    ids, logits = _candidates(weights, hidden, n_probes)
    dtype = weights.weight.dtype
    out = torch.full((len(hidden), weights.ids.numel()), FILL, dtype=dtype, device=hidden.device)
    out.scatter_(1, ids.long(), logits.to(dtype))
    return out.masked_fill_(hidden.isnan().any(dim=1, keepdim=True), torch.nan)


def _candidates(
    weights: Weights, hidden: torch.Tensor, n_probes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and float32 logits of the probed clusters' rows, `[n_tokens, rows]` each."""
    n_clusters, width = weights.centroids.shape
    state = hidden.float()
    scores = state @ weights.centroids.float().T
    clusters = torch.topk(scores, n_probes, dim=1, sorted=False).indices
    rows = weights.weight.view(n_clusters, -1, width)[clusters].flatten(1, 2)
    ids = weights.ids.view(n_clusters, -1)[clusters].flatten(1)
    return ids, torch.einsum("trh,th->tr", rows.float(), state)


@dataclass(frozen=True, slots=True)
class _Clusters:
    """The clusters' scores for one token; which of them must be probed, and which may be."""

    scores: torch.Tensor
    must: torch.Tensor
    possible: torch.Tensor

    def rank(self, cluster: int) -> int:
        """A cluster's place among all, the best being 1."""
        return int((self.scores > self.scores[cluster]).sum()) + 1


@dataclass(frozen=True, slots=True)
class Judge:
    """Whether tokens or logits are right answers for these weights, in float64.

    A kernel must probe at least the `n_probes` best clusters and at most `slack` more; which of
    those more is its own choice, but a cluster is probed whole: a token must be the best of its
    own, too. Rounding in float32 may swap clusters or logits that are closer
    than the error bound of a sum of products: (width / 32 + 16) 2^-24 sum |a_i b_i|, for sums
    of at most width / 32 sequential and 16 pairwise steps (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2). With `exact`, for inputs of small whole numbers, whose
    sums float32 holds exactly, the bound is zero. Logits are rounded once more, to the dtype they
    come in: since rounding keeps the order, they must lie between the bound's ends, rounded.
    """

    weights: Weights
    n_probes: int
    exact: bool = False

    def why_wrong(self, out: torch.Tensor, hidden: torch.Tensor, slack: int) -> str | None:
        """None when each row of `out` is right for its row of `hidden`, else why one is not.

        out: tokens `[n_tokens]`, or logits `[n_tokens, vocab]`.
        """
        states = hidden.double()
        scores, bounds = (each.T for each in self._products(self.weights.centroids, states))
        for index, (found, state) in enumerate(zip(out, states, strict=True)):
            clusters = self._clusters(scores[index], bounds[index], slack)
            if out.dim() == 1:
                reason = self._why_token_wrong(int(found), state, clusters)
            else:
                reason = self._why_logits_wrong(found, state, clusters)
            if reason:
                return f"row {index}: {reason}"
        return None

    def _products(
        self, matrix: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`matrix @ states.T` in float64 and its error bounds, a few rows of it at a time.

        The whole matrix in float64 would be four times as large as the weights themselves.
        """
        depth = 0 if self.exact else matrix.shape[1] / 32 + 16
        sums, bounds = [], []
        for part in torch.split(matrix, _ROWS_AT_ONCE):
            rows = part.double()
            sums.append(rows @ states.T)
            bounds.append(rows.abs() @ states.abs().T)
        return torch.cat(sums), depth * 2.0**-24 * torch.cat(bounds)

    def _clusters(self, scores: torch.Tensor, bound: torch.Tensor, slack: int) -> "_Clusters":
        """What one token's scores, to within `bound`, leave open."""
        ranked = torch.sort(scores, descending=True).values
        must = torch.ones_like(scores, dtype=torch.bool)
        if self.n_probes < len(scores):
            must = scores - bound > ranked[self.n_probes] + bound.max()
        last = min(self.n_probes + slack, len(scores)) - 1
        return _Clusters(scores, must, scores + bound >= ranked[last] - bound.max())

    def _why_logits_wrong(
        self, found: torch.Tensor, state: torch.Tensor, clusters: "_Clusters"
    ) -> str | None:
        """Why `found` `[vocab]` is no right row of logits."""
        ids = self.weights.ids.long().view(len(self.weights.centroids), -1)
        must, possible = clusters.must, clusters.possible
        filled = found[ids] == torch.tensor(FILL, dtype=found.dtype)
        astray = ~possible[:, None] & ~filled
        if bool(astray.any()):
            cluster, member = astray.nonzero()[0].tolist()
            return (
                f"token {int(ids[cluster, member])} of the cluster ranked "
                f"{clusters.rank(cluster)}, of {self.n_probes} probes, is not filled in"
            )
        rows = self.weights.weight.view(*ids.shape, -1)[possible].flatten(0, 1)
        own, bound = (each[:, 0] for each in self._products(rows, state[None]))
        least, most = (own - bound).to(found.dtype), (own + bound).to(found.dtype)
        candidates = found[ids[possible]].flatten()
        right = (least <= candidates) & (candidates <= most)
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
        if int(whole.sum()) < self.n_probes:
            return f"{int(whole.sum())} clusters are probed, not {self.n_probes}"
        return None

    def _why_token_wrong(
        self, token: int, state: torch.Tensor, clusters: "_Clusters"
    ) -> str | None:
        ids, must = self.weights.ids, clusters.must.clone()
        n_clusters, width = self.weights.centroids.shape
        if not 0 <= token < ids.numel():
            return f"token {token} is not in the vocabulary"
        position = int((ids == token).nonzero()[0])
        cluster = position // (ids.numel() // n_clusters)
        if not clusters.possible[cluster]:
            rank = clusters.rank(cluster)
            return f"token {token} is of the cluster ranked {rank}, of {self.n_probes} probes"
        must[cluster] = True
        rows = self.weights.weight.view(n_clusters, -1, width)[must].flatten(0, 1)
        logits, bounds = (each[:, 0] for each in self._products(rows, state[None]))
        own = self.weights.weight[position].double() @ state
        best = int(logits.argmax())
        own_bound = self._products(self.weights.weight[position : position + 1], state[None])[1]
        slip = own_bound[0, 0] + bounds[best]
        if own < logits[best] - slip:
            return (
                f"token {token} has logit {float(own):.6g}, but there is {float(logits[best]):.6g}"
            )
        candidates = ids.view(n_clusters, -1)[must].flatten()
        tied = candidates[logits == own]
        if tied.numel() and int(tied.min()) < token:
            return f"token {token} ties with the smaller id {int(tied.min())}"
        return None
