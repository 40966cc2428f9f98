"""Heads in fewer bits, side by side: the time of each alone, and after another kernel.

    python benchmarks/screens.py [--shape NAME]… [--tokens N]… [--screen SCREEN]… [--json FILE]

Contenders of each problem: the dense head in 16 bits, dense heads in int8 and int4 (our plan
`dense`, without re-scoring), the 16-bit head, the same with rows in place, and the head with each
screen. Each runs the runtime's own choice from the user's database and the shipped tables: search
first, for example `flashtune search --shape qwen3-vl-2b,weight=int8,centroids=int8,rescored=8`.

Prints a Markdown table. `behind` is the time of a step behind a kernel that writes its hidden
state, as in a decode; `alone`, of steps that follow one another. All graphs of a problem are timed
in turns in one process, on cold weights; times are medians. The floor of each
format is its fewest bytes over the read bandwidth measured here. Every kernel is verified before
it is timed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from bandwidth import read_bandwidth
from decode import dense

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.timing import BehindTimer, GraphTimer, Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, short_config
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.runtime.records import best_choice
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape

ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender's times in microseconds, and what it ran; `trouble` if it did not run."""

    problem: str
    contender: str
    alone_us: float | None = None
    behind_us: float | None = None
    floor_us: float | None = None
    level: str = ""
    config: str = ""
    trouble: str = ""


def contenders(plain: Problem, screens: Sequence[Screen]) -> dict[str, Problem]:
    """Each of our heads by its name in the table; ratios refer to the first."""
    found = {"16-bit": plain, "16-bit in place": replace(plain, in_place=True)}
    for name in ("int8", "int4"):
        found[f"dense {name}"] = Screen.parse(f"{name}:0").problem(plain)
    found |= {f"screen {screen}": screen.problem(plain) for screen in screens}
    return found


def chosen(name: str, problem: Problem, device: Device) -> tuple[Config, str]:
    """The config of a contender, and its source."""
    if name.startswith("dense "):
        return DenseConfig(), "fixed"
    choice = best_choice(problem, device, toolchain(device), [])
    return choice.config, choice.level.value


def compare(
    plain: Problem, screens: Sequence[Screen], device: Device, bandwidth: float, seed: int
) -> list[Row]:
    """The rows of one problem."""
    timers: dict[tuple[str, str], Timer] = {}
    rows: dict[str, Row] = {}
    where, kept = torch.device("cuda"), []
    for name, problem in contenders(plain, screens).items():
        workload = Workload.create(problem, where, cold_bytes=device.l2_bytes, seed=seed)
        kept.append(workload)
        if name == "16-bit":
            timers["dense 16-bit", "alone"] = GraphTimer(dense, workload)
            timers["dense 16-bit", "behind"] = BehindTimer(dense, workload)
            rows["dense 16-bit"] = Row(problem=plain.describe(), contender="dense 16-bit")
        floor_us = 1e6 * problem.minimum_bytes / bandwidth
        if name.startswith("dense "):
            matrix = (problem.vocab_size // problem.cluster_size) * problem.cluster_bytes
            floor_us = 1e6 * matrix / bandwidth
        row = Row(problem=plain.describe(), contender=name, floor_us=floor_us)
        try:
            config, level = chosen(name, problem, device)
            row = replace(row, level=level, config=short_config(config_data(config)))
            candidate = Candidate(problem, config, device)
            step = backend_of(candidate).loader(candidate, where)()
            reason = workload.why_wrong(step, **candidate.leeway)
            if reason:
                raise FlashtuneError(reason)
            timers[name, "alone"] = GraphTimer(step, workload)
            timers[name, "behind"] = BehindTimer(step, workload)
        except (FlashtuneError, RuntimeError) as error:
            row = replace(row, trouble=str(error).splitlines()[0])
        rows[name] = row
    samples = interleaved(list(timers.values()), ROUNDS)
    medians = {key: Timing.of(own).median_us for key, own in zip(timers, samples, strict=True)}
    return [
        replace(
            row,
            alone_us=medians.get((name, "alone")),
            behind_us=medians.get((name, "behind")),
        )
        for name, row in rows.items()
    ]


def print_table(rows: Sequence[Row]) -> None:
    """The rows as Markdown, with ratios to the 16-bit head of the same problem."""
    own = {row.problem: row for row in rows if row.contender == "16-bit"}
    headings = ("problem", "head", "alone", "behind", "floor", "behind / 16-bit", "runs")
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        ratio = None
        reference = own[row.problem].behind_us
        if row.behind_us is not None and reference is not None:
            ratio = row.behind_us / reference
        numbers = [
            *(f"{each:.1f}" if each is not None else "" for each in
              (row.alone_us, row.behind_us, row.floor_us)),
            f"{ratio:.2f}" if ratio is not None else "",
        ]  # fmt: skip
        runs = row.trouble or f"{row.level}: {row.config}"
        print("| " + " | ".join([row.problem, row.contender, *numbers, runs]) + " |")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("qwen3-vl-2b",), help="As for search.")
@click.option("--tokens", multiple=True, type=int, default=(1,), help="Rows of hidden states.")
@click.option("--screen", "screens", multiple=True, default=("int8",), help="As for a head.")
@click.option("--seed", default=1)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(
    shapes: Sequence[str],
    tokens: Sequence[int],
    screens: Sequence[str],
    seed: int,
    output: Path | None,
) -> None:
    """Time the heads of each shape and number of tokens."""
    device = device_of(torch.device("cuda", 0))
    bandwidth = read_bandwidth()
    print(f"{device.title}, {toolchain(device)}, read bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    parsed = [Screen.parse(text) for text in screens]
    rows: list[Row] = []
    for shape in shapes:
        for count in tokens:
            plain = parse_shape(f"{shape},tokens={count}")
            rows += compare(plain, parsed, device, bandwidth, seed)
            torch.cuda.empty_cache()
    print_table(rows)
    if output:
        data = {"device": device.name, "read_bandwidth": bandwidth, "rows": [*map(asdict, rows)]}
        output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
