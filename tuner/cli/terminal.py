"""Output to terminals of any width and encoding, pipes, files, and closed streams.

Usage:
    say("made.json: 12 records")      # err=True: on standard error
    say_json(data)
    print_table(table)
    print_rows("title", ("problem", ">us", "config"), rows, notes=["what it means"])

All output of commands goes through here. Control characters in names and errors from foreign files
are escaped, and such text is never interpreted as markup.
"""

import codecs
import io
import json
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from flashtune.tuning_db.one_line import spelled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 130  # the exit code that shells give a program ended by Ctrl-C
_SPELLED = {"…": "...", "µ": "u", "→": "->", "≥": ">="}
_ENCODING_ERRORS = "flashtune-spelled"
_WHOLE = ("device", "record", "outcome")  # columns that are never wrapped
_UNLIMITED = 100_000  # columns, if no terminal limits them


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks, spelled in ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(_SPELLED.get(each, "?") for each in missing), error.end


def printable(*streams: IO[str] | None) -> None:
    """Let the streams spell characters that their encoding lacks; a closed stream is None."""
    codecs.register_error(_ENCODING_ERRORS, _spell)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ENCODING_ERRORS)


def say(text: str, *, err: bool = False) -> None:
    """Print a line on standard output or, with `err`, on standard error."""
    click.echo(spelled(text), err=err)


def say_json(data: Any) -> None:
    """Print plain data as JSON, in ASCII."""
    click.echo(json.dumps(data, indent=1))


def output() -> "Console":
    """A console on standard output, as wide as the terminal; a pipe or a file is never cut."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console


def print_table(table: "Table") -> None:
    """Print a table on standard output."""
    output().print(table)


def print_rows(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print a table whose last column is always shown whole.

    If the terminal is too narrow for it, it follows the table, one line per row, which begins with
    the row's first column. Headings that start with `>` mark columns of numbers.
    """
    from rich.measure import Measurement

    console = output()
    if title:  # not the table's own, which is wrapped at the table's width
        console.print(spelled(title), style="table.title", soft_wrap=True)
    table = _table(headings, rows)
    unlimited = console.options.update(max_width=_UNLIMITED)
    if Measurement.get(console, unlimited, table).maximum > console.width:
        console.print(_table(headings[:-1], [row[:-1] for row in rows]))
        for row in rows:
            if row[-1]:
                console.print(spelled(f"{row[0]}: {row[-1]}"), soft_wrap=True)
    else:
        console.print(table)
    for note in notes:
        console.print(spelled(note), soft_wrap=True)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for heading in headings:
        number = heading.startswith(">")
        table.add_column(
            heading.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=heading.removeprefix(">") in _WHOLE or number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(spelled(cell)) for cell in row))
    return table
