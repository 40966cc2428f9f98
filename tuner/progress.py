"""Progress of work done in steps: a live line on a terminal, occasional lines elsewhere.

Usage:
    with StepProgress("clustering", total=15) as progress:
        progress.show(done, "fit 0.52")

To add another such display, subclass `ProgressBar`.
"""

import math
import sys
import time
from collections import deque
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 10.0  # between lines if there is no terminal
WIDE = 110  # columns of a terminal with room for a bar and the elapsed time
PACE = 20  # how many of the last steps set the pace expected of the rest
Bar = TypeVar("Bar", bound="ProgressBar")


class TimeLeft:
    """When work will be done, estimated from the pace of its last steps.

    The time before the first step ends is not counted: it includes starting processes.
    """

    def __init__(self) -> None:
        """No estimate exists before two steps are done."""
        self._steps: deque[tuple[float, int]] = deque(maxlen=PACE + 1)

    def step(self, done: int) -> None:
        """Note that `done` steps are done now."""
        if not self._steps or done > self._steps[-1][1]:
            self._steps.append((time.monotonic(), done))

    def ends(self, total: int, stops: float = math.inf) -> float | None:
        """When all will be done, on the monotonic clock; None if that is not known yet.

        stops: the latest time at which work ends.
        """
        if len(self._steps) < 2:
            return None
        (since, before), (now, done) = self._steps[0], self._steps[-1]
        return min(stops, now + max(0, total - done) * (now - since) / (done - before))

    def describe(self, total: int, stops: float = math.inf) -> str:
        """The time left, in words."""
        ends = self.ends(total, stops)
        if ends is None:
            return "time left not known yet"
        return f"about {max(0.0, ends - time.monotonic()):.0f} s left"


class _LeftColumn(ProgressColumn):
    """A task's remaining time, which counts down between steps."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        ends = task.fields["ends"]
        if task.finished or ends is None:
            return Text("" if task.finished else "-:-- left", no_wrap=True)
        seconds = round(max(0.0, ends - time.monotonic()))
        return Text(f"{seconds // 60}:{seconds % 60:02} left", no_wrap=True)


class _NoteColumn(ProgressColumn):
    """A task's note, cut at the end of the line."""

    def render(self, task: Task) -> Text:
        """The note."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _columns(width: int) -> list[ProgressColumn]:
    """The columns that fit a terminal of this width; always the count and the time left."""
    fixed = Column(no_wrap=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=fixed),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _LeftColumn(table_column=Column(no_wrap=True)),
        _NoteColumn(),
    ]
    if width >= WIDE:
        columns[1:1] = [BarColumn(bar_width=20)]
        columns.append(TimeElapsedColumn())
    return columns


class ProgressBar:
    """Tasks with a note on standard error: live on a terminal, as lines elsewhere."""

    def __init__(self) -> None:
        """Nothing is shown until the context is entered."""
        self._console = Console(stderr=True)
        self._bar = Progress(
            *_columns(self._console.width),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._last_line = 0.0

    def __enter__(self: Bar) -> Bar:
        """Start the display."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the display."""
        self._bar.stop()

    def _add(self, title: str, total: int) -> TaskID:
        return self._bar.add_task(title, total=total, note="", ends=None)

    def _show(self, task: TaskID, done: int, total: int, note: str, ends: float | None) -> None:
        self._bar.update(task, completed=done, total=total, note=note, ends=ends)

    def _line_due(self, anyway: bool = False) -> bool:
        """Whether to print a line now: without a bar, if `anyway` or after a while."""
        now = time.monotonic()
        due = self._bar.disable and (anyway or now - self._last_line >= LINE_SECONDS)
        if due:
            self._last_line = now
        return due


class StepProgress(ProgressBar):
    """Shows how many steps are done."""

    def __init__(self, title: str, total: int = 0) -> None:
        """The first line comes after a while, not at once. total: the steps, if known already."""
        super().__init__()
        self._title, self._total = title, total
        self._task = self._add(title, total)
        self._left = TimeLeft()
        self._last_line = time.monotonic()

    def show(self, done: int, note: str = "", stops: float = math.inf) -> None:
        """Show that `done` steps of the total are done; stops: as in `TimeLeft.ends`."""
        self._left.step(done)
        self._show(self._task, done, self._total, note, self._left.ends(self._total, stops))
        if self._line_due():
            told = f", {note}" if note else ""
            left = self._left.describe(self._total, stops)
            print(f"{self._title}: {done}/{self._total}{told}, {left}", file=sys.stderr)

    def show_of(self, done: int, total: int) -> None:
        """Show that `done` steps of `total` are done."""
        self._total = total
        self.show(done)
