"""What timing behind another kernel changes: which config wins, and by how much.

    python benchmarks/behind.py --db FILE [--shape NAME]… [--json FILE]

Of each problem, the fastest configs on record in the database, some of each plan, are timed in two
ways in one process, in turns: back to back (a step may begin while the one before it still runs),
and behind a kernel that writes the hidden state, as decode runs them. Prints the winner of each
way, and how much slower the first is, behind, than the second. Every config is verified first.

With --shortlist, what a first load would race takes part, if the device had only the predicted
records of the database, beside the shipped tables of other devices. The last columns say how much
slower the best of these is than the best of all, and the first choice, the one with the shortest
predicted time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.measure.timing import BehindTimer, GraphTimer, Timer, Timing, interleaved
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, parse_config, short_config
from flashtune.kernels.runtime.choice import PREBUILT, USER, Source, contenders
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Provenance, Record
from flashtune.tuning_db.shortlist import MOST, shortlist
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table

SHAPES = (
    "qwen3-vl-2b",
    "llama-3.2-1b",
    "qwen3-0.6b",
    "gemma-3-1b,probes=512",
    "llama-3.2-3b",
    "gemma-3-270m,probes=512",
    "llama-3.1-8b",
    "qwen3.5-2b",
)
OF_ALL, OF_EACH_PLAN = 4, 2
ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One problem. Times are microseconds: of the winner alone, and of both behind a kernel."""

    problem: str
    configs: int
    alone: str
    alone_us: float
    alone_behind_us: float
    behind: str
    behind_us: float
    shortlist: str = ""
    shortlist_us: float | None = None
    first_us: float | None = None

    @property
    def loss(self) -> float:
        """How much slower the back-to-back winner is behind a kernel."""
        return self.alone_behind_us / self.behind_us - 1

    def slower(self, time_us: float | None) -> str:
        """How much slower a time is than the best of all, as text."""
        return "" if time_us is None else f"{100 * (time_us / self.behind_us - 1):+.1f} %"


def measured(records: Sequence[Record]) -> list[Config]:
    """The fastest measured configs, and the fastest of each plan."""
    timed = [each for each in records if each.provenance is Provenance.MEASURED]
    timed.sort(key=lambda each: each.measurement.median_us or 0.0)
    by_plan: dict[object, list[Record]] = {}
    for record in timed:
        by_plan.setdefault(record.config["plan"], []).append(record)
    chosen = [*timed[:OF_ALL], *(each for own in by_plan.values() for each in own[:OF_EACH_PLAN])]
    return list(dict.fromkeys(parse_config(record.config) for record in chosen))


def raced(problem: Problem, device: Device, records: Sequence[Record]) -> list[Config]:
    """What a first load would race, the first choice first; the default is not among them."""
    guesses = [each for each in records if each.provenance is Provenance.PREDICTED]
    sources = [Source(name=USER, records=shortlist(guesses, MOST))]
    for name in prebuilt_devices():
        table = prebuilt_table(name)
        if table and name != device.name:
            sources.append(Source(name=PREBUILT, records=table.records))
    return contenders(problem, device, toolchain(device), sources)[1:]


def compare(problem: Problem, device: Device, store: Store, with_shortlist: bool) -> Row | None:
    """One row; None if nothing is on record."""
    records = store.records(device=device.name, problem=problem, ok_only=True)
    guesses = raced(problem, device, records) if with_shortlist else []
    configs = list(dict.fromkeys([*measured(records), *guesses]))
    workload = Workload.create(problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=1)
    timers: dict[tuple[Config, str], Timer] = {}
    for config in configs:
        candidate = Candidate(problem, config, device)
        try:
            step = backend_of(candidate).loader(candidate, torch.device("cuda"))()
        except Exception as error:  # of a compiler: the others go on
            click.echo(f"{short_config(config_data(config))}: {error}", err=True)
            continue
        reason = workload.why_wrong(step, **candidate.leeway)
        if reason:
            raise click.ClickException(f"{short_config(config_data(config))}: {reason}")
        timers[config, "alone"] = GraphTimer(step, workload)
        timers[config, "behind"] = BehindTimer(step, workload)
    if not timers:
        return None
    samples = interleaved(list(timers.values()), ROUNDS)
    medians = {key: Timing.of(own).median_us for key, own in zip(timers, samples, strict=True)}
    behind = {config: time for (config, way), time in medians.items() if way == "behind"}
    alone = {config: time for (config, way), time in medians.items() if way == "alone"}
    first, best = min(alone, key=alone.__getitem__), min(behind, key=behind.__getitem__)
    listed = [config for config in guesses if config in behind]
    best_listed = min(listed, key=behind.__getitem__, default=None)
    return Row(
        problem=problem.describe(),
        configs=len(behind),
        alone=short_config(config_data(first)),
        alone_us=alone[first],
        alone_behind_us=behind[first],
        behind=short_config(config_data(best)),
        behind_us=behind[best],
        shortlist=short_config(config_data(best_listed)) if best_listed else "",
        shortlist_us=behind[best_listed] if best_listed else None,
        first_us=behind[listed[0]] if listed else None,
    )


def print_table(rows: Sequence[Row]) -> None:
    """The rows as Markdown."""
    headings = (
        "problem", "configs", "winner back to back", "alone", "behind", "winner behind", "behind",
        "loss", "best of a race", "first choice",
    )  # fmt: skip
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        cells = [
            row.problem, row.configs, row.alone, f"{row.alone_us:.1f}",
            f"{row.alone_behind_us:.1f}", row.behind, f"{row.behind_us:.1f}",
            f"{100 * row.loss:+.1f} %", row.slower(row.shortlist_us), row.slower(row.first_us),
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, help="A shape, as for search.")
@click.option("--db", "database", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--shortlist", "with_shortlist", is_flag=True, help="With what a race would time.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows there.")
def main(shapes: Sequence[str], database: Path, with_shortlist: bool, output: Path | None) -> None:
    """Time each shape's best configs in both ways."""
    device = device_of(torch.device("cuda", 0))
    print(f"{device.title}, {toolchain(device)}\n")
    rows: list[Row] = []
    with Store(database, read_only=True) as store:
        for shape in shapes:
            row = compare(parse_shape(shape), device, store, with_shortlist)
            rows += [row] if row else []
            torch.cuda.empty_cache()
            click.echo(f"{shape} is done", err=True)
            if output:
                data = {"device": device.name, "rows": [asdict(row) for row in rows]}
                output.write_text(json.dumps(data, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
