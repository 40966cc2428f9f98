"""A search's progress while it runs, and its results, formatted for the terminal.

Progress goes to standard error: a live line on a terminal, occasional lines elsewhere.
"""

import sys
from collections.abc import Iterator

from rich.progress import TaskID

from flashtune.kernels.plans.config import short_config
from flashtune.tuner.cli.report import number, predicted_notes, time_of
from flashtune.tuner.cli.terminal import print_rows
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.progress import ProgressBar, TimeLeft
from flashtune.tuner.search.result_data import better_shipped
from flashtune.tuner.search.search import Event, Result
from flashtune.tuner.search.session import SessionResult
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.one_line import spelled
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance


class SearchProgress(ProgressBar):
    """Shows a run's searches: trials, best time so far, ratio to the floor, time left."""

    def __init__(self, provenance: Provenance) -> None:
        """Shows nothing before the first search."""
        super().__init__()
        self._provenance = provenance

    def start(self, problem: Problem, trials: int, floor_us: float | None) -> "ProblemProgress":
        """Begin to show a search; returns its `on_event`."""
        task = self._add(problem.describe(), trials)
        return ProblemProgress(self, problem, task, floor_us)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(spelled(text), markup=False, highlight=False, soft_wrap=True)

    def show(
        self, problem: Problem, task: TaskID, event: Event, floor_us: float | None, left: TimeLeft
    ) -> None:
        """Show the progress of one search."""
        best = self.describe_best(event, floor_us)
        self._show(task, event.done, event.total, best, left.ends(event.total, event.stops))
        if self._line_due(anyway=event.comparing):
            print(
                f"{problem.describe()}: {event.done}/{event.total} trials, {best}, "
                f"{left.describe(event.total, event.stops)}",
                file=sys.stderr,
            )

    def describe_best(self, event: Event, floor_us: float | None) -> str:
        """The best time so far and its ratio to the byte floor."""
        if event.best_us is None:
            return f"no config has worked yet, {event.failed} failed"
        ratio = f" = {event.best_us / floor_us:.2f} x floor" if floor_us else ""
        timing = event.comparing and self._provenance is Provenance.MEASURED
        most = event.most_workers
        workers = f", {event.workers} of {most} workers" if most > 1 else ""
        doing = ", timing the best configs side by side" if timing else ""
        return (
            f"best {event.best_us:.1f} us {self._provenance.value}{ratio}, "
            f"{event.failed} failed{workers}{doing}"
        )


class ProblemProgress:
    """The progress of one problem's search."""

    def __init__(
        self, progress: SearchProgress, problem: Problem, task: TaskID, floor_us: float | None
    ) -> None:
        """The clock starts now."""
        self._progress, self._problem, self._task = progress, problem, task
        self._floor_us, self._left = floor_us, TimeLeft()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._left.step(event.done)
        self._progress.show(self._problem, self._task, event, self._floor_us, self._left)


def print_results(outcome: SessionResult) -> None:
    """Print baseline, default and winner of each problem, with the notes that they need."""
    rows = []
    for result in outcome.results:
        floor = floor_us(result.problem, outcome.device)
        winner = result.winner
        time_us = winner.measurement.median_us if winner else None
        rows.append(
            (
                result.problem.describe(),
                number(result.baseline_us),
                number(result.default_us),
                time_of(winner) if winner else "none",
                number(floor),
                f"{time_us / floor:.2f}" if time_us and floor else "",
                short_config(winner.config) if winner else _why_none(result),
            )
        )
    print_rows(
        f"{outcome.device.title}: {outcome.provenance.value} times, in microseconds",
        ("problem", ">baseline", ">default", ">winner", ">floor", ">ratio", "config"),
        rows,
        notes=list(_notes(outcome)),
    )
    for result in outcome.results:
        if result.front:
            _print_front(result)


def _print_front(result: Result) -> None:
    """Print the configs that no other beats in both time and energy."""
    rows = [
        (
            number(record.measurement.median_us),
            f"{1e3 * (record.measurement.joules or 0.0):.3f}",
            "winner" if result.winner and record.key == result.winner.key else "",
            short_config(record.config),
        )
        for record in result.front
    ]
    print_rows(
        f"{result.problem.describe()}: Pareto front of time and energy",
        (">us", ">mJ a call", "", "config"),
        rows,
    )


def _why_none(result: Result) -> str:
    if result.failure is None:
        return "nothing was evaluated"
    return f"no config worked: {result.failure.describe()}"


def _notes(outcome: SessionResult) -> Iterator[str]:
    """The notes below the table."""
    if outcome.cancelled:
        begun = len(outcome.results)
        yield (
            f"INTERRUPTED: {begun} of {len(outcome.problems)} shapes begun, not all of them "
            "finished; run the same command again to continue"
        )
    elif len(outcome.results) < len(outcome.problems) or any(
        result.timed_out for result in outcome.results
    ):
        yield (
            f"out of time: {len(outcome.results)} of {len(outcome.problems)} shapes begun; run "
            "the same command again to continue"
        )
    rate = outcome.device.memory_bandwidth
    if rate:
        yield (
            f"floor: time to read the fewest bytes at {rate / 1e9:.1f} GB/s; ratio: winner to "
            "floor"
        )
    yield from predicted_notes(result.winner for result in outcome.results if result.winner)
    for result in outcome.results:
        yield from _notes_of(result, outcome.device)


def _notes_of(result: Result, device: Device) -> Iterator[str]:
    """The notes on one problem."""
    name, winner = result.problem.describe(), result.winner
    if winner is None:
        return
    floor, time_us = floor_us(result.problem, device), winner.measurement.median_us
    if winner.provenance is Provenance.MEASURED and time_us and floor and time_us < floor:
        yield (
            f"{name}: faster than the floor, so the memory was busy while its bandwidth was "
            "measured: search again on an idle machine"
        )
    if result.failed:
        assert result.failure is not None
        count = "all" if result.failure.count == result.failed else str(result.failure.count)
        yield (
            f"{name}: {result.failed} of {result.evaluated} configs failed, {count} of them "
            f"with: {result.failure.describe()}"
        )
    found, final = result.searched_us, winner.measurement.median_us
    if result.default_kept:
        yield (
            f"{name}: the default is kept: timed side by side, no config was faster by more than "
            f"the noise (best in the search: {number(found)})"
        )
    elif found is not None and final is not None and number(found) != number(final):
        yield (
            f"{name}: best in the search: {number(found)}; the winner, timed again side by side: "
            f"{number(final)}"
        )
    shipped = better_shipped(result, device)
    if shipped is not None:
        yield (
            f"{name}: a shipped table has a better record ({shipped.provenance.value}): "
            f"{time_of(shipped)}, {short_config(shipped.config)}"
        )
