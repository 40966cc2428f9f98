"""FlashHead in plain torch: the implementation for tensors without a kernel, and the judge.

`decode` is what runs on a CPU, and the runtime's last fallback. `Judge` compares tokens with a
float64 reference and says what is wrong with them.
"""

from dataclasses import dataclass

import torch

from flashtune.kernels.layout import Weights

_ROWS_AT_ONCE = 4096  # that are judged in float64


def decode(weights: Weights, hidden: torch.Tensor, n_probes: int) -> torch.Tensor:
    """Best token among the rows of the `n_probes` best clusters: int64 `[n_tokens]`.

    hidden `[n_tokens, hidden]`. Products are accumulated in float32; ties give the smallest id.
    """
    n_clusters, width = weights.centroids.shape
    state = hidden.float()
    scores = state @ weights.centroids.float().T
    clusters = torch.topk(scores, n_probes, dim=1, sorted=False).indices
    rows = weights.weight.view(n_clusters, -1, width)[clusters].flatten(1, 2)
    ids = weights.ids.view(n_clusters, -1)[clusters].flatten(1)
    logits = torch.einsum("trh,th->tr", rows.float(), state)
    best = logits.max(dim=1, keepdim=True).values
    return torch.where(logits == best, ids, ids.numel() + ids.max()).min(dim=1).values.long()


@dataclass(frozen=True, slots=True)
class Judge:
    """Whether tokens are right answers for these weights, in float64.

    A kernel must probe at least the `n_probes` best clusters and at most `slack` more; which of
    those more is its own choice, but a cluster is probed whole: a token must be the best of its
    own, too. Rounding in float32 may swap clusters or logits that are closer
    than the error bound of a sum of products: (width / 32 + 16) 2^-24 sum |a_i b_i|, for sums
    of at most width / 32 sequential and 16 pairwise steps (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2). With `exact`, for inputs of small whole numbers, whose
    sums float32 holds exactly, the bound is zero.
    """

    weights: Weights
    n_probes: int
    exact: bool = False

    def why_wrong(self, tokens: torch.Tensor, hidden: torch.Tensor, slack: int) -> str | None:
        """None when each of `tokens` `[n_tokens]` is right for `hidden`, else why one is not."""
        states = hidden.double()
        scores, bounds = (each.T for each in self._products(self.weights.centroids, states))
        rows = zip(tokens.tolist(), states, scores, bounds, strict=True)
        for index, (token, state, own_scores, own_bounds) in enumerate(rows):
            reason = self._why_token_wrong(token, state, own_scores, own_bounds, slack)
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

    def _why_token_wrong(
        self,
        token: int,
        state: torch.Tensor,
        scores: torch.Tensor,
        bound: torch.Tensor,
        slack: int,
    ) -> str | None:
        ids = self.weights.ids
        n_clusters, width = self.weights.centroids.shape
        if not 0 <= token < ids.numel():
            return f"token {token} is not in the vocabulary"
        ranked = torch.sort(scores, descending=True).values
        must = torch.ones_like(scores, dtype=torch.bool)
        if self.n_probes < n_clusters:
            must = scores - bound > ranked[self.n_probes] + bound.max()
        last = min(self.n_probes + slack, n_clusters) - 1
        possible = scores + bound >= ranked[last] - bound.max()

        position = int((ids == token).nonzero()[0])
        cluster = position // (ids.numel() // n_clusters)
        if not possible[cluster]:
            rank = int((scores > scores[cluster]).sum()) + 1
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
