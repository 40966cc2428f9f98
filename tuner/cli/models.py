"""`flashtune cluster` and `flashtune quality`: make a FlashHead model, and say how good it is."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.clustering.clustered_folder import ClusterRequest, cluster_model
from flashtune.tuner.clustering.decode_state import read_prompts, require_transformers
from flashtune.tuner.clustering.kmeans import ITERATIONS
from flashtune.tuner.clustering.quality_report import (
    QualityRequest,
    plot,
    quality_data,
    quality_table,
    require_matplotlib,
    study_model,
)
from flashtune.tuning_db.errors import FlashtuneError

RECALL = click.FloatRange(0, 1, min_open=True)
_device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where to do it; else on a GPU where torch has one.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
_prompts = click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Text to continue, a prompt a line; else a few dozen that are shipped.",
)
_tokens = click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens to continue each prompt by.",
)


def _chosen(device: str | None) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise FlashtuneError("torch finds no GPU here: give --device cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@click.command()
@click.option("--model", required=True, help="The model's folder, or its name in the cache.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
@click.option(
    "--clusters", "n_clusters", type=click.IntRange(1), help="Else a sixteenth of the vocabulary."
)
@click.option(
    "--probes", "n_probes", type=click.IntRange(1), help="Else a sixteenth of the clusters."
)
@click.option("--recall", type=RECALL, help="Choose the probes so that this share agrees.")
@_prompts
@_tokens
@_device
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=ITERATIONS, show_default=True)
@click.option("--link", is_flag=True, help="Hard links to the weight files, not copies.")
@_json
def cluster(
    model: str,
    out: Path,
    n_clusters: int | None,
    n_probes: int | None,
    recall: float | None,
    prompts: Path | None,
    n_tokens: int,
    device: str | None,
    seed: int,
    iterations: int,
    link: bool,
    as_json: bool,
) -> None:
    """Make a FlashHead model of any causal language model.

    Clusters the rows of its head and writes a folder with the model and its clusters. Run the
    same command again to go on where an interrupted one was.

    \b
    Examples:
      flashtune cluster --model ./smollm2 --out ./smollm2-flash
      flashtune cluster --model ./smollm2 --out ./smollm2-flash --clusters 3072 --recall 0.99
    """
    if n_probes and recall:
        raise click.UsageError("give one of --probes and --recall")
    choose: Callable[[ModelFolder], int] | None = None
    if recall is not None:
        require_transformers()
        texts, where, share = read_prompts(prompts), _chosen(device), recall

        def choose(folder: ModelFolder) -> int:
            request = QualityRequest(prompts=texts, n_tokens=n_tokens, device=where, timed=False)
            return study_model(folder, request).study.least_probes(share)

    request = ClusterRequest(
        model=model,
        out=out,
        n_clusters=n_clusters,
        n_probes=n_probes,
        device=_chosen(device),
        seed=seed,
        iterations=iterations,
        link=link,
    )
    try:
        result = cluster_model(request, choose)
    except KeyboardInterrupt:
        click.echo("interrupted: the same command goes on from here", err=True)
        raise click.exceptions.Exit(130) from None
    if as_json:
        click.echo(json.dumps({**asdict(result), "out": str(out)}, indent=1))
        return
    click.echo(
        f"{out}: {result.vocab_size}x{result.hidden_size} in {result.n_clusters} clusters, "
        f"{result.n_probes} probes"
    )


@click.command()
@click.option("--model", required=True, help="A FlashHead model's folder, or its name.")
@_prompts
@_tokens
@click.option(
    "--probes",
    "n_probes",
    type=click.IntRange(1),
    multiple=True,
    help="Numbers of probes to report; else powers of two, and the model's own.",
)
@click.option("--recall", type=RECALL, help="Find the fewest probes for this share.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it to a file.")
@_device
@_json
def quality(
    model: str,
    prompts: Path | None,
    n_tokens: int,
    n_probes: tuple[int, ...],
    recall: float | None,
    picture: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Say how often a FlashHead model's probes find what its dense head would take.

    Runs the model on text, and reports for numbers of probes how often the top token and the
    five best agree, how much of the probability is among the candidates, and how long the head
    takes here.

    \b
    Examples:
      flashtune quality --model ./smollm2-flash
      flashtune quality --model ./smollm2-flash --recall 0.99 --json
      flashtune quality --model ./smollm2-flash --probes 128 --probes 256 --plot quality.png
    """
    if picture is not None:
        require_matplotlib()
    request = QualityRequest(
        prompts=read_prompts(prompts),
        n_tokens=n_tokens,
        device=_chosen(device),
        n_probes=n_probes,
        recall=recall,
        keep_interrupted=True,
    )
    report = study_model(ModelFolder.open(model), request)
    if picture is not None:
        plot(report, picture)
    if as_json:
        data: dict[str, Any] = {"model": model, **quality_data(report)}
        click.echo(json.dumps(data, indent=1))
    else:
        Console().print(quality_table(report))
        if recall is not None:
            click.echo(f"{report.recall_probes} probes are the fewest that agree in {recall:.2%}")
    if report.interrupted:
        click.echo("interrupted: what is shown was counted until then", err=True)
        raise click.exceptions.Exit(130)
