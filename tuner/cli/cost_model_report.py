"""The cost model's check, formatted for the terminal."""

from typing import Any

from rich.table import Table

from flashtune.tuner.cli.terminal import print_table, say
from flashtune.tuner.predict.check import (
    LEAST_CORRELATION,
    MOST_ERROR,
    MOST_LOSS,
    CardResult,
    Report,
    Results,
)
from flashtune.tuning_db.shortlist import MOST


def print_report(report: Report) -> None:
    """Print every table, and a line for each requirement of the model."""
    for table in (
        splits_table(report),
        problems_table(report),
        figures_table(report),
        rates_table(report),
        *(card_table(card) for card in report.cards),
        formats_table(report),
    ):
        print_table(table)
    for name, evidence in report.evidence.items():
        say(f"{name}: {evidence.describe()}")
    for what, holds in verdicts(report):
        say(f"{'passed' if holds else 'FAILED'}: {what}")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left")
    return table


def splits_table(report: Report) -> Table:
    """A line for each set of shapes held out."""
    table = _table(
        f"{report.device}: {report.samples} measured configs, predicted by fits without their "
        "shape",
        "held out",
        "rank correlation",
        f"best of {MOST}",
        "in the 80 % interval",
    )
    for split in report.splits:
        table.add_row(
            " + ".join(split.held_out) + (" *" if split is report.headline else ""),
            f"{split.rank_correlation:.2f}",
            f"+{split.loss:.1%}",
            f"{split.inside:.0%}",
        )
    return table


def problems_table(report: Report) -> Table:
    """A line for each problem of the split that was fixed beforehand."""
    return _results_table("* fixed beforehand", report.headline)


def card_table(card: CardResult) -> Table:
    """A line for each problem of a calibration that the fit has not seen."""
    return _results_table(f"{card.records}, of which the fit has seen no time", card)


def _results_table(title: str, results: Results) -> Table:
    table = _table(
        title,
        "problem",
        "configs",
        "rank correlation",
        "first choice",
        f"best of {MOST}",
        "in the interval",
        "median error",
    )
    for each in results.results:
        table.add_row(
            each.problem.describe(),
            str(each.samples),
            f"{each.rank_correlation:.2f}",
            f"+{each.first:.1%}",
            f"+{each.loss:.1%}",
            f"{each.inside:.0%}",
            f"{each.error:+.0%}",
        )
    return table


def figures_table(report: Report) -> Table:
    """A line for each published time and number of probes."""
    table = _table(
        "published times of other devices, in microseconds",
        "device",
        "step",
        "probes",
        "published",
        "predicted",
        "error",
    )
    for each in report.figures:
        table.add_row(
            each.device,
            "fused gather" if each.fused else "framework",
            str(each.n_probes),
            f"{each.published_us:.0f}",
            f"{each.predicted_us:.0f}",
            f"{each.error:+.0%}",
        )
    return table


def rates_table(report: Report) -> Table:
    """A line for each published pair of rates: the saving per token."""
    table = _table(
        "savings per token on other devices, from published token rates, in microseconds",
        "device",
        "model",
        "body",
        "published",
        "rounding",
        "predicted",
        "error",
        "error at 256 probes",
    )
    for each in report.rates:
        table.add_row(
            each.device,
            each.model,
            each.body,
            f"{each.published_us:.0f}",
            f"{each.rounding:.0%}",
            f"{each.predicted_us:.0f}",
            f"{each.error:+.0%}",
            f"{each.fewer_probes_error:+.0%}",
        )
    return table


def formats_table(report: Report) -> Table:
    """A line for each time in a format, or of a plan, that is unknown to the fit."""
    table = _table(
        "measured on another device, with formats and plans that the fit never saw, in "
        "microseconds",
        "device",
        "problem",
        "plan",
        "measured",
        "predicted",
        "error",
        "in the interval",
    )
    for each in report.formats:
        table.add_row(
            each.device,
            each.problem.describe(),
            each.plan,
            f"{each.measured_us:.1f}",
            f"{each.predicted_us:.1f}",
            f"{each.error:+.0%}",
            "yes" if each.inside else "no",
        )
    return table


def _within(card: CardResult) -> int:
    return sum(each.loss <= MOST_LOSS for each in card.results)


def verdicts(report: Report) -> list[tuple[str, bool]]:
    """The requirements of the model, and whether they hold."""
    passed: dict[str, Any] = report.data()["passed"]
    return [
        (f"rank correlation of at least {LEAST_CORRELATION}", passed["rank_correlation"]),
        (f"best of {MOST} within {MOST_LOSS:.0%}", passed["loss"]),
        *(
            (f"published times within {MOST_ERROR:.0%} at {probes} probes", holds)
            for probes, holds in passed["error"].items()
        ),
        *(
            (
                f"best of {MOST} within {MOST_LOSS:.0%} of {card.records}: {_within(card)} of "
                f"{len(card.results)} problems",
                passed["cards"][card.records],
            )
            for card in report.cards
        ),
    ]
