"""Progress of work that goes in steps: a bar on a terminal, a line now and then elsewhere.

Usage:
    with StepProgress("clustering", total=15) as progress:
        progress.show(done, "fit 0.52")
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flashtune.tuner.report import LINE_SECONDS


class StepProgress:
    """Shows on standard error how many steps are done."""

    def __init__(self, title: str, total: int) -> None:
        """Nothing is shown before it is entered."""
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._title, self._total = title, total
        self._task = self._bar.add_task(title, total=total, note="")
        self._last_line = time.monotonic()

    def __enter__(self) -> "StepProgress":
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

    def show(self, done: int, note: str = "") -> None:
        """Show that `done` steps of the total are done."""
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            told = f", {note}" if note else ""
            print(f"{self._title}: {done}/{self._total}{told}", file=sys.stderr)
