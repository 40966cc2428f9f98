"""A study of a model's head as a table, as data and as a picture.

Usage:
    report = study_model(ModelFolder.open("model"), QualityRequest(prompts=read_prompts(None)))
    Console().print(quality_table(report))
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.clustering.decode_state import RunningModel, require_transformers
from flashtune.tuner.clustering.head_latency import HeadLatency
from flashtune.tuner.clustering.quality import QualityRow, Study, usual_probes
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRequest:
    """What to find out: on which text, for how many probes, on which device, timed or not.

    keep_interrupted: after Ctrl-C, report what was counted until then.
    """

    prompts: Sequence[str]
    n_tokens: int = 32
    device: str = "cpu"
    n_probes: Sequence[int] = ()
    recall: float | None = None
    timed: bool = True
    keep_interrupted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedRow:
    """Quality with a number of probes, and what a step takes; level says what ran.

    Not timed: None, and no level.
    """

    quality: QualityRow
    timing: Timing | None = None
    level: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    """What was found. `own_probes` are the model's; recall_probes the fewest for the recall."""

    study: Study
    device: str
    n_states: int
    n_clusters: int
    own_probes: int
    rows: tuple[TimedRow, ...] = ()
    dense: Timing | None = None
    recall: float | None = None
    recall_probes: int | None = None
    interrupted: bool = False


def study_model(folder: ModelFolder, request: QualityRequest) -> QualityReport:
    """Run a FlashHead model on text and judge its head. Raises FlashtuneError."""
    parts = folder.read_head(request.device)
    require_transformers()
    n_clusters = len(parts.clusters.centroids)
    for number in request.n_probes:
        if number > n_clusters:
            raise FlashtuneError(f"{number} probes of {n_clusters} clusters: give fewer")
    model = RunningModel.load(folder, request.device)
    states = model.states(request.prompts, request.n_tokens, request.keep_interrupted)
    study = Study.of(parts, states, model.logits)
    found = None if request.recall is None else study.least_probes(request.recall)
    more = [parts.n_probes] if found is None else [parts.n_probes, found]
    numbers = sorted(set(request.n_probes)) or usual_probes(n_clusters, *more)
    rows = [TimedRow(quality=study.row(number)) for number in numbers]
    dense, interrupted = None, model.interrupted
    if request.timed and not interrupted:
        try:
            dense = _time(rows, HeadLatency(parts, states))
        except KeyboardInterrupt:
            if not request.keep_interrupted:
                raise
            interrupted = True
    return QualityReport(
        study=study,
        device=request.device,
        n_states=len(states),
        n_clusters=n_clusters,
        own_probes=parts.n_probes,
        rows=tuple(rows),
        dense=dense,
        recall=request.recall,
        recall_probes=found,
        interrupted=interrupted,
    )


def _time(rows: list[TimedRow], latency: HeadLatency) -> Timing:
    """Time the rows one after the other, in place, and the dense head."""
    dense = latency.dense()
    with StepProgress("timing the head", len(rows)) as progress:
        for number, row in enumerate(rows):
            timing, level = latency.probing(row.quality.n_probes)
            rows[number] = replace(row, timing=timing, level=level)
            progress.show(number + 1)
    return dense


def quality_table(report: QualityReport) -> Table:
    """A line for each number of probes, and one for the dense head."""
    table = Table(
        title=f"{report.n_states} decode steps, {report.n_clusters} clusters; times measured "
        f"on this machine's {report.device}, microseconds a token"
    )
    for heading in ("probes", "top token", "top five", "probability", "median us", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("runs")
    for row in report.rows:
        quality = row.quality
        own = "*" if quality.n_probes == report.own_probes else ""
        shares = (f"{share:.4f}" for share in (quality.top1, quality.top5, quality.mass))
        times = _times(row.timing)
        table.add_row(f"{quality.n_probes}{own}", *shares, *times, row.level)
    if report.dense is not None:
        table.add_row("dense", "1", "1", "1", *_times(report.dense), "torch")
    table.caption = "* the model's own number of probes"
    return table


def _times(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "not timed", ""
    return f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"


def quality_data(report: QualityReport) -> dict[str, Any]:
    """The report as plain data."""
    recall = None
    if report.recall is not None:
        recall = {"target": report.recall, "n_probes": report.recall_probes}
    return {
        "device": report.device,
        "states": report.n_states,
        "n_clusters": report.n_clusters,
        "n_probes": report.own_probes,
        "dense": asdict(report.dense) if report.dense else None,
        "rows": [
            {
                **asdict(row.quality),
                **(asdict(row.timing) if row.timing else {}),
                "level": row.level,
            }
            for row in report.rows
        ],
        "recall": recall,
        "interrupted": report.interrupted,
    }


def require_matplotlib() -> Any:
    """Matplotlib's figures, or FlashtuneError saying how to get them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlashtuneError("--plot needs matplotlib: pip install 'flashtune[plot]'") from error
    return Figure


def check_picture(path: Path) -> None:
    """Raise FlashtuneError where `plot` could not write a picture of this name."""
    kinds = require_matplotlib()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise FlashtuneError(
            f"{path}: cannot be written: the name must end in one of {', '.join(sorted(kinds))}"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FlashtuneError(f"{path}: cannot be written: {error.strerror}") from error


def plot(report: QualityReport, path: Path) -> None:
    """Draw what probes miss, and what they cost, to a file of the kind its name ends in."""
    figure = require_matplotlib()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    probes = range(1, report.n_clusters + 1)
    rows = [report.study.row(number) for number in probes]
    for name, title in (("top1", "top token"), ("top5", "top five"), ("mass", "probability")):
        axes.plot(probes, [1 - getattr(row, name) for row in rows], label=f"{title} missed")
    axes.set(xscale="log", yscale="log", xlabel="probes", ylabel="share of decode steps")
    axes.set_ylim(0.5 / report.n_states, 1)  # below one of the steps there is nothing to see
    times = axes.twinx()
    times.plot(
        [row.quality.n_probes for row in report.rows if row.timing],
        [row.timing.median_us for row in report.rows if row.timing],
        "k.--",
        label="time",
    )
    times.set(ylabel="microseconds a token", ylim=(0, None))
    axes.axvline(report.own_probes, color="grey", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=4)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise FlashtuneError(f"{path}: cannot be written: {error}") from error
