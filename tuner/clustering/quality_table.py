"""A quality report as a table, as plain data and as a picture.

Usage:
    Console().print(quality_table(report))
    json.dumps(quality_data(report))
    plot(report, Path("quality.png"))
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from flashtune.kernels.measure.timing import Timing
from flashtune.tuner.clustering.quality_report import QualityReport, TimedRow
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.whole_file import write_whole

_HEADINGS = (
    "probes", "top\ntoken", "top\nfive", "proba-\nbility", "same\nanswers", "median\nus", "spread",
    "MB\nread", "MB\nadded",
)  # fmt: skip


def quality_table(report: QualityReport) -> Table:
    """A line for each form and number of probes, then the heads without clusters.

    Its numbers fit a terminal of 80 columns.
    """
    table = Table(
        title=(
            f"{report.n_states} decode steps, {report.n_clusters} clusters; times measured on "
            f"this machine's {report.device}, in microseconds per token"
        ),
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("head")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    rows = (*report.rows, *report.whole)
    for row, after in zip(rows, (*rows[1:], None), strict=True):
        last = after is None or (row.form.clustered and after.form != row.form)
        table.add_row(*_cells(report, row))
        if last and after:
            table.add_row()
    return table


def quality_notes(report: QualityReport) -> Iterator[str]:
    """The notes below the table."""
    yield "* set in the model's config"
    if any(row.timing is None for row in (*report.rows, *report.whole)):
        yield "- not timed"
    levels: dict[str, dict[str, None]] = {}
    for row in (*report.rows, *report.whole):
        if row.level:
            levels.setdefault(row.level, {})[str(row.form)] = None
    if levels:
        told = (f"{level}: {', '.join(forms)}" for level, forms in levels.items())
        yield f"runs {'; '.join(told)}"


def _cells(report: QualityReport, row: TimedRow) -> list[str]:
    quality = row.quality
    mine = (row.form, quality.n_probes) == (report.own_form, report.own_probes)
    probes = f"{quality.n_probes}{'*' if mine else ''}" if row.form.clustered else ""
    shares = [f"{share:.4f}" for share in (quality.top1, quality.top5, quality.mass)]
    same = round((quality.answers or 0) * report.n_answers)
    sizes = [f"{size / 1e6:.2f}" for size in (row.read_bytes, row.added_bytes)]
    return [
        str(row.form),
        probes,
        *shares,
        f"{same}/{report.n_answers}",
        *_times(row.timing),
        *sizes,
    ]


def _times(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "-", ""
    return f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"


def pick_line(report: QualityReport) -> str:
    """The pick for the recall, in words."""
    assert report.pick is not None and report.recall is not None
    form, quality = report.pick.form, report.pick.quality
    if not form.screen and len({row.form for row in report.rows}) == 1:
        return (
            f"{quality.n_probes} probes are the fewest that reach a recall of {report.recall:.2%}"
        )
    judged = "the fastest" if report.pick.timing else "the one that reads the fewest bytes"
    return (
        f"{form} with {quality.n_probes} probes is {judged} of those that reach a recall of "
        f"{report.recall:.2%}"
    )


def quality_data(report: QualityReport) -> dict[str, Any]:
    """The report as plain data."""
    recall = None
    if report.recall is not None and report.pick is not None:
        pick = report.pick
        recall = {
            "target": report.recall,
            "n_probes": pick.quality.n_probes,
            "screen": str(pick.form.screen) if pick.form.screen else None,
        }
    return {
        "device": report.device,
        "states": report.n_states,
        "answers": report.n_answers,
        "n_clusters": report.n_clusters,
        "n_probes": report.own_probes,
        "head": str(report.own_form),
        "dense": asdict(report.dense) if report.dense else None,
        "rows": [_row_data(row) for row in report.rows],
        "whole": [_row_data(row) for row in report.whole],
        "recall": recall,
        "interrupted": report.interrupted,
    }


def _row_data(row: TimedRow) -> dict[str, Any]:
    data = {
        "head": str(row.form),
        **asdict(row.quality),
        **(asdict(row.timing) if row.timing else {}),
        "level": row.level,
        "read_bytes": row.read_bytes,
        "added_bytes": row.added_bytes,
    }
    return data if row.form.clustered else {**data, "n_probes": None}


def require_matplotlib() -> Any:
    """Matplotlib's figures; raises FlashtuneError saying how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlashtuneError("--plot needs matplotlib: pip install 'flashtune[plot]'") from error
    return Figure


def check_picture(path: Path) -> None:
    """Raise FlashtuneError if `plot` could not write a picture of this name."""
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
    """Draw each form's misses against time and against probes; the suffix sets the format.

    Forms that were not timed are only in the second picture.
    """
    figure = require_matplotlib()(figsize=(11, 4.8), layout="constrained")
    by_time, by_probes = figure.subplots(1, 2, sharey=True)
    least = 0.5 / report.n_states  # less than one step cannot be seen
    forms = [form for form in report.study.forms if form.clustered]
    for number, form in enumerate(forms):
        colour = f"C{number}"
        timed = [row for row in report.rows if row.form == form and row.timing]
        by_time.plot(
            [row.timing.median_us for row in timed if row.timing],
            [_missed(row.quality.top1, least) for row in timed],
            "o-" if form.n_rescored or form.screen is None else "o:",
            color=colour,
            label=str(form),
        )
        found = report.study.forms[form]
        missed = [_missed(int(each) / found.n_states, least) for each in found.top1]
        by_probes.plot(range(1, len(missed) + 1), missed, color=colour)
    for marker, row in zip("sD^vP*XhdpH", (r for r in report.whole if r.timing), strict=False):
        time = row.timing.median_us if row.timing else 0
        by_time.plot([time], [_missed(row.quality.top1, least)], f"k{marker}", label=str(row.form))
    by_time.set(xscale="log", yscale="log", xlabel="microseconds a token")
    by_time.set(ylabel="share of decode steps whose token differs from the dense head's")
    by_time.set_ylim(0.8 * least, 1)
    by_probes.set(xscale="log", xlabel="probes")
    by_probes.axvline(report.own_probes, color="grey", linewidth=0.5)
    figure.legend(loc="outside right upper")
    save_picture(figure, path)


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's suffix. Raises FlashtuneError."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    write_whole(path, drawn.getvalue())


def _missed(share: float, least: float) -> float:
    return max(1 - share, least)
