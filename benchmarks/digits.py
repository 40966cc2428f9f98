"""Ways to multiply quantised rows, side by side: widened numbers, and hidden states in digits.

    python benchmarks/digits.py [--shape NAME]… [--screen SCREEN]… [--tokens N]… [--json FILE]

For each problem: the runtime's own choice from the user's database and the shipped tables, the
known starting points that widen, and a few configs that multiply by digits. `--db` adds the best
three configs by digits of a database, which `flashtune search --fix widen=digits` has measured.
Each is compiled, verified against float64 and timed, all of a problem in turns, on cold weights:
alone, and behind another kernel.

Prints a Markdown table, fastest first. The floor is the fewest bytes over the read bandwidth
measured here.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from bandwidth import read_bandwidth

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of, known_good
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.timing import BehindTimer, GraphTimer, Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, parse_config, short_config
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.predict.cost_model import predict
from flashtune.kernels.runtime.records import best_choice
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.store import Store

ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config's times in microseconds; `trouble` if it did not run or was wrong."""

    problem: str
    way: str
    config: dict[str, Any]
    predicted_us: float | None = None
    alone_us: float | None = None
    behind_us: float | None = None
    floor_us: float
    trouble: str = ""


def by_digits(problem: Problem, pdl: bool) -> list[Config]:
    """Configs to try: tiles of 16 rows a warp, 128 or 256 bytes wide, with loads under way."""
    tiles = [(16, 1), (32, 2), (64, 4)]
    wide = 2 if problem.centroid_dtype == "int4" else 1
    if problem.n_tokens == 1:
        found = [
            StagedConfig(
                widen="digits",
                score_rows=rows,
                score_block=wide * block,
                score_warps=warps,
                score_stages=stages,
                slack=8,
                gather_rows=min(rows, 32),
                gather_block=256,
                gather_warps=min(warps, 2),
                gather_stages=stages,
                pdl=pdl,
            )
            for rows, warps in tiles
            for block, stages in ((128, 4), (256, 3))
        ]
        return [*found, BatchedConfig(widen="digits", visit="listed", gather_rows=16, pdl=pdl)]
    blocks = {"int4": 64, "int8": 128}
    listed = [
        BatchedConfig(
            widen="digits",
            score_rows=rows,
            score_block=blocks[problem.centroid_dtype],
            score_warps=warps,
            score_stages=4,
            select_warps=8,
            visit="listed",
            gather_rows=rows,
            gather_block=blocks[problem.weight_dtype],
            gather_warps=warps,
            gather_stages=4,
            pdl=pdl,
        )
        for rows, warps in (*tiles, (64, 2))
    ]
    return [*listed, DenseConfig(widen="digits", pdl=pdl)]


def measured(problem: Problem, device: Device, database: Path | None) -> list[Config]:
    """The best three configs by digits that a database has for the problem."""
    if database is None:
        return []
    with Store(database, read_only=True) as store:
        records = store.records(device=device.name, problem=problem)
    timed = [
        (each.measurement.median_us, parse_config(each.config))
        for each in records
        if each.measurement.median_us is not None and each.config.get("widen") == "digits"
    ]
    return [config for _, config in sorted(timed, key=lambda each: each[0])[:3]]


def contenders(problem: Problem, device: Device, database: Path | None) -> dict[Config, str]:
    """Configs that are valid, and why each is there."""
    choice = best_choice(problem, device, toolchain(device), [])
    pdl = device.capability >= 90
    found = {choice.config: f"chosen ({choice.level.value})"}
    for config in (*by_digits(problem, pdl), *measured(problem, device, database)):
        found.setdefault(config, "digits")
    for config in known_good(problem, device):
        if getattr(config, "pdl", pdl) == pdl and getattr(config, "widen", "") != "digits":
            found.setdefault(config, "widened")
    return {
        config: name
        for config, name in found.items()
        if Candidate(problem, config, device).why_invalid() is None
    }


def compare(
    problem: Problem,
    device: Device,
    bandwidth: float,
    database: Path | None,
    seed: int,
) -> list[Row]:
    """The rows of one problem."""
    where = torch.device("cuda")
    workload = Workload.create(problem, where, cold_bytes=device.l2_bytes, seed=seed)
    timers: dict[tuple[Config, str], Timer] = {}
    rows: dict[Config, Row] = {}
    for config, way in contenders(problem, device, database).items():
        candidate = Candidate(problem, config, device)
        row = Row(
            problem=problem.describe(),
            way=way,
            config=config_data(config),
            floor_us=1e6 * problem.minimum_bytes / bandwidth,
        )
        try:
            backend = backend_of(candidate)
            row = replace(row, predicted_us=predict(candidate, backend.compile(candidate)).time_us)
            step = backend.loader(candidate, where)()
            reason = workload.why_wrong(step, **candidate.leeway)
            if reason:
                raise FlashtuneError(f"wrong: {reason}")
            timers[config, "alone"] = GraphTimer(step, workload)
            timers[config, "behind"] = BehindTimer(step, workload)
        except (FlashtuneError, RuntimeError) as error:
            row = replace(row, trouble=str(error).splitlines()[0])
        rows[config] = row
    samples = interleaved(list(timers.values()), ROUNDS)
    medians = {key: Timing.of(own).median_us for key, own in zip(timers, samples, strict=True)}
    return [
        replace(
            row,
            alone_us=medians.get((config, "alone")),
            behind_us=medians.get((config, "behind")),
        )
        for config, row in rows.items()
    ]


def print_table(rows: Sequence[Row]) -> None:
    """The rows as Markdown, fastest first; those that failed below."""
    headings = ("problem", "way", "alone", "behind", "floor", "predicted", "config")
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    ran = [(row.behind_us, row) for row in rows if row.behind_us is not None]
    for behind_us, row in sorted(ran, key=lambda each: each[0]):
        times = (row.alone_us, behind_us, row.floor_us, row.predicted_us)
        cells = [
            *(f"{each:.1f}" if each is not None else "" for each in times),
            short_config(row.config),
        ]
        print("| " + " | ".join([row.problem, row.way, *cells]) + " |")
    for row in rows:
        if row.trouble:
            print(f"\n{row.problem}, {row.way}: {short_config(row.config)}: {row.trouble}")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("qwen3-vl-2b",), help="As for search.")
@click.option("--screen", "screens", multiple=True, default=("int8", "int4/int8", "int4"))
@click.option("--tokens", multiple=True, type=int, default=(1, 8, 32), help="Rows of states.")
@click.option(
    "--db", "database", type=click.Path(path_type=Path, exists=True), help="Of searches."
)
@click.option("--seed", default=1)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(
    shapes: Sequence[str],
    screens: Sequence[str],
    tokens: Sequence[int],
    database: Path | None,
    seed: int,
    output: Path | None,
) -> None:
    """Verify and time ways to multiply quantised rows."""
    device = device_of(torch.device("cuda", 0))
    assert device is not None
    bandwidth = read_bandwidth()
    print(f"{device.title}, {toolchain(device)}, read bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    rows: list[Row] = []
    for shape in shapes:
        for screen in screens:
            for count in tokens:
                problem = Screen.parse(screen).problem(parse_shape(f"{shape},tokens={count}"))
                found = compare(problem, device, bandwidth, database, seed)
                print_table(found)
                print(flush=True)
                rows += found
                torch.cuda.empty_cache()
    if output:
        data = {"device": device.name, "read_bandwidth": bandwidth, "rows": [*map(asdict, rows)]}
        output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
