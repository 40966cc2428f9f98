"""A bench report as rows of a table, as plain data and as a picture.

Usage:
    print_rows(title(report), HEADINGS, table_rows(report), notes=notes(report))
    json.dumps(bench_data(report))
    plot(report, Path("bench.png"))
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashtune.tuner.bench.bench import BenchReport, BenchRow, timing
from flashtune.tuner.bench.verdict import MOST_COST
from flashtune.tuner.clustering.quality_table import require_matplotlib, save_picture

HEADINGS = (
    "head", ">probes", ">tok/s", ">spread", ">ratio", ">share", ">MB", ">answers", ">tokens"
)  # fmt: skip


def title(report: BenchReport) -> str:
    """What was measured, and under which conditions."""
    return (
        f"tokens per prompt: {report.n_tokens}, batch size: {report.batch}, rounds: "
        f"{report.rounds}, on this machine's {report.device}; the heads take turns"
    )


def table_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """A row for each head, under HEADINGS."""
    return [_cells(row) for row in report.rows]


def _cells(row: BenchRow) -> tuple[str, ...]:
    speed = timing(row.tokens_per_s)
    probes = "" if row.entry.n_probes is None else f"{row.entry.n_probes}"
    return (
        row.entry.form,
        f"{probes}*" if row.entry.own else probes,
        f"{speed.median_us:.1f}",
        f"{speed.spread_us:.1f}" if speed.samples > 1 else "",
        f"{statistics.median(row.ratio):.2f}",
        f"{row.head_share:.1%}",
        f"{row.added_bytes / 1e6:.1f}",
        f"{row.same_answers}/{row.answers}",
        f"{row.same_tokens / row.tokens:.1%}",
    )


def notes(report: BenchReport) -> Iterator[str]:
    """The notes below the table: what its columns mean, and what is recommended."""
    if report.interrupted:
        yield (
            f"INTERRUPTED: {report.rounds} of {report.planned} rounds, the last one possibly "
            "incomplete"
        )
    elif report.rounds < report.planned:
        yield (
            f"OUT OF TIME: {report.rounds} of {report.planned} rounds; give a longer --timeout "
            "for the others"
        )
    yield "tok/s: from the median step; spread: 10th to 90th percentile over the rounds"
    yield "ratio: tok/s over the dense head's in the same round; share: the head's part of a step"
    yield "MB: memory added; answers, tokens: the same as the dense head's in greedy decoding,"
    yield "with tokens counted up to the first that differs"
    if any(row.entry.own for row in report.rows):
        yield "* set in the model's config"
    for row in report.rows:
        if row.level == "torch" and not row.entry.dense:
            yield f"{row.entry.name}: runs in plain torch, since no kernel for it works here"
        if row.model_weight and row.model_weight.startswith("a copy"):
            yield f"{row.entry.name}: MB includes the model's weight, {row.model_weight}"
    noise = report.noise
    if noise is None:
        yield "only one round: the noise is unknown, so give more --rounds"
    elif noise > MOST_COST:
        yield (
            f"NOISY: step times are uncertain by {noise:.0%}, more than the {MOST_COST:.0%} that "
            "tells heads apart: give more --rounds, on an otherwise idle machine"
        )
    if len(report.rows) > 1:
        yield f"recommended: {report.verdict.describe()}"
    if not report.has_clusters:
        yield (
            "this model has no clusters: make them with `flashtune cluster` for heads that read "
            "less"
        )


def bench_data(report: BenchReport) -> dict[str, Any]:
    """The report as plain data."""
    pick = report.verdict.pick
    [picked] = [row for row in report.rows if row.entry.name == pick.name]
    return {
        "device": report.device,
        "tokens": report.n_tokens,
        "batch": report.batch,
        "rounds": report.rounds,
        "planned_rounds": report.planned,
        "clusters": report.has_clusters,
        "rows": [_row_data(row) for row in report.rows],
        "recommended": {**_head_data(picked), "why": report.verdict.describe()},
        "noise": report.noise,
        "interrupted": report.interrupted,
    }


def _head_data(row: BenchRow) -> dict[str, Any]:
    screen = row.entry.screen
    return {
        "head": row.entry.form,
        "n_probes": row.entry.n_probes,
        "screen": None if screen is None else str(screen),
    }


def _row_data(row: BenchRow) -> dict[str, Any]:
    speed, ratio = timing(row.tokens_per_s), timing(row.ratio)
    return {
        **_head_data(row),
        "own": row.entry.own,
        "level": row.level,
        "model_weight": row.model_weight,
        "tokens_per_s": speed.median_us,
        "tokens_per_s_spread": speed.spread_us,
        "ratio": ratio.median_us,
        "ratio_spread": ratio.spread_us,
        "head_us": row.head_us,
        "head_share": row.head_share,
        "added_bytes": row.added_bytes,
        "same_answers": row.same_answers,
        "answers": row.answers,
        "same_tokens": row.same_tokens,
        "tokens": row.tokens,
    }


def plot(report: BenchReport, path: Path) -> None:
    """Draw the share of unchanged answers against tokens/s; the file's suffix sets the format.

    A line joins the numbers of probes of one form.
    """
    figure = require_matplotlib()(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    forms = dict.fromkeys(row.entry.form for row in report.rows)
    for form in forms:
        rows = [row for row in report.rows if row.entry.form == form]
        speeds = [timing(row.tokens_per_s) for row in rows]
        shares = [row.same_answers / row.answers for row in rows]
        medians = [speed.median_us for speed in speeds]
        halves = [speed.spread_us / 2 for speed in speeds]
        axes.errorbar(medians, shares, xerr=halves, fmt="o-", capsize=3, label=form)
        for row, median, share in zip(rows, medians, shares, strict=True):
            if row.entry.n_probes is not None:
                axes.annotate(
                    str(row.entry.n_probes),
                    (median, share),
                    xytext=(4, 5),
                    textcoords="offset points",
                )
    axes.set(xlabel="tokens/s", ylabel="answers the same as the dense head's", ylim=(-0.05, 1.1))
    axes.set_title(title(report), fontsize="medium")
    figure.legend(loc="outside right upper")
    save_picture(figure, path)
