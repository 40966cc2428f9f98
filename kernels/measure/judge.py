"""The judge: compares what a step writes with a float64 reference, and says what is wrong.

Usage:
    Judge(weights, problem).why_wrong(out, hidden, slack=16)     # None, or why it is not right

What is right for an output is the epilogue's to say; the judge knows which clusters must be
probed, which may be, and how far rounding may reach.
"""

from dataclasses import dataclass

import torch

from flashtune.kernels.epilogues.epilogue import epilogue_of
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.problem import Problem

_ROWS_AT_ONCE = 4096  # that are judged in float64


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
    problem: Problem
    exact: bool = False

    @property
    def n_probes(self) -> int:
        """How many clusters must be probed."""
        return self.problem.n_probes

    def why_wrong(self, out: torch.Tensor, hidden: torch.Tensor, slack: int) -> str | None:
        """None when each row of `out` is right for its row of `hidden`, else why one is not.

        out: what the problem's epilogue has a step write, for as many tokens as there are states.
        """
        epilogue = epilogue_of(self.problem.epilogue)
        states = hidden.double()
        scores, bounds = (each.T for each in self.products(self.weights.centroids, states))
        for index, (found, state) in enumerate(zip(out, states, strict=True)):
            clusters = self._clusters(scores[index], bounds[index], slack)
            reason = epilogue.why_wrong(self, found, state, clusters)
            if reason:
                return f"row {index}: {reason}"
        return None

    def products(
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
