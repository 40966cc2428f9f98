"""`flashtune cluster` and `flashtune quality`: make a FlashHead model, and judge its quality."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtune.tuner.cli import options
from flashtune.tuner.cli.terminal import INTERRUPTED, say, say_json
from flashtune.tuning_db.errors import FlashtuneError

if TYPE_CHECKING:
    from flashtune.kernels.formats.screen import Screen
    from flashtune.kernels.model_folder.folder import ModelFolder
    from flashtune.tuner.clustering.clustered_folder import Chosen


@click.command()
@options.model
@options.out("The new folder.", file=False)
@click.option(
    "--clusters",
    "n_clusters",
    type=click.IntRange(1),
    help="Clusters to make. Default: a sixteenth of the vocabulary.",
)
@click.option(
    "--probes",
    "n_probes",
    type=click.IntRange(1),
    help="Clusters to probe. Default: chosen by running the model.",
)
@click.option(
    "--recall",
    type=options.SHARE,
    help="Choose the pair of probes and screen that is fastest here and takes the dense head's "
    "token in this share of decode steps, such as 0.995. Needs flashtune[hf].",
)
@options.screens(
    "The new head's screen, such as int8. With --recall: a screen to choose from; may be "
    "repeated; 'none' stands for the 16-bit head. Default: no screen; with --recall, the usual "
    "ones."
)
@options.prompts
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    help="Tokens to generate for each prompt. Default: 64, or 32 with --recall.",
)
@options.run_device
@options.seed
@click.option(
    "--iterations",
    type=click.IntRange(1),
    default=15,
    show_default=True,
    help="Iterations of k-means.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Hard-link the weight files instead of copying them: saves disk space, but writing to "
    "one changes both.",
)
@options.as_json
def cluster(
    model: str,
    out: Path,
    n_clusters: int | None,
    n_probes: int | None,
    recall: float | None,
    screens: "tuple[Screen | None, ...]",
    prompts: Path | None,
    n_tokens: int | None,
    device: str | None,
    seed: int,
    iterations: int,
    link: bool,
    as_json: bool,
) -> None:
    """Make a FlashHead model from any causal language model.

    Clusters the rows of its head and writes a folder with the model and its clusters. Run the
    same command again to continue after an interruption. Unless --probes or --recall is given,
    the number of probes is chosen by running the model for a few minutes at most: enough to keep
    its answers, as far as that makes a step less than 5 % slower. With --recall, each screen gets
    the fewest probes that reach it, and the fastest of these pairs is taken.

    \b
    Examples:
      flashtune cluster --model ./smollm2 --out ./smollm2-flash
      flashtune cluster --model ./smollm2 --out ./smollm2-flash --clusters 3072 --recall 0.99
      flashtune cluster --model ./smollm2 --out ./smollm2-flash --probes 256 --screen int8
    """
    from flashtune.tuner.clustering.clustered_folder import ClusterRequest, cluster_model
    from flashtune.tuner.here import torch_device_named

    if n_probes and recall:
        raise click.UsageError("give either --probes or --recall, not both")
    if not recall and len(screens) > 1:
        raise click.UsageError("give just one --screen, or --recall to choose among several")
    where = device or torch_device_named(None)
    screen = screens[0] if screens and recall is None else None
    choose = None
    if recall is not None:
        choose = _fastest_of(recall, screens, prompts, n_tokens or 32, where)
    elif n_probes is None:
        choose = _keeping_answers(model, screen, prompts, n_tokens or 64, where)
    request = ClusterRequest(
        model=model,
        out=out,
        n_clusters=n_clusters,
        n_probes=n_probes,
        screen=screen,
        device=where,
        seed=seed,
        iterations=iterations,
        link=link,
    )
    try:
        result = cluster_model(request, choose)
    except KeyboardInterrupt:
        say("interrupted: run the same command again to continue from here", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    if as_json:
        say_json({**asdict(result), "out": str(out)})
        return
    say(
        f"{out}: {result.vocab_size}x{result.hidden_size} in {result.n_clusters} clusters, "
        f"{result.n_probes} probes{f', screened in {result.screen}' if result.screen else ''}"
    )
    if result.why:
        say(result.why)


def _fastest_of(
    recall: float,
    screens: "tuple[Screen | None, ...]",
    prompts: Path | None,
    n_tokens: int,
    device: str,
) -> "Callable[[ModelFolder], Chosen]":
    """A function that chooses a folder's probes and screen for a recall."""
    from flashtune.tuner.clustering.clustered_folder import Chosen
    from flashtune.tuner.clustering.decode_state import read_prompts, require_transformers
    from flashtune.tuner.clustering.quality_report import QualityRequest, study_model
    from flashtune.tuner.clustering.quality_table import pick_line

    require_transformers()
    request = QualityRequest(
        prompts=read_prompts(prompts),
        n_tokens=n_tokens,
        device=device,
        recall=recall,
        screens=_looked_at(screens),
        survey=False,
    )

    def choose(folder: "ModelFolder") -> Chosen:
        report = study_model(folder, request)
        if report.interrupted:
            raise KeyboardInterrupt
        assert report.pick is not None
        pick = report.pick
        return Chosen(
            n_probes=pick.quality.n_probes, screen=pick.form.screen, why=pick_line(report)
        )

    return choose


def _keeping_answers(
    model: str, screen: "Screen | None", prompts: Path | None, n_tokens: int, device: str
) -> "Callable[[ModelFolder], Chosen]":
    """A function that chooses a folder's probes by its model's answers and step times."""
    from flashtune.kernels.model_folder.folder import ModelFolder
    from flashtune.tuner.bench.default_probes import choose_probes
    from flashtune.tuner.clustering.clustered_folder import Chosen
    from flashtune.tuner.clustering.decode_state import read_prompts

    texts, source = read_prompts(prompts), ModelFolder.open(model)

    def choose(folder: ModelFolder) -> Chosen:
        try:
            return choose_probes(source, folder, screen, texts, n_tokens, device)
        except FlashtuneError as error:
            usual = folder.problem().n_probes
            why = (
                f"{usual} probes, a sixteenth of the clusters, not chosen by measurement: {error}"
            )
            return Chosen(n_probes=usual, screen=screen, why=why)

    return choose


def _looked_at(screens: "tuple[Screen | None, ...]") -> "list[Screen]":
    """The given screens, or the usual ones."""
    from flashtune.kernels.formats.screen import Screen
    from flashtune.tuner.clustering.head_form import USUAL_SCREENS

    if not screens:
        return [Screen.parse(text) for text in USUAL_SCREENS]
    return [screen for screen in screens if screen is not None]


@click.command()
@options.model
@options.prompts
@options.tokens
@click.option(
    "--probes",
    "n_probes",
    type=click.IntRange(1),
    multiple=True,
    help="A number of probes to report; may be repeated. Default: powers of two, and the "
    "model's own.",
)
@click.option(
    "--recall",
    type=options.SHARE,
    help="Find the pair of screen and probes that reaches this share and is fastest here.",
)
@options.screens(
    "A screen to report, such as int4/int8:8; may be repeated; 'none' stands for the 16-bit "
    "head. Default: int8, int4/int8 and int4, each also without re-scoring."
)
@click.option(
    "--plot",
    "picture",
    type=options.FILE,
    help="Also draw the result, such as quality.png. Needs flashtune[plot].",
)
@options.run_device
@options.as_json
def quality(
    model: str,
    prompts: Path | None,
    n_tokens: int,
    n_probes: tuple[int, ...],
    recall: float | None,
    screens: "tuple[Screen | None, ...]",
    picture: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Report how often a FlashHead model takes the tokens that its dense head would take.

    Runs the model on text, and reports for several numbers of probes how often the top token and
    the five best agree, how much probability the candidates hold, how long the head takes
    here, and how many bytes it reads and adds: in the model's own dtype, screened, without
    clusters, and dense. Ctrl-C ends it early and shows the results so far.

    \b
    Examples:
      flashtune quality --model ./smollm2-flash
      flashtune quality --model ./smollm2-flash --recall 0.99 --json
      flashtune quality --model ./smollm2-flash --probes 128 --probes 256 --plot quality.png
      flashtune quality --model ./smollm2-flash --screen int8 --screen int4/int8:16
    """
    from flashtune.kernels.model_folder.folder import ModelFolder
    from flashtune.tuner.cli.terminal import print_table
    from flashtune.tuner.clustering.decode_state import read_prompts
    from flashtune.tuner.clustering.quality_report import QualityRequest, study_model
    from flashtune.tuner.clustering.quality_table import (
        check_picture,
        pick_line,
        plot,
        quality_data,
        quality_notes,
        quality_table,
    )
    from flashtune.tuner.here import torch_device_named

    if picture is not None:
        check_picture(picture)
    request = QualityRequest(
        prompts=read_prompts(prompts),
        n_tokens=n_tokens,
        device=device or torch_device_named(None),
        n_probes=n_probes,
        recall=recall,
        screens=_looked_at(screens),
        keep_interrupted=True,
    )
    report = study_model(ModelFolder.open(model), request)
    if picture is not None:
        plot(report, picture)
    if as_json:
        data: dict[str, Any] = {"model": model, **quality_data(report)}
        say_json(data)
    else:
        print_table(quality_table(report))
        for note in quality_notes(report):
            say(note)
        if recall is not None:
            say(pick_line(report))
    if report.interrupted:
        say("interrupted: these are the results so far", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
