"""The cost of special tokens per step: `FlashHead` with some, in pinned clusters, and without.

    python benchmarks/special_tokens.py [--shape NAME] [--special N]… [--device cpu|cuda]

Prints a Markdown table of microseconds per call of one token; on a GPU, in a CUDA graph. Weights
are the same at each call, so they may be in the cache: only the difference counts. Each number of
special tokens, including none, has two heads, since the place of a head's tensors in memory also
makes a difference: the difference between those two is not a cost of special tokens.
"""

import click
import torch

from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.timing import GraphTimer, Timing, WallTimer, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.problem import parse_shape


@click.command()
@click.option("--shape", default="vocab=49152,hidden=576,clusters=3072", show_default=True)
@click.option("--special", "numbers", multiple=True, type=int, default=(2, 100))
@click.option("--device", default="cpu", show_default=True)
def main(shape: str, numbers: tuple[int, ...], device: str) -> None:
    """Time heads that differ in their special tokens only, in turns."""
    problem = parse_shape(shape)
    generator = torch.Generator(device).manual_seed(0)
    size = (problem.vocab_size, problem.hidden_size)
    weight = torch.randn(size, generator=generator, device=device).bfloat16()
    clusters = torch.arange(problem.vocab_size, device=device) % problem.n_clusters
    centroids = torch.randn(problem.n_clusters, size[1], generator=generator, device=device)
    state = torch.randn(1, size[1], generator=generator, device=device).bfloat16()

    def timer(number: int) -> GraphTimer | WallTimer:
        head = FlashHead(
            weight,
            centroids.bfloat16(),
            clusters,
            n_probes=problem.n_probes,
            special_token_ids=range(number),
        )
        head.prepare(1)

        def step(_: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(head(hidden))

        weights = Weights(weight=head.weight, centroids=head.centroids, ids=head.ids)
        workload = Workload(problem, (weights,), (state,), ())
        return (GraphTimer if weight.is_cuda else WallTimer)(step, workload)

    counts = (0, *numbers) * 2
    samples = interleaved([timer(number) for number in counts], rounds=20)
    times = [Timing.of(own) for own in samples]
    where = torch.cuda.get_device_name() if weight.is_cuda else "CPU"
    print(f"{problem.describe()}, {where}, {torch.get_num_threads()} threads of torch\n")
    print("| special tokens | us a call | of another head | spread | more than none |")
    print("|---|---|---|---|---|")
    kinds = len(counts) // 2
    means = [(a.median_us + b.median_us) / 2 for a, b in zip(times, times[kinds:], strict=False)]
    for number, one, other, mean in zip(counts, times, times[kinds:], means, strict=False):
        cells = (one.median_us, other.median_us, one.spread_us, mean - means[0])
        print(f"| {number} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
