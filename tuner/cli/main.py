"""The command line: it parses, calls and prints.

Commands load what they need when they are called, so that help, completion and the version appear
at once. An error that the user can correct ends in one line and exit code 2, Ctrl-C in exit code
130.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from flashtune.tuner.cli.bench import bench
from flashtune.tuner.cli.cost_model import model
from flashtune.tuner.cli.models import cluster, quality
from flashtune.tuner.cli.records import (
    best,
    devices,
    forget,
    render,
    report,
    show,
    studies,
)
from flashtune.tuner.cli.search import search
from flashtune.tuner.cli.tables import tables
from flashtune.tuner.cli.terminal import INTERRUPTED, printable
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import one_line


class Commands(click.Group):
    """Turns every ending into an exit code and, for an error, one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that the arguments name, and exit unless `standalone_mode` is off."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        printable(sys.stdout, sys.stderr)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except FlashtuneError as error:
            _end(str(error), 2)
        except click.ClickException as error:
            if type(error).show not in (click.UsageError.show, click.ClickException.show):
                error.show()  # help, if a command is missing
                sys.exit(2)
            _end(error.format_message(), 2)
        except click.Abort:  # a question was not answered
            sys.exit(INTERRUPTED)
        except OSError as error:
            where = error.filename or "the output cannot be written"
            _end(f"{where}: {error.strerror}", 2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C ends it quietly."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


def _end(text: str, code: int) -> NoReturn:
    """Print the error in one line, and exit."""
    print(f"Error: {one_line(text)}", file=sys.stderr)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flashtune")
def cli() -> None:
    """FlashHead decode kernels, tuned for your device.

    \b
    Examples:
      flashtune devices
      flashtune search --device orin --shape qwen3-vl-2b
      flashtune best --device h200 --shape gemma-3-1b
    """


for command in (
    search, cluster, quality, bench, devices, show, best, render, report, studies, forget,
    tables, model,
):  # fmt: skip
    cli.add_command(command)
