"""How long it takes to cluster a head of a given shape, on random rows.

    python benchmarks/clustering_time.py [--shape NAME]… [--device cpu|cuda] [--iterations N]

Prints a Markdown table: wall-clock seconds for all iterations, including reading the result, and
for the first and the median iteration; and the processor time of all, which other load on the
machine hardly changes. Writes nothing.
"""

import statistics
import time

import click
import torch

from flashtune.tuner.clustering.kmeans import ITERATIONS, BalancedKMeans
from flashtune.tuning_db.problem import parse_shape


def seconds_of(shape: str, device: str, iterations: int) -> tuple[float, float, list[float]]:
    """Seconds of a whole clustering, its processor time, and of each iteration."""
    problem = parse_shape(shape)
    generator = torch.Generator(device).manual_seed(0)
    size = (problem.vocab_size, problem.hidden_size)
    weight = torch.randn(size, generator=generator, device=device).bfloat16()
    times = []
    start, processor = time.perf_counter(), time.process_time()
    kmeans = BalancedKMeans(weight, problem.n_clusters)
    for _ in range(iterations):
        before = time.perf_counter()
        kmeans.step()  # reads its fit, and so waits for the device
        times.append(time.perf_counter() - before)
    kmeans.clusters().centroids.cpu()
    return time.perf_counter() - start, time.process_time() - processor, times


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("qwen3-vl-2b",))
@click.option("--device", default="cuda", show_default=True)
@click.option("--iterations", default=ITERATIONS, show_default=True)
def main(shapes: tuple[str, ...], device: str, iterations: int) -> None:
    """Time BalancedKMeans."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads of torch, {iterations} iterations\n")
    print("| shape | seconds | first iteration | median iteration | processor |")
    print("|---|---|---|---|---|")
    for shape in shapes:
        whole, processor, times = seconds_of(shape, device, iterations)
        print(
            f"| {shape} | {whole:.1f} | {times[0]:.2f} | {statistics.median(times):.2f} | "
            f"{processor:.1f} |"
        )


if __name__ == "__main__":
    main()
