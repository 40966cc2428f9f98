"""The reference of commands and options, made of what click knows of them."""

import inspect
from collections.abc import Iterator

import click

from flashtune.tuner.cli.main import cli


def reference() -> str:
    """A section for each command: usage, what it does, options, and what its help ends with."""
    return "\n\n".join(part for context in _contexts() for part in _section(context))


def _contexts(parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for each command that does something, in the order of `--help`."""
    parent = parent or click.Context(cli, info_name="flashtune")
    group = parent.command
    assert isinstance(group, click.Group)
    for name, command in sorted(group.commands.items()):
        context = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from _contexts(context)
        else:
            yield context


def _section(context: click.Context) -> Iterator[str]:
    command = context.command
    yield f"## `{context.command_path}`"
    yield _block(command.get_usage(context).removeprefix("Usage: "))
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0] != "\b":
            yield paragraph
        else:  # as it stands: examples below a line that says so
            yield from (lines[1], _block(inspect.cleandoc("\n".join(["", *lines[2:]]))))
    records = [option.get_help_record(context) for option in command.params]
    rows = [f"| `{name}` | {text} |" for name, text in filter(None, records)]
    yield "\n".join(["| option | meaning |", "|---|---|", *rows]).replace("…", "&hellip;")
    formatter = context.make_formatter()
    command.format_epilog(context, formatter)
    if end := inspect.cleandoc(formatter.getvalue()).strip():
        yield end


def _block(text: str) -> str:
    return f"```\n{text.strip()}\n```"
