"""The race at first load, on this machine's GPU, or else its CPU.

    python benchmarks/race.py [--shape NAME]… [--json FILE]

The benchmark pretends that this device's shipped table is only predicted: it makes a database from
the table's winners and the known good configs, marked as predicted, and reads no shipped table.
Then every start is its own process, on random weights: a first one with empty caches, which races,
a second one, and two at once on another database. Prints a Markdown table: the seconds from the
call of `prepare` until a kernel is ready, and what was raced.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from flashtune import FlashHead
from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import known_good
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data, short_config
from flashtune.kernels.runtime import records
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table

SHAPES = ("qwen3-vl-2b", "gemma-3-270m,probes=512")
WHERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pretended_records(problem: Problem, device: Device) -> list[Record]:
    """Up to 8 configs as if a cost model had ranked them: the shipped winner first."""
    table = prebuilt_table(device.name)
    shipped = [each.config for each in (table.records if table else ()) if each.problem == problem]
    good = [
        config_data(config)
        for config in known_good(problem, device)
        if Candidate(problem, config, device).why_invalid() is None
    ]
    configs = {json.dumps(dict(config), sort_keys=True): config for config in [*shipped, *good]}
    return [
        Record(
            device=device.name,
            toolchain=Toolchain(triton=toolchain(device).triton),
            problem=problem,
            config=config,
            provenance=Provenance.PREDICTED,
            measurement=Measurement(
                outcome=Outcome.OK, median_us=1.0 + number, policy="pretended"
            ),
            created="2026-01-01T00:00:00Z",
        )
        for number, config in enumerate(list(configs.values())[:MOST])
    ]


def make_head(problem: Problem) -> FlashHead:
    """A head with random weights."""
    weights: Weights = Workload.create(problem, WHERE, cold_bytes=0, seed=1).sets[0]
    by_token = torch.empty_like(weights.weight)
    by_token[weights.ids.long()] = weights.weight
    maps = weights.ids.view(problem.n_clusters, -1)
    return FlashHead(
        by_token,
        weights.centroids,
        vocab_maps=maps,
        n_probes=problem.n_probes,
        release_weight=True,
    )


def start_once(problem: Problem) -> None:
    """In its own process: make a head, wait for a line, prepare the head, report the result."""
    records.prebuilt_table = lambda name: None
    device_of(WHERE)  # measures a CPU's bandwidth unless that was done already
    head = make_head(problem)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    head.prepare(problem.n_tokens)
    seconds = time.perf_counter() - start
    token = head(torch.randn(problem.n_tokens, problem.hidden_size, device=WHERE))
    assert bool(((token >= 0) & (token < problem.vocab_size)).all())
    print(json.dumps({"seconds": seconds, **head.explain(problem.n_tokens)}), flush=True)


def start_processes(shape: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """The reports of `count` processes that prepare heads at the same time."""
    env = {
        **os.environ,
        "FLASHTUNE_DB": str(folder / "tuning.db"),
        "FLASHTUNE_CACHE": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--once", "--shape", shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n", "a process failed"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate()[0]) for process in processes]
    assert not any(process.returncode for process in processes)
    return answers


def measure(shape: str, device: Device) -> dict[str, Any]:
    """The starts of one shape: the first, the second, and two at once."""
    problem = parse_shape(shape)
    starts = {}
    for names in (("first", "second"), ("at once",)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with Store(folder / "tuning.db") as store:
                for record in pretended_records(problem, device):
                    store.add(record)
            for each in names:
                starts[each] = start_processes(shape, folder, 2 if each == "at once" else 1)
    return {"problem": problem.describe(), "starts": starts}


def print_row(row: dict[str, Any]) -> None:
    """Print a shape's row of the table, what was timed, and the results of the two processes."""
    [first], [second] = row["starts"]["first"], row["starts"]["second"]
    race = first["race"]
    if race is None or race["why_not"]:
        why_not = race["why_not"] if race else "the record is as good as measured"
        print(f"\n{row['problem']}: not raced: {why_not}")
        return
    cells = [
        row["problem"],
        *(f"{race[name]:.2f}" for name in ("compile_seconds", "run_seconds")),
        f"{first['median_us']:.1f}",
        f"{race['timed'][0]['median_us'] or float('nan'):.1f}",
        *(f"{each['seconds']:.2f}" for each in (first, second)),
    ]
    heads = ("problem", "compile s", "verify and time s", "winner us", "default us", "first start")
    print("\n| " + " | ".join((*heads, "second start")) + " |\n" + "|---" * 7 + "|")
    print("| " + " | ".join(cells) + " |\n")
    for each in race["timed"]:
        time_us = f"{each['median_us']:8.1f} us" if each["median_us"] else " " * 11
        print(f"{time_us}  {short_config(each['config'])}: {each['dropped'] or 'the winner'}")
    print(f"centroids {race['centroids']}; second start: {second['why']}")
    for each in row["starts"]["at once"]:
        held = each["race"] or {}
        how = "raced" if held.get("timed") else held.get("why_not") or "found the winner"
        print(f"of two at once: {each['seconds']:.2f} s, {how}; {short_config(each['config'])}")
    configs = [each["config"] for each in row["starts"]["at once"]]
    print("they agree" if configs[0] == configs[1] else "THEY DO NOT AGREE")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="A shape, as for search.")
@click.option("--once", is_flag=True, hidden=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], once: bool, output: Path | None) -> None:
    """Race for each shape."""
    if once:
        start_once(parse_shape(shapes[0]))
        return
    device = device_of(WHERE)
    if device is None:
        raise click.ClickException("this machine has no device with kernels")
    print(f"{device.title}, {toolchain(device)}")
    rows = []
    for shape in shapes:
        rows.append(measure(shape, device))
        print_row(rows[-1])
    if output:
        output.write_text(json.dumps({"device": device.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
