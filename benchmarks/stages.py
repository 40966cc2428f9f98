"""Where the time of a decode step goes, launch by launch.

    python benchmarks/stages.py [--shape NAME]… [--json FILE]

Times the fastest recorded configs of each shape, one per plan, with some launches left out, in
turns, as decode.py does: the score launch alone, and all other launches. Without the score launch,
each call finds the first call's scores and selects the same rows, so that these are in the L2
cache: what remains is the work and the latency of selecting, gathering and arriving. The table
also shows the bytes that each pass must read over the read bandwidth measured here.

In a graph of steps alone, a step's first launch may begin while the previous step's last one still
runs. `after torch's` is the time that a step adds to a torch kernel that writes its hidden state,
which lets nothing begin early: a graph of both, less a graph of that kernel.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from bandwidth import read_bandwidth

from flashtune.kernels.backends.gpu import LaunchedStep
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.measure.timing import GraphTimer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, parse_config
from flashtune.kernels.runtime.records import read_sources
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Outcome

SHAPES = ("qwen3-vl-2b", "llama-3.2-1b", "qwen3-0.6b", "gemma-3-1b,probes=512")
ROUNDS = 8
PLANS = 2  # configs per shape


def part_of(step: LaunchedStep, kernels: Sequence[str]) -> Step:
    """A step that launches only these kernels."""
    launches = [launch for launch in step.launches if launch.kernel in kernels]

    def run(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        step.launch(launches, weights, hidden, out)

    return run


def after_torch(step: Step | None) -> Step:
    """The step, if any, after a torch kernel that writes its hidden state."""

    def run(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        hidden.mul_(1)
        if step is not None:
            step(weights, hidden, out)

    return run


def fastest(problem: Problem, device: Device) -> list[Config]:
    """The fastest recorded config of each of the `PLANS` fastest plans."""
    found: dict[str, tuple[float, Config]] = {}
    for source in read_sources(device, problem, []):
        for record in source.records:
            time_us = record.measurement.median_us
            if record.measurement.outcome is Outcome.OK and time_us is not None:
                config = parse_config(record.config)
                if config.plan not in found or time_us < found[config.plan][0]:
                    found[config.plan] = time_us, config
    return [config for _, config in sorted(found.values(), key=lambda each: each[0])[:PLANS]]


def measure(
    problem: Problem, device: Device, bandwidth: float, seed: int
) -> list[dict[str, object]]:
    """A row for each config: microseconds of the whole step, and of its parts."""
    workload = Workload.create(
        problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=seed
    )
    alone = GraphTimer(after_torch(None), workload)
    timers, rows = [alone], []
    for config in fastest(problem, device):
        candidate = Candidate(problem, config, device)
        step = backend_of(candidate).loader(candidate, torch.device("cuda"))()
        assert isinstance(step, LaunchedStep)
        names = [launch.kernel for launch in step.launches]
        parts = {"whole": step, "after torch's": after_torch(step)}
        if names[0] == "score" and "torch_topk" not in names:
            parts["score"] = part_of(step, names[:1])
            parts["rest, rows in L2"] = part_of(step, names[1:])
        timers += [GraphTimer(part, workload) for part in parts.values()]
        rows.append((config, names, list(parts)))
    medians = iter(Timing.of(own).median_us for own in interleaved(timers, ROUNDS))
    alone_us = next(medians)
    found: list[dict[str, object]] = []
    for config, names, parts_of_row in rows:
        times = {name: next(medians) for name in parts_of_row}
        times["after torch's"] -= alone_us
        found.append(
            {
                "problem": problem.describe(),
                "plan": config.plan,
                "launches": names,
                "times_us": times,
                "score_bytes_us": 1e6 * problem.centroid_bytes / bandwidth,
                "gather_bytes_us": 1e6 * (problem.read_bytes - problem.centroid_bytes) / bandwidth,
            }
        )
    return found


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """The rows as Markdown."""
    names = ("whole", "after torch's", "score", "rest, rows in L2")
    print(
        "| problem | plan: launches | " + " | ".join(names) + " | score's bytes | gather's bytes |"
    )
    print("|---" * (len(names) + 4) + "|")
    for row in rows:
        times, launches = row["times_us"], row["launches"]
        assert isinstance(times, dict) and isinstance(launches, list)
        cells = [
            row["problem"],
            f"{row['plan']}: {', '.join(launches)}",
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
    rows: list[dict[str, object]] = []
    for shape in shapes:
        rows += measure(parse_shape(shape), device, bandwidth, seed)
        torch.cuda.empty_cache()
    print_table(rows)
    if output:
        output.write_text(json.dumps({"device": device.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
