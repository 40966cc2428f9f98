"""How well clusterings of a real head retrieve, and how long they take to make.

    python benchmarks/clustering.py --model DIR [--clusters N] [--seed N] [--device cpu|cuda]

Prints a Markdown table: the share of decode steps whose dense token is in a probed cluster, by
clustering and number of probes, and the average number of tokens that the probes read. The steps
are greedy continuations of the shipped prompts by the model itself. For each clustering, centroids
are once the mean rows, and once directions of unit length. DIR is any causal model's folder;
`flashtune[hf]` must be installed.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch.nn.functional import normalize

from flashtune.kernels.model_folder.clusters import Clusters
from flashtune.kernels.model_folder.folder import HeadParts, ModelFolder
from flashtune.tuner.clustering.clustered_folder import CLUSTER_SIZE
from flashtune.tuner.clustering.decode_state import decode_states, read_prompts
from flashtune.tuner.clustering.kmeans import ITERATIONS, BalancedKMeans
from flashtune.tuner.clustering.quality import Study

PROBES = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Row:
    """A clustering with one kind of centroids; seconds: the time to make the clusters."""

    clustering: str
    centroids: str
    seconds: float
    recall: dict[int, float]
    tokens: float


class _ByCosine(BalancedKMeans):
    """Balanced, but on uncentred rows of unit length: plain spherical k-means."""

    def __init__(self, weight: torch.Tensor, n_clusters: int, seed: int) -> None:
        super().__init__(weight, n_clusters, seed)
        self._rows = normalize(weight.float(), dim=1)


def at_random(weight: torch.Tensor, n_clusters: int, iterations: int, seed: int) -> torch.Tensor:
    """Random clusters of equal size."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(weight), generator=generator)
    return (order % n_clusters).to(weight.device)


def plain(weight: torch.Tensor, n_clusters: int, iterations: int, seed: int) -> torch.Tensor:
    """Spherical k-means, with clusters of any size."""
    rows = normalize(weight.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(rows), generator=generator)[:n_clusters]
    centroids = rows[start.to(rows.device)]
    for _ in range(iterations):
        nearest = torch.cat([(part @ centroids.T).argmax(dim=1) for part in rows.split(2048)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
        filled = torch.bincount(nearest, minlength=n_clusters) > 0
        centroids = torch.where(filled[:, None], normalize(sums, dim=1), centroids)
    return nearest


def balanced(
    kind: Callable[[torch.Tensor, int, int], BalancedKMeans],
) -> Callable[[torch.Tensor, int, int, int], torch.Tensor]:
    """A variant of balanced k-means."""

    def run(weight: torch.Tensor, n_clusters: int, iterations: int, seed: int) -> torch.Tensor:
        kmeans = kind(weight, n_clusters, seed)
        for _ in range(iterations):
            kmeans.step()
        return kmeans.clusters().assignments

    return run


CLUSTERINGS = {
    "random, equal": at_random,
    "plain k-means": plain,
    "balanced, cosine": balanced(_ByCosine),
    "balanced, `flashtune cluster`": balanced(BalancedKMeans),
}


def judged(
    name: str, seconds: float, weight: torch.Tensor, clusters: torch.Tensor, states: torch.Tensor
) -> list[Row]:
    """A row for each kind of centroids."""
    n_clusters = int(clusters.max()) + 1
    sums = torch.zeros(n_clusters, weight.shape[1], device=weight.device)
    sums.index_add_(0, clusters, weight.float())
    sizes = torch.bincount(clusters, minlength=n_clusters)
    mean = sums / sizes.clamp(min=1)[:, None]
    rows = []
    for kind, centroids in (("mean rows", mean), ("unit length", normalize(mean, dim=1))):
        parts = HeadParts(
            weight=weight,
            clusters=Clusters(centroids=centroids, assignments=clusters),
            n_probes=1,
            special_token_ids=[],
        )
        study = Study.of(parts, states)
        probed = (states @ centroids.T).topk(min(256, n_clusters)).indices
        recall = {number: study.row(min(number, n_clusters)).top1 for number in PROBES}
        tokens = float(sizes[probed].sum(dim=1).double().mean())
        rows.append(Row(name, kind, seconds, recall, tokens))
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    heads = " | ".join(str(number) for number in PROBES)
    print(f"| clustering | centroids | {heads} | tokens of 256 probes | seconds |")
    print("|" + "---|" * (len(PROBES) + 4))
    for row in rows:
        shares = " | ".join(f"{share:.4f}" for share in row.recall.values())
        print(
            f"| {row.clustering} | {row.centroids} | {shares} | {row.tokens:.0f} | "
            f"{row.seconds:.1f} |"
        )


@click.command()
@click.option("--model", required=True)
@click.option("--clusters", "n_clusters", type=int, help="Else a sixteenth of the vocabulary.")
@click.option("--iterations", default=ITERATIONS, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(
    model: str,
    n_clusters: int | None,
    iterations: int,
    seed: int,
    device: str,
    file: Path | None,
) -> None:
    """Compare clusterings of a model's head."""
    folder = ModelFolder.open(model)
    states = decode_states(folder, read_prompts(None), 32, device)
    weight = folder.head_weight().read(device)
    number = n_clusters or -(-len(weight) // CLUSTER_SIZE)
    rows = []
    for name, run in CLUSTERINGS.items():
        start = time.perf_counter()
        clusters = run(weight, number, iterations, seed)
        if weight.is_cuda:
            torch.cuda.synchronize()
        rows += judged(name, time.perf_counter() - start, weight, clusters, states)
        print(f"{name}: done", flush=True)
    print(f"\n{len(states)} decode steps, {len(weight)}x{weight.shape[1]}, {number} clusters, ")
    print(f"{iterations} iterations, seed {seed}, {device}, {torch.get_num_threads()} threads\n")
    show(rows)
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
