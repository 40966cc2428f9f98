"""Renders templates to source text, with one function.

Usage:
    render("triton/staged.py.j2", {"hidden": 2048, …})

Text in, text out: nothing here imports torch, triton or the rest of flashtune.
"""

import functools
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

Value = int | float | bool | str


@functools.cache
def _environment() -> "jinja2.Environment":
    """The only environment: undefined names raise, blocks leave no blank lines."""
    import jinja2  # here: a machine tuned over ssh renders nothing and needs no jinja2

    folder = resources.files("flashtune.templates")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )


def render(template: str, values: Mapping[str, Value]) -> str:
    """Render `template` (a path below this folder) with `values`.

    Raises ValueError if a value is anything but a number, a bool or an identifier: text that could
    carry code never reaches a template. Raises jinja2.UndefinedError for a missing value.
    """
    for name, value in values.items():
        if isinstance(value, str) and not value.isidentifier():
            raise ValueError(f"template value {name}={value!r} is not an identifier")
        if not isinstance(value, (int, float, str)):
            raise ValueError(f"template value {name} is a {type(value).__name__}")
    return _environment().get_template(template).render(dict(values))
