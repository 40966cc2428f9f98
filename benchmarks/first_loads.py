"""How alike first loads choose: the same head loaded repeatedly, each time as if for the first.

    python benchmarks/first_loads.py [--shape NAME] [--loads 20] [--table FILE] [--json FILE]

Every load runs in its own process with an empty database, so that it probes the device and races;
compiled kernels are kept from one load to the next, as between boots. Then the winning configs are
timed side by side in this process, and the spread says how much slower the worst is than the best:
the target is 2 %. For each load it reports the peak memory of its race, and how many binaries
stayed loaded. Weights are random. Where a measured record ships nothing is raced, which tells
nothing and fails: --table gives a table of this device to use in place of the shipped one, such as
one with predicted records only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from flashtune import FlashHead
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.nvidia.driver import loaded
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.config import Config, parse_config, short_config
from flashtune.kernels.runtime import records
from flashtune.kernels.runtime.heat import compare
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.table import TuningTable, prebuilt_table, read_table

WHERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ASKED = 0.02
COMPARE_SECONDS = 60.0  # three times what the races of first loads have


def weights_of(problem: Problem) -> Weights:
    """Random weights, the same in every process."""
    return Workload.create(problem, WHERE, cold_bytes=0, seed=1).sets[0]


def load_once(problem: Problem, table: TuningTable | None) -> dict[str, Any]:
    """Load a head as a program does, and report what it runs.

    table: in place of its device's shipped one.
    """
    if table is not None:
        records.prebuilt_table = lambda name: (
            table if name == table.device else prebuilt_table(name)
        )
    weights = weights_of(problem)
    by_token = torch.empty_like(weights.weight)
    by_token[weights.ids.long()] = weights.weight
    head = FlashHead(
        by_token,
        weights.centroids,
        vocab_maps=weights.ids.view(problem.n_clusters, -1),
        n_probes=problem.n_probes,
        release_weight=True,
    )
    start = time.perf_counter()
    head.prepare(problem.n_tokens)
    seconds = time.perf_counter() - start
    binaries, size = loaded()
    found = head.explain(problem.n_tokens)
    race = found["race"] or {}
    return {
        "config": found["config"],
        "median_us": found["median_us"],
        "seconds": seconds,
        "race": {key: each for key, each in race.items() if key != "timed"},
        "raced": len([each for each in race.get("timed", ()) if each["median_us"]]),
        "binaries_loaded": binaries,
        "bytes_loaded": size,
        "troubles": found["troubles"],
    }


def loads_of(shape: str, count: int, table: Path | None) -> list[dict[str, Any]]:
    """The reports of `count` fresh processes, one after another; after Ctrl-C, of fewer."""
    own = ["--table", str(table)] if table else []
    answers = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            env = {
                **os.environ,
                "FLASHTUNE_DB": str(folder / f"{number}.db"),
                "FLASHTUNE_CACHE": str(folder / "cache"),
                "TRITON_CACHE_DIR": str(folder / "triton"),
            }
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--once", "--shape", shape, *own],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=env,
                )
            except KeyboardInterrupt:
                break
            answers.append(json.loads(done.stdout))
            print(f"load {number + 1} of {count}: {answers[-1]['seconds']:.1f} s", file=sys.stderr)
    return answers


def times_of(problem: Problem, configs: Sequence[Config]) -> dict[Config, float]:
    """The winners' times, side by side; a single one needs no comparison."""
    if len(configs) == 1:
        return {}
    found = compare(
        problem, weights_of(problem), device_of(WHERE), configs, seconds=COMPARE_SECONDS
    )
    return {
        each.config: each.measurement.median_us
        for each in found.entries
        if each.measurement and each.measurement.median_us
    }


@click.command()
@click.option("--shape", default="qwen3-vl-2b", show_default=True)
@click.option("--loads", "count", type=click.IntRange(2), default=20, show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="In place of the shipped one.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the result there.")
@click.option("--once", is_flag=True, hidden=True)
def main(shape: str, count: int, table: Path | None, output: Path | None, once: bool) -> None:
    """Load, compare, and print JSON."""
    problem = parse_shape(shape)
    if once:
        print(json.dumps(load_once(problem, read_table(table) if table else None)))
        return
    device = device_of(WHERE)
    loads = loads_of(shape, count, table)
    if not loads:
        raise click.ClickException("interrupted before the first load was done")
    won = Counter(json.dumps(each["config"], sort_keys=True) for each in loads)
    configs = [parse_config(json.loads(each)) for each in won]
    times = times_of(problem, configs)
    spread = max(times.values()) / min(times.values()) - 1 if times else 0.0
    result = {
        "device": device.name,
        "toolchain": str(toolchain(device)),
        "problem": problem.describe(),
        "loads": loads,
        "winners": [
            {
                "config": short_config(json.loads(text)),
                "loads": number,
                "median_us": times.get(config),
            }
            for (text, number), config in zip(won.items(), configs, strict=True)
        ],
        "spread": spread,
        "asked": ASKED,
        "asked_loads": count,
        "passed": spread <= ASKED
        and len(loads) == count
        and len(times) in (0, len(configs))
        and all(each["raced"] for each in loads),
    }
    text = json.dumps(result, indent=1)
    if output:
        output.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
