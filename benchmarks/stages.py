"""Where the time of a decode step goes, launch by launch.

    python benchmarks/stages.py [--shape NAME]… [--json FILE]

Times the chosen config of each shape with launches left out, in turns, as decode.py does: the
score launch alone, and all without it. Without it, each call finds the scores of the first and
the same rows selected, so that these lie in the L2 cache: what is left is the work and the
latency of selecting, gathering and arriving. Beside them stands what each pass must read, over
the read bandwidth measured here.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from bandwidth import read_bandwidth

from flashtune.kernels.backend import backend_of
from flashtune.kernels.binding import best_choice
from flashtune.kernels.layout import Step, Weights
from flashtune.kernels.this_device import device_of, toolchain
from flashtune.kernels.timing import GraphTimer, Timing, interleaved
from flashtune.kernels.triton_backend import DecodeStep
from flashtune.kernels.workload import Workload
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem, parse_shape

SHAPES = ("qwen3-vl-2b", "llama-3.2-1b", "qwen3-0.6b", "gemma-3-1b,probes=512")
ROUNDS = 8


def part_of(step: DecodeStep, kernels: Sequence[str]) -> Step:
    """A step that launches only these kernels."""
    launches = [launch for launch in step.launches if launch[0] in kernels]

    def run(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        step.launch(launches, weights, hidden, out)

    return run


def measure(problem: Problem, device: Device, bandwidth: float, seed: int) -> dict[str, object]:
    """One row: microseconds of the whole step, and of its parts."""
    workload = Workload.create(
        problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=seed
    )
    config = best_choice(problem, device, toolchain(device), []).config
    if config is None:
        raise click.ClickException(f"no kernel for {problem.describe()}")
    step = backend_of(device).loader(problem, config, device, torch.device("cuda"))()
    assert isinstance(step, DecodeStep)
    names = [name for name, _ in step.launches]
    parts: dict[str, Sequence[str]] = {"whole": names}
    if names[0] == "score" and "torch_topk" not in names:
        parts |= {"score": names[:1], "rest, rows in L2": names[1:]}
    timers = [GraphTimer(part_of(step, kernels), workload) for kernels in parts.values()]
    samples = interleaved(timers, ROUNDS)
    times = {name: Timing.of(own).median_us for name, own in zip(parts, samples, strict=True)}
    return {
        "problem": problem.describe(),
        "launches": names,
        "times_us": times,
        "score_bytes_us": 1e6 * problem.centroid_bytes / bandwidth,
        "gather_bytes_us": 1e6 * (problem.read_bytes - problem.centroid_bytes) / bandwidth,
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """The rows as Markdown."""
    names = ("whole", "score", "rest, rows in L2")
    print("| problem | launches | " + " | ".join(names) + " | score's bytes | gather's bytes |")
    print("|---" * (len(names) + 4) + "|")
    for row in rows:
        times, launches = row["times_us"], row["launches"]
        assert isinstance(times, dict) and isinstance(launches, list)
        cells = [
            row["problem"],
            ", ".join(launches),
            *(f"{times[name]:.1f}" if name in times else "" for name in names),
            f"{row['score_bytes_us']:.1f}",
            f"{row['gather_bytes_us']:.1f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="A shape, as for search.")
@click.option("--seed", default=1)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], seed: int, output: Path | None) -> None:
    """Time the decode step of each shape, launch by launch."""
    device = device_of(torch.device("cuda", 0))
    if device is None:
        raise click.ClickException("this benchmark needs an NVIDIA GPU")
    bandwidth = read_bandwidth()
    print(f"{device.title}, {toolchain(device)}, read bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    rows = []
    for shape in shapes:
        rows.append(measure(parse_shape(shape), device, bandwidth, seed))
        torch.cuda.empty_cache()
    print_table(rows)
    if output:
        output.write_text(json.dumps({"device": device.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
