"""Clusters of equal size of a head's rows, for FlashHead: balanced k-means by direction.

Usage:
    kmeans = BalancedKMeans(weight, n_clusters=3072, seed=0)
    for _ in range(ITERATIONS):
        fit = kmeans.step()             # how much of the rows lies along their centroids
    kmeans.clusters()

The mean is subtracted from the rows, since it adds the same to every logit and does not tell
tokens apart. Each row goes to the centroid along whose direction it reaches farthest. The returned
centroids are means of the original rows: a cluster's score is then the mean of its tokens' logits.
docs/clustering.md has the measurements behind each of these choices.
"""

import torch
from torch.nn.functional import normalize

from flashtune.kernels.model_folder.clusters import Clusters, Origin
from flashtune.tuner.clustering.assignment import assign
from flashtune.tuning_db.errors import FlashtuneError

ITERATIONS = 15
_CANDIDATES = 32  # clusters that a token bids for
_SCORE_BYTES = 2**26  # of scores in float32 at a time


class BalancedKMeans:
    """k-means whose clusters differ in size by at most one token.

    weight: `[vocab, hidden]` in any dtype; the work is done on its device, in float32. The same
    seed on the same kind of device gives the same clusters. Raises FlashtuneError if the
    vocabulary is too small for the clusters, or rows are not finite.
    """

    def __init__(self, weight: torch.Tensor, n_clusters: int, seed: int = 0) -> None:
        """Start from random rows."""
        vocab_size = weight.shape[0]
        if not 1 <= n_clusters <= vocab_size:
            raise FlashtuneError(
                f"{n_clusters} clusters cannot be made of {vocab_size} tokens: give 1 to "
                f"{vocab_size}"
            )
        if not all(bool(bound.isfinite()) for bound in torch.aminmax(weight)):
            raise FlashtuneError("the weight contains NaN or infinity: download the model again")
        self._weight, self.n_clusters, self.seed = weight, n_clusters, seed
        self.origin = Origin.of(weight)
        self._rows = weight.float() - weight.mean(dim=0, dtype=torch.float32)
        self._rows /= self._rows.norm(dim=1).mean().clamp(min=1e-30)
        self._larger = vocab_size % n_clusters  # clusters with one token more than the others
        sizes = torch.full((n_clusters,), vocab_size // n_clusters)
        sizes[: self._larger] += 1
        self._sizes = sizes.to(weight.device)
        self.assignments: torch.Tensor | None = None
        self.iteration = 0

    def resume(self, assignments: torch.Tensor, iteration: int) -> None:
        """Continue from the `assignments` and `iteration` of an earlier step.

        Raises FlashtuneError if the clusters do not have the sizes that each step gives them.
        """
        whole = assignments.dtype is torch.int64 and assignments.shape == (len(self._rows),)
        if whole and bool(((assignments >= 0) & (assignments < self.n_clusters)).all()):
            assignments = assignments.to(self._rows.device)
            sizes = torch.bincount(assignments, minlength=self.n_clusters)
            if torch.equal(sizes, self._sizes):
                self.assignments, self.iteration = assignments, iteration
                return
        raise FlashtuneError("its clusters differ in size")

    def step(self) -> float:
        """Reassign every token, and return the fit."""
        centroids = self._centroids()
        scores, candidates = self._best(self._rows, centroids, _CANDIDATES)

        def best_free(
            tokens: torch.Tensor, free: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            best, at = self._best(self._rows[tokens], centroids[free], 1)
            return best[:, 0], at[:, 0]

        self.assignments = assign(scores, candidates, self._sizes, best_free)
        self.iteration += 1
        return self.fit()

    def fit(self) -> float:
        """The share of all rows' length that lies along their centroids' directions."""
        assert self.assignments is not None
        along = (self._rows * self._centroids()[self.assignments]).sum(dim=1)
        return float(along.mean())

    def clusters(self) -> Clusters:
        """The clusters after the last step, in the weight's dtype."""
        assert self.assignments is not None
        centroids = self._means(self._weight, self.assignments).to(self._weight.dtype)
        return Clusters(
            centroids=centroids,
            assignments=self.assignments,
            origin=self.origin,
        )

    def _centroids(self) -> torch.Tensor:
        """Directions of unit length: `[n_clusters, hidden]`."""
        if self.assignments is not None:
            return normalize(self._means(self._rows, self.assignments), dim=1)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randperm(len(self._rows), generator=generator)[: self.n_clusters]
        return normalize(self._rows[start.to(self._rows.device)], dim=1)

    def _means(self, rows: torch.Tensor, assignments: torch.Tensor) -> torch.Tensor:
        """The mean row of each cluster in float32, summed in a fixed order to be reproducible."""
        order = assignments.argsort(stable=True)
        size, width = len(rows) // self.n_clusters, rows.shape[1]
        split = self._larger * (size + 1)
        return torch.cat(
            [
                rows[order[:split]]
                .view(self._larger, size + 1, width)
                .mean(1, dtype=torch.float32),
                rows[order[split:]].view(-1, size, width).mean(1, dtype=torch.float32),
            ]
        )

    @staticmethod
    def _best(
        rows: torch.Tensor, centroids: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and positions of each row's best centroids, best first: `[rows, number]`."""
        number = min(number, len(centroids))
        chunk = max(1, _SCORE_BYTES // (4 * len(centroids)))
        parts = [(part @ centroids.T).topk(number) for part in torch.split(rows, chunk)]
        return torch.cat([part.values for part in parts]), torch.cat(
            [part.indices for part in parts]
        )
