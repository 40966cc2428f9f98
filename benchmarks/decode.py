"""The decode head side by side: dense, baseline, default, and what flashtune chooses.

    python benchmarks/decode.py [--shape NAME]… [--tokens N]… [--json FILE]

Prints a Markdown table. The times of a row are measured in turns in one process: CUDA graphs, each
step behind a kernel that writes its hidden state, cold weights, medians. The byte floor is the
fewest bytes over the read bandwidth measured here. Every kernel is verified against float64 before
it is timed. The choice is the runtime's own, from the user's database and the shipped tables.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from bandwidth import read_bandwidth

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import (
    backend_of,
    baseline_config,
    default_config,
    target_of,
)
from flashtune.kernels.measure.timing import BehindTimer, Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, short_config
from flashtune.kernels.runtime.records import best_choice
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import config_key

SHAPES = (
    "qwen3-vl-2b",
    "llama-3.2-1b",
    "qwen3-0.6b",
    "gemma-3-1b,probes=512",
    "llama-3.2-3b",
    "gemma-3-270m,probes=512",
)
ROUNDS = 8


def dense(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
    """The dense head: a product with the whole weight, then argmax."""
    logits = torch.nn.functional.linear(hidden, weights.weight)
    torch.argmax(logits, dim=-1, out=out)


def kernel_timer(config: Config, workload: Workload, device: Device) -> Timer:
    """A config's kernels, verified; raises RuntimeError if their tokens are wrong."""
    candidate = Candidate(workload.problem, config, device)
    step = backend_of(candidate).loader(candidate, torch.device("cuda"))()
    reason = workload.why_wrong(step, **candidate.leeway)
    if reason:
        raise RuntimeError(f"{config}: {reason}")
    return target_of(device).timer(step, workload)


def compare(problem: Problem, device: Device, bandwidth: float, seed: int) -> dict[str, object]:
    """One row: microseconds per call of each contender, and the chosen config."""
    workload = Workload.create(
        problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=seed
    )
    choice = best_choice(problem, device, toolchain(device), [])
    configs = {
        "baseline": baseline_config(problem, device),
        "default": default_config(problem, device),
        "winner": choice.config,
    }
    timers: dict[str, Timer] = {"dense": BehindTimer(dense, workload)}
    for name, config in configs.items():
        if config is not None:
            timers[name] = kernel_timer(config, workload, device)
    samples = interleaved(list(timers.values()), ROUNDS)
    times = {name: Timing.of(own).median_us for name, own in zip(timers, samples, strict=True)}
    return {
        "problem": problem.describe(),
        "tokens": problem.n_tokens,
        "floor_us": 1e6 * problem.minimum_bytes / bandwidth,
        "times_us": times,
        "level": choice.level.value,
        "config": short_config(choice.explain()["config"]) if choice.config else None,
        "config_key": config_key(choice.explain()["config"]) if choice.config else None,
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """The rows as Markdown."""
    names = ("dense", "baseline", "default", "winner")
    ratios = ("winner / floor", "dense / winner", "baseline / winner")
    headings = ("problem", *names, "floor", *ratios, "chosen")
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        times, floor = row["times_us"], row["floor_us"]
        assert isinstance(times, dict) and isinstance(floor, float)
        winner = times["winner"]
        cells = [
            row["problem"],
            *(f"{times[name]:.1f}" for name in names),
            f"{floor:.1f}",
            f"{winner / floor:.2f}",
            f"{times['dense'] / winner:.1f}",
            f"{times['baseline'] / winner:.1f}",
            f"{row['level']}: {row['config']}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="A shape, as for search.")
@click.option("--tokens", multiple=True, type=int, default=(1,), help="Rows of hidden states.")
@click.option("--seed", default=1)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], tokens: Sequence[int], seed: int, output: Path | None) -> None:
    """Time the decode head of each shape and number of tokens."""
    device = device_of(torch.device("cuda", 0))
    if device is None:
        raise click.ClickException("this benchmark needs an NVIDIA GPU")
    bandwidth = read_bandwidth()
    print(f"{device.title}, {toolchain(device)}, read bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    problems = [parse_shape(f"{shape},tokens={count}") for shape in shapes for count in tokens]
    rows = []
    for problem in problems:
        rows.append(compare(problem, device, bandwidth, seed))
        torch.cuda.empty_cache()
        if output:  # after each row in case a later one fails
            data = {"device": device.name, "read_bandwidth": bandwidth, "rows": rows}
            output.write_text(json.dumps(data, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
