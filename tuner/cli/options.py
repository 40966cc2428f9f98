"""The options that commands share, each declared once: a name means the same everywhere.

`--device` is a device by name or alias, `--model` a model's folder or its name in Hugging Face's
cache, `--out` the file or folder to write, `--db` the database, `--seed` the seed of random
numbers.

Nothing here loads torch: values are parsed with modules that the command needs anyway, once it is
called.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from flashtune.tuner.search.samplers.sampler import MOST_SEED
from flashtune.tuning_db.device import all_devices
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import PRESETS, Problem, parse_shape

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

FILE: "click.ParamType[Path]" = click.Path(dir_okay=False, path_type=Path)
PATH: "click.ParamType[Path]" = click.Path(path_type=Path)
SHARE = click.FloatRange(0, 1, min_open=True)


class Parsed(_ParamType):
    """An option read by a function whose FlashtuneError becomes the option's error."""

    def __init__(
        self,
        name: str,
        parse: Callable[[str], Any],
        known: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        """known: the values that a shell may complete."""
        self.name = name
        self._parse, self._known = parse, known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed value; a value that is already parsed is left alone."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except FlashtuneError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The known values that begin with the incomplete text."""
        return [CompletionItem(each) for each in self._known() if each.startswith(incomplete)]


class Option(click.Option):
    """An option that is still accepted under its former names, which help does not show."""

    def __init__(self, *args: Any, old: tuple[str, ...] = (), **settings: Any) -> None:
        """old: those names, with their dashes."""
        super().__init__(*args, **settings)
        self._old = old

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Register all names with the parser."""
        shown = self.opts
        self.opts = [*shown, *self._old]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


def _device_names() -> list[str]:
    names = [name for each in all_devices() for name in (each.name, *each.aliases)]
    return ["cpu", "gpu", *names]


def _device(name: str) -> Any:
    from flashtune.tuner.here import device_named

    return device_named(name)


def _torch_device(name: str) -> str:
    from flashtune.tuner.here import torch_device_named

    return torch_device_named(name)


def _model_problem(source: str) -> Problem:
    from flashtune.kernels.model_folder.folder import read_model

    return read_model(source)


def _screen(text: str) -> Any:
    """A head's screen; None for `none`."""
    from flashtune.kernels.formats.screen import screen_of

    return screen_of(text)


def _fixed(text: str) -> tuple[str, Any]:
    from flashtune.tuner.search.space import parse_fixed

    return parse_fixed(text)


def _known_fixings() -> list[str]:
    from flashtune.kernels.plans.candidate import PLANS
    from flashtune.kernels.plans.knob import knobs

    found = {f"plan={name}": None for name in PLANS}
    for plan in PLANS.values():
        for name, knob in knobs(plan.config).items():
            found |= {f"{name}={choice}": None for choice in knob["choices"]}
    return list(found)


def _existing(name: str) -> Path:
    from flashtune.tuning_db.store import existing

    return existing(Path(name))


def _seconds(text: str) -> float:
    """A finite number of seconds that is more than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise FlashtuneError(f"{text!r} is not a number of seconds greater than 0")
    return value


DEVICE = Parsed("device", _device, _device_names)
SHAPE = Parsed("shape", parse_shape, lambda: PRESETS)
FIX = Parsed("knob=value", _fixed, _known_fixings)
SCREEN = Parsed(
    "format", _screen, lambda: ["none", "int8", "int4/int8", "int4", "int8:0", "int4:0"]
)
SECONDS = Parsed("seconds", _seconds)
SHAPE_HELP = "A preset, or vocab=…,hidden=…,clusters=… pairs."
SHAPE_EPILOG = f"Presets: {', '.join(PRESETS)}; pairs may follow one, as in qwen3-0.6b,probes=512."

database: Decorator[Any] = click.option(
    "--db",
    "database",
    type=PATH,
    help="The database. Default: $FLASHTUNE_DB, else tuning.db in the user's data folder.",
)
read_database: Decorator[Any] = click.option(
    "--db",
    "database",
    type=Parsed("path", _existing),
    help="The database. Default: $FLASHTUNE_DB, else tuning.db in the user's data folder.",
)
databases: Decorator[Any] = click.option(
    "--db",
    "databases",
    type=PATH,
    multiple=True,
    required=True,
    help=(
        "A database; may be repeated. If several have a record of the same config, the first is "
        "used."
    ),
)
as_json: Decorator[Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts."
)
yes: Decorator[Any] = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
seed: Decorator[Any] = click.option(
    "--seed",
    type=click.IntRange(0, MOST_SEED),
    default=0,
    show_default=True,
    help="Seed for random numbers.",
)
jobs: Decorator[Any] = click.option(
    "--jobs",
    type=click.IntRange(1),
    default=len(os.sched_getaffinity(0)),
    show_default="one per processor",
    help="Compilers to run at a time.",
)
model: Decorator[Any] = click.option(
    "--model", required=True, help="The model's folder, or its name in Hugging Face's cache."
)
models: Decorator[Any] = click.option(
    "--model",
    "models",
    type=Parsed("folder", _model_problem),
    multiple=True,
    help=(
        "A FlashHead model's folder, or its name in Hugging Face's cache, to take the shape "
        "from. May be repeated."
    ),
)
shapes: Decorator[Any] = click.option(
    "--shape", "shapes", type=SHAPE, multiple=True, help=f"{SHAPE_HELP} May be repeated."
)
only_shapes: Decorator[Any] = click.option(
    "--shape",
    "shapes",
    type=SHAPE,
    multiple=True,
    help="Only this shape's searches. May be repeated.",
)
run_device: Decorator[Any] = click.option(
    "--device",
    type=Parsed("device", _torch_device, lambda: ["cpu", "gpu"]),
    help="This machine's cpu or gpu. Default: the GPU, if torch finds one.",
)
prompts: Decorator[Any] = click.option(
    "--prompts",
    type=FILE,
    help="Text to continue, one prompt per line. Default: a few dozen shipped prompts.",
)
tokens: Decorator[Any] = click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens to generate for each prompt.",
)


def screens(text: str) -> Decorator[Any]:
    """`--screen`: a head's screens, given any number of times; `none` for no screen."""
    return click.option("--screen", "screens", type=SCREEN, multiple=True, help=text)


def device(text: str, *, required: bool = False) -> Decorator[Any]:
    """`--device`: any device, by a name or alias that `flashtune devices` lists."""
    return click.option("--device", type=DEVICE, required=required, help=text)


def shape(text: str = SHAPE_HELP, *, required: bool = False) -> Decorator[Any]:
    """`--shape`, once."""
    return click.option("--shape", "problem", type=SHAPE, required=required, help=text)


def out(text: str, *names: str, file: bool = True) -> Decorator[Any]:
    """`--out`: the file or folder to write."""
    return click.option(
        "--out",
        *names,
        cls=Option,
        old=("--output",),
        type=FILE if file else PATH,
        required=True,
        help=text,
    )
