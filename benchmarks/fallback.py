"""What a shape without records of its own gets: the nearest shape's record, timed.

    python benchmarks/fallback.py [--shape NAME]… [--json FILE]

Leaves out one shape of the shipped table at a time, with all its numbers of probes and tokens, and
lets the runtime's own selection choose among the remaining records, for the problems of one token
with the argmax epilogue. Prints a Markdown table of that choice, the shape's own winner and the
default, timed in turns in one process: CUDA graphs, cold weights, medians, every kernel verified
against float64 first. The user's database is not read.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of, default_config, target_of
from flashtune.kernels.measure.timing import Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, short_config
from flashtune.kernels.runtime.choice import PREBUILT, Choice, Source, choose
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.table import prebuilt_table

ROUNDS = 8
_SHAPE = ("vocab_size", "hidden_size", "n_clusters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contenders:
    """The configs to compare for one problem."""

    winner: Config
    nearest: Config
    default: Config
    choice: Choice  # of `nearest`: its record, and in what that differs


def shape_of(problem: Problem) -> tuple[int, ...]:
    """What a problem shares with others of its model, for any number of probes."""
    return tuple(getattr(problem, name) for name in _SHAPE)


def contenders(
    problem: Problem, device: Device, tools: Toolchain, records: Sequence[Record]
) -> Contenders | None:
    """The problem's own winner, the choice without its shape's records, and the default.

    None if the records have no winner for the problem.
    """
    others = [record for record in records if shape_of(record.problem) != shape_of(problem)]
    own = choose(problem, device, tools, [Source(name=PREBUILT, records=records)])
    left = choose(problem, device, tools, [Source(name=PREBUILT, records=others)])
    if own.record is None or own.record.problem != problem or not own.config or not left.config:
        return None
    return Contenders(
        winner=own.config,
        nearest=left.config,
        default=default_config(problem, device),
        choice=left,
    )


def usual_problems(records: Sequence[Record]) -> list[Problem]:
    """The problems of one token with the argmax epilogue."""
    problems = {record.problem for record in records}
    return sorted(each for each in problems if (each.n_tokens, each.epilogue) == (1, "argmax"))


def _timer(config: Config, workload: Workload, device: Device) -> Timer:
    """A config's kernels, verified; raises ClickException if their tokens are wrong."""
    candidate = Candidate(workload.problem, config, device)
    where = torch.device(target_of(device).torch_device)
    step = backend_of(candidate).loader(candidate, where)()
    reason = workload.why_wrong(step, **candidate.leeway)
    if reason:
        raise click.ClickException(f"{workload.problem.describe()}, {config}: {reason}")
    return target_of(device).timer(step, workload)


def compare(
    problem: Problem, device: Device, compared: Contenders, seed: int
) -> dict[str, object]:
    """One row: microseconds per call of each contender, and the slowdowns from the winner."""
    where = torch.device(target_of(device).torch_device)
    workload = Workload.create(problem, where, cold_bytes=device.l2_bytes, seed=seed)
    configs = {name: getattr(compared, name) for name in ("winner", "nearest", "default")}
    timers = {
        config: _timer(config, workload, device) for config in dict.fromkeys(configs.values())
    }
    samples = interleaved(list(timers.values()), ROUNDS)
    timings = {config: Timing.of(own) for config, own in zip(timers, samples, strict=True)}
    winner_us = timings[compared.winner].median_us
    record = compared.choice.record
    return {
        "problem": problem.describe(),
        "times_us": {name: timings[config].median_us for name, config in configs.items()},
        "spreads_us": {name: timings[config].spread_us for name, config in configs.items()},
        "slowdown": {
            name: timings[configs[name]].median_us / winner_us for name in ("nearest", "default")
        },
        "level": compared.choice.level.value,
        "from": record.problem.describe() if record else None,
        "config": short_config(config_data(compared.nearest)),
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """The rows as Markdown, and the median slowdowns."""
    headings = (
        "problem", "winner", "nearest", "default", "nearest / winner", "default / winner",
        "level", "nearest is of",
    )  # fmt: skip
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    slowdowns: dict[str, list[float]] = {"nearest": [], "default": []}
    for row in rows:
        times, slower = row["times_us"], row["slowdown"]
        assert isinstance(times, dict) and isinstance(slower, dict)
        cells = [
            row["problem"],
            *(f"{times[name]:.1f}" for name in ("winner", "nearest", "default")),
            *(f"{slower[name]:.2f}" for name in slowdowns),
            row["level"],
            row["from"] or "",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
        for name, own in slowdowns.items():
            own.append(slower[name])
    for name, own in slowdowns.items():
        print(f"\n{name}: median {statistics.median(own):.3f}, worst {max(own):.3f} x the winner")


@click.command()
@click.option("--shape", "shapes", multiple=True, help="Only this problem of the table.")
@click.option("--seed", default=1)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], seed: int, output: Path | None) -> None:
    """Time what is chosen for each shape of the shipped table without its own records."""
    device = device_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if device is None:
        raise click.ClickException("this benchmark needs an NVIDIA GPU")
    table = prebuilt_table(device.name)
    if table is None:
        raise click.ClickException(
            f"no table ships for {device.name}: there is nothing to leave out"
        )
    tools = toolchain(device)
    wanted = [parse_shape(shape) for shape in shapes]
    problems = wanted or usual_problems(table.records)
    print(f"{device.title}, {tools}\n")
    rows, start = [], time.monotonic()
    for number, problem in enumerate(problems, start=1):
        compared = contenders(problem, device, tools, table.records)
        if compared is None:
            raise click.ClickException(f"the table has no record of {problem.describe()}")
        rows.append(compare(problem, device, compared, seed))
        torch.cuda.empty_cache()
        spent = time.monotonic() - start
        click.echo(f"{number}/{len(problems)} {problem.describe()}, {spent:.0f} s", err=True)
    print_table(rows)
    if output:
        data = {"device": device.name, "rows": rows}
        output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
