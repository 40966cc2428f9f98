"""The decode head on this machine's CPU, side by side: dense, plain torch, flashtune.

    python benchmarks/cpu_decode.py [--shape NAME]… [--rounds N] [--json FILE]
    python benchmarks/cpu_decode.py --formats [--simd LEVEL] [--rounds N]

Prints a Markdown table per shape; with --formats a table of the number formats instead, each with
its own byte floor. All rows are timed in turns in one process, on cold weights, by the wall clock;
the times are medians over the rounds, the ratio to the floor is the median of each round's ratio.
The byte floor is the time a C++ loop takes to read as many bytes as a step must, with one thread
or with all, whichever is faster, in the same rounds. Every kernel is verified against float64
before it is timed. The choice is the runtime's own, so run `flashtune search --device cpu --shape
…` first. With --simd the kernels are those for a CPU whose best instructions these are.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch.nn.functional import linear

from flashtune.kernels.backends.cpp.huge_pages import advise
from flashtune.kernels.backends.cpp.read_bandwidth import Reader, render_read
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.backends.target import (
    backend_of,
    baseline_config,
    default_config,
)
from flashtune.kernels.measure.timing import WallTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate, plans_of
from flashtune.kernels.plans.config import Config, config_data, short_config
from flashtune.kernels.plans.parts.simd import SIMD_LEVELS
from flashtune.kernels.runtime.records import best_choice
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem, parse_shape

SHAPES = ("qwen3-0.6b", "vocab=49152,hidden=576,clusters=3072,probes=128")
READ_BYTES = 2**28  # of a buffer through which reads rotate
IDLE_S = 0.005


@dataclass(frozen=True)
class Row:
    """A row of the table; `floor_ratio` is relative to the byte floor of the same round."""

    name: str
    median_us: float
    least_us: float
    floor_ratio: float
    detail: str = ""


@dataclass(frozen=True)
class FormatRow:
    """A row of the table of formats; ratios are medians over the rounds."""

    name: str
    median_us: float
    floor_us: float
    floor_ratio: float
    first_ratio: float
    detail: str


class ReadTimer:
    """Reads as many bytes as a step must read, from rotating places."""

    def __init__(self, problem: Problem, device: Device, threads: int) -> None:
        """Fill a buffer larger than the last cache."""
        self._reader = Reader(device, render_read(threads, streams=4))
        self._bytes = problem.minimum_bytes
        buffer = torch.empty(max(READ_BYTES, 3 * device.l2_bytes), dtype=torch.uint8)
        advise(buffer)
        self._parts = buffer.fill_(1).split(self._bytes)[:-1]

    def sample(self, replays: int) -> list[float]:
        """Microseconds for a step's bytes, one value per pass over the buffer."""
        samples = []
        for _ in range(replays):
            start = time.perf_counter()
            read = sum(map(self._reader, self._parts))
            samples.append((time.perf_counter() - start) * 1e6 * self._bytes / read)
        return samples


class ApartTimer:
    """Times single calls of a step, each after other work."""

    def __init__(self, step: Step, workload: Workload, between: Callable[[], object]) -> None:
        """`between` is not timed."""
        self._step, self._workload, self._between = step, workload, between
        self._out = torch.empty(workload.problem.n_tokens, dtype=torch.int64)

    def sample(self, replays: int) -> list[float]:
        """Microseconds: for each replay, the median over the sets."""
        samples = []
        for _ in range(replays):
            calls = []
            for weights, state in zip(self._workload.sets, self._workload.states, strict=True):
                self._between()
                start = time.perf_counter()
                self._step(weights, state, self._out)
                calls.append((time.perf_counter() - start) * 1e6)
            samples.append(statistics.median(calls))
        return samples


def dense(weight: torch.Tensor) -> Step:
    """The dense head: a product with the whole weight, then argmax."""

    def step(_: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        torch.argmax(linear(hidden.to(weight.dtype), weight), dim=-1, out=out)

    return step


def torch_flash_head(problem: Problem) -> Step:
    """FlashHead in plain torch, in the weights' dtype, for one token."""

    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        scores = linear(hidden, weights.centroids)[0]
        clusters = scores.topk(problem.n_probes, sorted=False).indices
        by_cluster = weights.weight.view(problem.n_clusters, -1)
        rows = by_cluster.index_select(0, clusters).view(-1, problem.hidden_size)
        best = linear(hidden, rows)[0].argmax()
        size = problem.cluster_size
        out[0] = weights.ids[clusters[best // size] * size + best % size]

    return step


def kernel(problem: Problem, config: Config, device: Device, workload: Workload) -> Step:
    """A config's step, verified; raises RuntimeError if its tokens are wrong."""
    candidate = Candidate(problem, config, device)
    step = backend_of(candidate).loader(candidate, torch.device("cpu"))()
    reason = workload.why_wrong(step, **candidate.leeway)
    if reason:
        raise RuntimeError(f"{config}: {reason}")
    return step


def measure(problem: Problem, device: Device, rounds: int) -> list[Row]:
    """The rows of one problem."""
    torch.set_num_threads(device.sm_count)
    workload = Workload.create(problem, torch.device("cpu"), device.l2_bytes, seed=0)
    weight = workload.sets[0].weight
    choice = best_choice(problem, device, toolchain(device), [])
    assert choice.config is not None
    configs = {
        "baseline": baseline_config(problem, device),
        "default": default_config(problem, device),
        "choice": choice.config,
    }
    timers = {
        "dense torch": WallTimer(dense(weight.clone()), workload),
        "dense torch fp32": WallTimer(dense(weight.float()), workload),
        "plain torch FlashHead": WallTimer(torch_flash_head(problem), workload),
    }
    steps = {name: kernel(problem, each, device, workload) for name, each in configs.items()}
    timers |= {name: WallTimer(step, workload) for name, step in steps.items()}
    timers["choice, after 5 ms idle"] = ApartTimer(
        steps["choice"], workload, lambda: time.sleep(IDLE_S)
    )
    square = torch.randn(1024, 1024).to(weight.dtype)
    timers["choice, after a torch matmul"] = ApartTimer(
        steps["choice"], workload, lambda: square @ square
    )
    for threads in sorted({1, device.sm_count}):
        timers[f"read, threads={threads}"] = ReadTimer(problem, device, threads)
    details = {name: short_config(config_data(config)) for name, config in configs.items()}
    details["choice"] += f" ({choice.level.value})"
    return _rows(timers, details, rounds)


# Formats of rows and centroids, how many candidates are re-scored, whether rows are in place.
FORMATS = (
    ("bf16", "bf16", 0, False),
    ("bf16", "bf16", 0, True),
    ("bf16", "int8", 0, False),
    ("int8", "int8", 0, False),
    ("int8", "int8", 8, False),
    ("int4", "int8", 32, False),
    ("int4", "int4", 32, False),
)


def measure_formats(problem: Problem, device: Device, rounds: int) -> list[FormatRow]:
    """The best config of each format among the searches' starting points, all in turns."""
    steps: dict[str, list[tuple[str, WallTimer]]] = {}
    reads: dict[str, list[ReadTimer]] = {}
    for weight, centroids, n_rescored, in_place in FORMATS:
        other = replace(
            problem,
            weight_dtype=weight,
            centroid_dtype=centroids,
            model_dtype=problem.state_dtype if weight != problem.state_dtype else "",
            n_rescored=n_rescored,
            in_place=in_place,
        )
        workload = Workload.create(other, torch.device("cpu"), device.l2_bytes, seed=0)
        configs = [
            each for plan in plans_of(device).values() for each in plan.starts(other, device)
        ]
        name = f"{weight} / {centroids}" + (f", best {n_rescored} again" if n_rescored else "")
        name += ", rows in place" if in_place else ""
        steps[name] = [
            (short_config(config_data(each)), WallTimer(step, workload))
            for each in configs
            if Candidate(other, each, device).why_invalid() is None
            for step in (kernel(other, each, device, workload),)
        ]
        reads[name] = [ReadTimer(other, device, n) for n in sorted({1, device.sm_count})]
    for name, timers in steps.items():  # the best two continue
        ranked = sorted(timers, key=lambda each: statistics.median(each[1].sample(5)))
        steps[name] = ranked[:2]
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, timers in steps.items():
            for config, timer in timers:
                samples.setdefault((name, config), []).extend(timer.sample(1))
            for number, read in enumerate(reads[name]):
                samples.setdefault((name, f"read {number}"), []).extend(read.sample(1))
    return _format_rows(samples)


def _format_rows(samples: dict[tuple[str, str], list[float]]) -> list[FormatRow]:
    rows, first = [], []
    for name in dict.fromkeys(name for name, _ in samples):
        own = {what: each for (of, what), each in samples.items() if of == name}
        floor = min((own[what] for what in own if what.startswith("read")), key=statistics.median)
        config = min(
            (what for what in own if not what.startswith("read")),
            key=lambda what: statistics.median(own[what]),
        )
        best = own[config]
        first = first or best
        rows.append(
            FormatRow(
                name,
                statistics.median(best),
                statistics.median(floor),
                statistics.median(a / b for a, b in zip(best, floor, strict=True)),
                statistics.median(a / b for a, b in zip(best, first, strict=True)),
                config,
            )
        )
    return rows


def _rows(timers: dict[str, WallTimer], details: dict[str, str], rounds: int) -> list[Row]:
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name] += timer.sample(1)
    reads = [own for name, own in samples.items() if name.startswith("read")]
    floors = min(reads, key=statistics.median)
    return [
        Row(
            name,
            statistics.median(own),
            min(own),
            statistics.median(one / floor for one, floor in zip(own, floors, strict=True)),
            details.get(name, ""),
        )
        for name, own in samples.items()
    ]


def print_table(problem: Problem, rows: Sequence[Row]) -> None:
    """One problem's rows as a Markdown table."""
    floor = min(row.median_us for row in rows if row.name.startswith("read"))
    rate = problem.minimum_bytes / floor / 1e3
    print(f"\n{problem.describe()}: {problem.minimum_bytes / 1e6:.1f} MB a step, ", end="")
    print(f"read at {rate:.1f} GB/s in {floor:.0f} us\n")
    print("| | median us | least us | x floor, in turns | |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.median_us:.0f} | {row.least_us:.0f} | {row.floor_ratio:.2f} "
            f"| {row.detail} |"
        )


def print_formats(problem: Problem, rows: Sequence[FormatRow]) -> None:
    """One problem's formats as a Markdown table."""
    print(f"\n{problem.describe()}, rows / centroids:\n")
    print("| | median us | floor us | x floor | x first | |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.median_us:.0f} | {row.floor_us:.0f} | {row.floor_ratio:.2f} "
            f"| {row.first_ratio:.2f} | {row.detail} |"
        )


@click.command()
@click.option("--formats", is_flag=True, help="Compare number formats.")
@click.option("--simd", type=click.Choice(SIMD_LEVELS[platform.machine()]))
@click.option("--shape", "shapes", multiple=True, default=SHAPES)
@click.option("--rounds", default=25, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    formats: bool, simd: str | None, shapes: Sequence[str], rounds: int, path: Path | None
) -> None:
    """Measure and print."""
    device = this_cpu()
    if simd is not None:
        device = replace(device, arch=f"{platform.machine()}-{simd}")
    print(f"{device.title} ({device.arch}), torch {torch.__version__}")
    results = {}
    for problem in map(parse_shape, shapes):
        if formats:
            by_format = measure_formats(problem, device, rounds)
            print_formats(problem, by_format)
            results[problem.describe()] = [asdict(row) for row in by_format]
            continue
        rows = measure(problem, device, rounds)
        print_table(problem, rows)
        results[problem.describe()] = [asdict(row) for row in rows]
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
