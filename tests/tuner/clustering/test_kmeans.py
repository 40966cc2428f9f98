"""Balanced k-means: sizes always, better fits than chance, and the same again for a seed."""

import itertools

import pytest
import torch

from flashtune.tuner.clustering.assignment import assign
from flashtune.tuner.clustering.kmeans import BalancedKMeans
from flashtune.tuning_db.errors import FlashtuneError


def blobs(n_clusters: int, size: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Rows about `n_clusters` directions, shuffled, with a large mean that they share."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(n_clusters, width, generator=generator)
    rows = middles.repeat_interleave(size, dim=0)
    rows += 0.05 * torch.randn(rows.shape, generator=generator)
    return rows[torch.randperm(len(rows), generator=generator)] + 5


def assigned(scores: torch.Tensor, places: torch.Tensor, n: int, rounds: int) -> torch.Tensor:
    top = scores.topk(n)

    def best_free(tokens: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = scores[tokens][:, free].max(dim=1)
        return best.values, best.indices

    return assign(top.values, top.indices, places, best_free, rounds)


class TestAssignment:
    @pytest.mark.parametrize("n", [1, 2, 8])
    @pytest.mark.parametrize("rounds", [0, 1, 30])
    @pytest.mark.parametrize("alike", [False, True])
    def test_no_cluster_has_more_than_its_places(self, n: int, rounds: int, alike: bool) -> None:
        generator = torch.Generator().manual_seed(n)
        scores = torch.rand(60, 8, generator=generator)
        if alike:  # everyone wants the same clusters
            scores = scores[:1].expand(60, -1).contiguous()
        places = torch.tensor([8, 8, 8, 8, 7, 7, 7, 7])
        clusters = assigned(scores, places, n, rounds)
        assert torch.equal(torch.bincount(clusters, minlength=8), places)

    def test_an_auction_comes_close_to_the_best_assignment(self) -> None:
        """The best of all 40,320 ways to give eight tokens one of eight clusters each."""
        for seed in range(5):
            scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
            clusters = assigned(scores, torch.ones(8, dtype=torch.int64), n=8, rounds=1000)
            own = float(scores[torch.arange(8), clusters].sum())
            ways = torch.tensor(list(itertools.permutations(range(8))))
            best = float(scores[torch.arange(8), ways].sum(dim=1).max())
            assert best - 8 * 1e-3 - 1e-5 <= own <= best + 1e-5  # a step a token, at most


class TestKMeans:
    @pytest.mark.parametrize(("vocab", "n_clusters"), [(96, 6), (97, 6), (95, 6), (7, 7), (9, 1)])
    def test_clusters_differ_by_one_token_at_most(self, vocab: int, n_clusters: int) -> None:
        weight = torch.randn(vocab, 4, generator=torch.Generator().manual_seed(1))
        kmeans = BalancedKMeans(weight, n_clusters)
        kmeans.step()
        kmeans.step()
        sizes = torch.bincount(kmeans.clusters().assignments, minlength=n_clusters)
        assert int(sizes.max()) == -(-vocab // n_clusters)
        assert int(sizes.min()) == vocab // n_clusters

    def test_rows_of_one_direction_come_together(self) -> None:
        rows = blobs(5, 8)
        best = 0.0
        for seed in range(4):
            kmeans = BalancedKMeans(rows, 5, seed)
            first = kmeans.step()
            last = [kmeans.step() for _ in range(8)][-1]
            assert last >= first
            best = max(best, last)
        assert best > 0.98

    def test_centroids_are_the_mean_rows(self) -> None:
        weight = blobs(4, 6).bfloat16()
        kmeans = BalancedKMeans(weight, 4)
        kmeans.step()
        clusters = kmeans.clusters()
        assert clusters.centroids.dtype is torch.bfloat16
        for cluster, centroid in enumerate(clusters.centroids):
            mean = weight[clusters.assignments == cluster].float().mean(dim=0)
            assert torch.equal(centroid, mean.bfloat16())

    def test_a_seed_gives_the_same_clusters_again_and_another_gives_others(self) -> None:
        def run(seed: int, pause: bool = False) -> torch.Tensor:
            kmeans = BalancedKMeans(blobs(6, 16), 12, seed)
            for _ in range(3):
                kmeans.step()
                if pause:
                    held, kmeans = kmeans, BalancedKMeans(blobs(6, 16), 12, seed)
                    kmeans.resume(held.clusters().assignments, held.iteration)
            return kmeans.clusters().assignments

        assert torch.equal(run(3), run(3))
        assert torch.equal(run(3), run(3, pause=True))
        assert not torch.equal(run(3), run(4))

    def test_scores_are_taken_a_part_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = BalancedKMeans(blobs(6, 16), 12)
        whole.step()
        monkeypatch.setattr("flashtune.tuner.clustering.kmeans._SCORE_BYTES", 5 * 4 * 12)
        parts = BalancedKMeans(blobs(6, 16), 12)
        parts.step()
        assert torch.equal(whole.clusters().assignments, parts.clusters().assignments)

    def test_rows_that_are_all_the_same(self) -> None:
        kmeans = BalancedKMeans(torch.ones(12, 4), 3)
        assert kmeans.step() == 0
        assert torch.bincount(kmeans.clusters().assignments).tolist() == [4, 4, 4]

    @pytest.mark.parametrize(
        ("weight", "n_clusters", "message"),
        [
            (torch.ones(4, 2), 5, "5 clusters cannot be made of 4 tokens: give 1 to 4"),
            (torch.full((4, 2), float("nan")), 2, "contains NaN or infinity"),
            (torch.full((4, 2), float("inf")), 2, "contains NaN or infinity"),
        ],
    )
    def test_what_cannot_be_clustered(
        self, weight: torch.Tensor, n_clusters: int, message: str
    ) -> None:
        with pytest.raises(FlashtuneError, match=message):
            BalancedKMeans(weight, n_clusters)

    @pytest.mark.gpu
    def test_a_gpu_gives_equal_clusters_and_the_same_again(self) -> None:
        found = []
        for _ in range(2):
            kmeans = BalancedKMeans(blobs(64, 37).cuda().bfloat16(), 100)
            fits = [kmeans.step() for _ in range(5)]
            assert fits[-1] > fits[0]
            found.append(kmeans.clusters().assignments)
        assert torch.equal(*found)
        sizes = torch.bincount(found[0], minlength=100)
        assert (int(sizes.min()), int(sizes.max())) == (23, 24)
