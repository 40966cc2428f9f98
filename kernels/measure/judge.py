"""The judge: compares what a step writes with a float64 reference, and says what is wrong.

Usage:
    Judge(weights, problem).why_wrong(out, hidden, slack=16)     # None, or why it is not right

The epilogue decides whether an output is right; the judge knows which clusters must be probed,
which may be, and the bounds of rounding.
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
        """A cluster's rank among all; the best is 1."""
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

    Tensor cores cut instead of rounding. They add a few products to a sum at a time, all cut to
    a multiple of 2^-24 of the largest's power of two (Ampere, 8 products at a time) or of 2^-25
    (Hopper, 16), and cut what comes out to float32 (Khattak and Mikaitis, Accurate Models of
    NVIDIA Tensor Cores, 2025). An Ampere may so lose (9 2^-24 + 2^-23) sum |a_i b_i|
    for each 8 products, a Hopper half. With `tensor_cores` the bound is therefore
    (11/8 width + 16) 2^-24 sum |a_i b_i|.

    For quantised weights the reference is the dequantised numbers, whole numbers times scales. A
    kernel multiplies by a scale after it has added up, and rounds once more for it, which the
    bound's 16 further steps cover. Of int8 alone it may also take each state as whole multiples of
    a power of two u, so that its products are integers and their sums exact. With 16 bits for the
    multiples, u is at most 2^-14 of the state's largest magnitude m: each number is off by at most
    u / 2 <= 2^-15 m, a sum by at most 2^-15 m sum |a_i|, which is added to the bound. Whole
    numbers below 2^15 are taken exactly.

    Where the best R candidates are decided by the model's own rows (`n_rescored`), those must be
    decided of which fewer than R can be better once each logit is moved by its bound; any more may
    be, since the model's rows only make an answer better.
    """

    weights: Weights
    problem: Problem
    exact: bool = False
    tensor_cores: bool = False

    @property
    def n_probes(self) -> int:
        """How many clusters must be probed."""
        return self.problem.n_probes

    def why_wrong(self, out: torch.Tensor, hidden: torch.Tensor, slack: int) -> str | None:
        """None if each row of `out` is right for its row of `hidden`, else why one is not.

        out: what the problem's epilogue has a step write, for as many tokens as there are states.
        """
        epilogue = epilogue_of(self.problem.epilogue)
        states = hidden.double()
        problem = self.problem
        parts = [
            self.products(
                self.weights.centroid_rows(problem, part, torch.float64),
                states,
                multiples=problem.centroid_dtype == "int8",
            )
            for part in _parts(problem.n_clusters)
        ]
        scores, bounds = (torch.cat(each).T for each in zip(*parts, strict=True))
        for index, (found, state) in enumerate(zip(out, states, strict=True)):
            clusters = self._clusters(scores[index], bounds[index], slack)
            reason = epilogue.why_wrong(self, found, state, clusters)
            if reason:
                return f"row {index}: {reason}"
        return None

    def products(
        self, rows: torch.Tensor, states: torch.Tensor, *, multiples: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows @ states.T` in float64, and the error bounds.

        multiples: whether states may be taken as whole multiples of a power of two.
        """
        steps = rows.shape[1] * (11 / 8 if self.tensor_cores else 1 / 32) + 16
        depth = 0 if self.exact else steps
        rows = rows.double()
        bounds = depth * 2.0**-24 * (rows.abs() @ states.abs().T)
        if multiples and not self.exact:
            bounds += 2.0**-15 * rows.abs().sum(dim=1)[:, None] * states.abs().amax(dim=1)
        return rows @ states.T, bounds

    def logits(
        self, positions: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of rows of the weight as it is stored, and their bounds: `[positions]` each."""
        found = [
            self.products(
                self.weights.rows(self.problem, part, torch.float64),
                state[None],
                multiples=self.problem.weight_dtype == "int8",
            )
            for part in torch.split(positions, _ROWS_AT_ONCE)
        ]
        sums, bounds = (torch.cat(each)[:, 0] for each in zip(*found, strict=True))
        return sums, bounds

    def decided(self, ids: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of tokens by the model's own rows, and their bounds."""
        model = self.weights.model_weight
        assert model is not None
        found = [
            self.products(model[part.long()], state[None])
            for part in torch.split(ids, _ROWS_AT_ONCE)
        ]
        sums, bounds = (torch.cat(each)[:, 0] for each in zip(*found, strict=True))
        return sums, bounds

    def screened(
        self, possible: torch.Tensor, must: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows of the clusters that may be probed: logits, bounds, which must be decided.

        must: the clusters that are probed in any case.
        """
        size = self.problem.cluster_size
        own, bounds = self.logits(_positions(possible, size), state)
        n_rescored = self.problem.n_rescored
        most = torch.sort(own + bounds, descending=True).values
        sure = must[possible].repeat_interleave(size)
        if n_rescored < len(own):
            sure &= own - bounds > most[n_rescored]  # fewer than so many others can be better
        return own, bounds, sure

    def contest(
        self, position: int, must: torch.Tensor, clusters: "_Clusters", state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A row's logit and bound; and logits, bounds and ids of the rows it must hold against.

        must: the clusters that are probed in any case, those of the row counted in.
        """
        ids, size = self.weights.ids, self.problem.cluster_size
        own_id = ids[position : position + 1]
        if not self.problem.n_rescored:
            rivals = _positions(must, size)
            logits, bounds = self.logits(rivals, state)
            here = int((rivals == position).nonzero()[0])
            return logits[here], bounds[here], logits, bounds, ids[rivals]
        _, _, sure = self.screened(clusters.possible, must, state)
        rivals = torch.cat([ids[_positions(clusters.possible, size)[sure]], own_id])
        logits, bounds = self.decided(rivals, state)
        return logits[-1], bounds[-1], logits, bounds, rivals

    def _clusters(self, scores: torch.Tensor, bound: torch.Tensor, slack: int) -> "_Clusters":
        """What one token's scores, to within `bound`, leave open; pinned ones are in any case."""
        pinned = torch.arange(len(scores), device=scores.device) < self.problem.n_pinned
        ranked = torch.sort(scores, descending=True).values
        must = torch.ones_like(scores, dtype=torch.bool)
        if self.n_probes < len(scores):
            must = scores - bound > ranked[self.n_probes] + bound.max()
        last = min(self.n_probes + slack, len(scores)) - 1
        possible = scores + bound >= ranked[last] - bound.max()
        return _Clusters(scores, must | pinned, possible | pinned)


def _parts(rows: int) -> list[slice]:
    """So many rows, a few at a time: in float64 all would take four times what is stored."""
    starts = range(0, rows, _ROWS_AT_ONCE)
    return [slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in starts]


def _positions(clusters: torch.Tensor, size: int) -> torch.Tensor:
    """The rows of the clusters that are set, in order."""
    first = clusters.nonzero()[:, 0] * size
    return (first[:, None] + torch.arange(size, device=clusters.device)).flatten()
