"""What a person sees: progress while a search runs, tables of results and records.

Progress goes to standard error: a live bar on a terminal, a line now and then elsewhere.
"""

import sys
import time
from collections.abc import Collection, Iterable, Sequence

from rich.progress import TaskID
from rich.table import Table

from flashtune.kernels.plans.config import PLANS
from flashtune.kernels.plans.knob import knobs
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.progress import ProgressBar
from flashtune.tuner.search.search import Event, Result
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import ConfigData, Outcome, Provenance, Record


def short_config(config: ConfigData) -> str:
    """The plan, and the knobs that differ from their defaults."""
    plan = PLANS[str(config["plan"])]
    changed = [
        f"{name}={config[name]}"
        for name, knob in knobs(plan).items()
        if config.get(name) != knob["default"]
    ]
    return " ".join([plan.plan, *changed])


class SearchProgress(ProgressBar):
    """Shows how the searches of a run go: trials, best so far, ratio to the floor, time left."""

    def __init__(self, device: Device, provenance: Provenance) -> None:
        """Nothing is shown before the first search."""
        super().__init__()
        self._device, self._provenance = device, provenance

    def start(self, problem: Problem, trials: int) -> "ProblemProgress":
        """Begin a search; the result is its `on_event`."""
        task = self._bar.add_task(problem.describe(), total=trials, note="")
        return ProblemProgress(self, problem, task)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, problem: Problem, task: TaskID, event: Event, since: float) -> None:
        """Show how far one search is."""
        best = self.describe_best(problem, event)
        self._bar.update(task, completed=event.done, total=event.total, note=best)
        if self._line_due(anyway=event.comparing):
            rate = (time.monotonic() - since) / max(1, event.done)
            left = rate * max(0, event.total - event.done)
            print(
                f"{problem.describe()}: {event.done}/{event.total} trials, {best}, "
                f"about {left:.0f} s left",
                file=sys.stderr,
            )

    def describe_best(self, problem: Problem, event: Event) -> str:
        """The best time so far and its ratio to the byte floor."""
        if event.best_us is None:
            return f"nothing works yet, {event.failed} failed"
        floor = floor_us(problem, self._device)
        ratio = f" = {event.best_us / floor:.2f} x floor" if floor else ""
        timing = event.comparing and self._provenance is Provenance.MEASURED
        doing = ", timing the best side by side" if timing else ""
        return (
            f"best {event.best_us:.1f} us {self._provenance.value}{ratio}, "
            f"{event.failed} failed{doing}"
        )


class ProblemProgress:
    """The progress of one problem's search."""

    def __init__(self, progress: SearchProgress, problem: Problem, task: TaskID) -> None:
        """Counted from now."""
        self._progress, self._problem, self._task = progress, problem, task
        self._since = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._progress.show(self._problem, self._task, event, self._since)


def results_table(results: Sequence[Result], device: Device, provenance: Provenance) -> Table:
    """Baseline, default and winner of each problem."""
    table = Table(title=f"{device.title}: times in microseconds, {provenance.value}")
    for heading in ("problem", "baseline", "default", "winner", "floor", "ratio", "config"):
        table.add_column(heading, justify="left" if heading in ("problem", "config") else "right")
    for result in results:
        floor = floor_us(result.problem, device)
        time_us = result.winner.measurement.median_us if result.winner else None
        table.add_row(
            result.problem.describe(),
            _number(result.baseline_us),
            _number(result.default_us),
            _number(time_us),
            _number(floor),
            f"{time_us / floor:.2f}" if time_us and floor else "",
            short_config(result.winner.config) if result.winner else "nothing worked",
        )
    return table


def records_table(records: Iterable[Record]) -> Table:
    """Records, a line each."""
    table = Table()
    for heading in ("record", "device", "problem", "time us", "outcome", "provenance", "config"):
        table.add_column(heading, justify="right" if heading == "time us" else "left")
    for record in records:
        measurement = record.measurement
        failed = measurement.outcome not in (Outcome.OK, Outcome.PRUNED)
        table.add_row(
            record.key[:12],
            record.device,
            record.problem.describe(),
            _number(measurement.median_us),
            measurement.outcome.value,
            record.provenance.value,
            measurement.error if failed else short_config(record.config),
        )
    return table


def devices_table(devices: Iterable[Device], here: Collection[Device]) -> Table:
    """Devices, with those of this machine marked."""
    table = Table()
    for heading in ("device", "title", "arch", "SMs", "GB/s", "L2 MiB", "aliases", ""):
        table.add_column(
            heading, justify="right" if heading in ("SMs", "GB/s", "L2 MiB") else "left"
        )
    for device in devices:
        table.add_row(
            device.name,
            device.title,
            device.arch,
            str(device.sm_count),
            f"{device.memory_bandwidth / 1e9:.0f}",
            f"{device.l2_bytes / 2**20:.0f}",
            ", ".join(device.aliases),
            "this machine" if device in here else "",
        )
    return table


def _number(time_us: float | None) -> str:
    return "" if time_us is None else f"{time_us:.1f}"
