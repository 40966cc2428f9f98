"""`flashtune bench`: what FlashHead gains with a model, and what it changes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import INTERRUPTED, say, say_json

if TYPE_CHECKING:
    from flashtune.kernels.formats.screen import Screen


@click.command()
@options.model
@click.option(
    "--probes",
    "n_probes",
    type=click.IntRange(1),
    multiple=True,
    help="A number of probes to compare; may be repeated. Default: the model's own, and all.",
)
@options.screens(
    "A screen to compare, such as int4/int8:8, with each number of probes and without clusters; "
    "'none' stands for no screen; may be repeated. Default: the model's own, and int8 without "
    "clusters."
)
@options.prompts
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Tokens to generate for each prompt.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 32),
    default=1,
    show_default=True,
    help="Prompts per batch.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Rounds to run: in each, every head continues the same batch of prompts.",
)
@click.option(
    "--timeout",
    "seconds",
    type=options.SECONDS,
    default="300",
    show_default=True,
    help="Seconds of answering after which no more rounds begin; at least two are run.",
)
@click.option(
    "--plot",
    "picture",
    type=options.FILE,
    help="Also draw the result, such as bench.png. Needs flashtune[plot].",
)
@options.run_device
@options.as_json
def bench(
    model: str,
    n_probes: tuple[int, ...],
    screens: "tuple[Screen | None, ...]",
    prompts: Path | None,
    n_tokens: int,
    batch: int,
    rounds: int,
    seconds: float,
    picture: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Report what FlashHead gains with a model: tokens/s, memory, and which answers stay the same.

    Runs the model in transformers with its dense head and with each FlashHead in turns, and
    recommends one. A model without clusters is compared with heads that only screen; `flashtune
    cluster` makes the clusters. Ctrl-C ends it early and shows the results so far.

    \b
    Examples:
      flashtune bench --model ./smollm2-flash
      flashtune bench --model ./smollm2-flash --probes 192 --probes 768 --screen none --screen int8
      flashtune bench --model ./smollm2 --screen int8 --batch 8 --plot bench.png
    """
    from flashtune.kernels.model_folder.folder import ModelFolder
    from flashtune.tuner.bench.bench import BenchRequest, bench_model
    from flashtune.tuner.bench.bench_table import (
        HEADINGS,
        bench_data,
        notes,
        plot,
        table_rows,
        title,
    )
    from flashtune.tuner.bench.lineup import lineup
    from flashtune.tuner.cli.terminal import print_rows
    from flashtune.tuner.clustering.decode_state import read_prompts, require_transformers
    from flashtune.tuner.clustering.quality_table import check_picture
    from flashtune.tuner.here import torch_device_named

    if picture is not None:
        check_picture(picture)
    require_transformers()
    folder = ModelFolder.open(model)
    request = BenchRequest(
        prompts=read_prompts(prompts),
        n_tokens=n_tokens,
        batch=batch,
        rounds=rounds,
        device=device or torch_device_named(None),
        seconds=seconds,
    )
    try:
        report = bench_model(folder, lineup(folder, n_probes, screens), request)
    except KeyboardInterrupt:
        say("interrupted before there was anything to compare", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    if picture is not None:
        plot(report, picture)
    if as_json:
        say_json({"model": model, **bench_data(report)})
    else:
        print_rows(title(report), HEADINGS, table_rows(report), notes=list(notes(report)))
    if report.interrupted:
        say("interrupted: these are the results so far", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
