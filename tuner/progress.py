"""Progress of work that goes in steps: a bar on a terminal, a line now and then elsewhere.

Usage:
    with StepProgress("clustering", total=15) as progress:
        progress.show(done, "fit 0.52")

Another display of the kind is a subclass of `ProgressBar`.
"""

import sys
import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0  # between lines where there is no terminal
Bar = TypeVar("Bar", bound="ProgressBar")


class ProgressBar:
    """A bar on standard error, whose tasks have a field `note`; or lines, where no terminal is."""

    def __init__(self) -> None:
        """Nothing is shown before it is entered."""
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
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

    def _line_due(self, anyway: bool = False) -> bool:
        """Whether to print a line now: where no bar is shown, `anyway` or now and then."""
        now = time.monotonic()
        due = self._bar.disable and (anyway or now - self._last_line >= LINE_SECONDS)
        if due:
            self._last_line = now
        return due


class StepProgress(ProgressBar):
    """Shows how many steps are done."""

    def __init__(self, title: str, total: int) -> None:
        """The first line comes after a while, not at once."""
        super().__init__()
        self._title, self._total = title, total
        self._task = self._bar.add_task(title, total=total, note="")
        self._last_line = time.monotonic()

    def show(self, done: int, note: str = "") -> None:
        """Show that `done` steps of the total are done."""
        self._bar.update(self._task, completed=done, note=note)
        if self._line_due():
            told = f", {note}" if note else ""
            print(f"{self._title}: {done}/{self._total}{told}", file=sys.stderr)
