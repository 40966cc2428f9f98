"""The page of a report: one HTML file that works offline.

Usage:
    write_report(Path("report.html"), database, read_sections(database), None)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flashtune.kernels.plans.config import config_data, short_config
from flashtune.tuner.report import figure
from flashtune.tuner.report.comparison import (
    Crossing,
    KnobCoverage,
    cost_of_choice,
    coverage,
    crossings,
)
from flashtune.tuner.report.content import ENOUGH, Section
from flashtune.tuning_db.one_line import spelled
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.whole_file import write_whole

_MOST_REASONS = 20


def write_report(
    out: Path, database: Path, sections: Sequence[Section], changed: Mapping[str, Any] | None
) -> None:
    """Write the page of these searches.

    changed: what comparison.changes found, if there is an earlier table to compare with. Raises
    FlashtuneError without Plotly, or if the page cannot be written.
    """
    figure.require_plotly()
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = resources.files("flashtune.tuner.report").joinpath("page.html.j2").read_text("utf-8")
    text = environment.from_string(source).render(
        database=spelled(str(database)),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        script=Markup(get_plotlyjs()),
        overview=_drawn(figure.overview(sections)),
        sections=[_data(each) for each in sections],
        crossings=[_cross(each) for each in crossings(sections)],
        changed=_changed(changed) if changed else None,
    )
    write_whole(out, text.encode())


def _data(section: Section) -> dict[str, Any]:
    best, choice, floor = section.best, section.choice, section.floor_us
    time_us = best.measurement.median_us if best else None
    return {
        "name": section.search.name,
        "trials": len(section.search.evaluated),
        "default": _number(section.default_us),
        "best": _number(time_us),
        "floor": _number(floor or None),
        "ratio": _ratio(time_us / floor if time_us and floor else None),
        "best_config": short_config(best.config) if best else "",
        "runs": short_config(config_data(choice.config))
        if choice
        else "not known on this machine",
        "cost": _ratio(cost_of_choice(section)),
        "coverage": [_covered(each) for each in coverage(section.trials)],
        "why": f"{choice.source}: {choice.why}" if choice else "",
        "figures": [
            {"title": title, "drawn": _drawn(each), "wide": each.data[0].type == "parcoords"}
            for title, each in _figures(section)
        ],
        "reasons": section.reasons.most_common(_MOST_REASONS),
        "notes": list(_notes(section)),
    }


def _figures(section: Section) -> Iterator[tuple[str, Any]]:
    """Titles and figures. Titles stand outside, where a browser breaks their lines."""
    yield "Trials", figure.history(section)
    for plan, study in section.studies.items():
        if found := figure.importance(study):
            yield f"Importance of the knobs of plan {plan}", figure.importances(found)
            shown = min(len(study.trials), figure.PARALLEL_TRIALS)
            title = f"Knobs of plan {plan}: the {shown} fastest of {len(study.trials)} configs"
            yield title, figure.parallel_coordinates(plan, study, found)
    yield "Outcomes", figure.outcomes(section)


def _notes(section: Section) -> Iterator[str]:
    yield from section.troubles
    if section.device is None:
        yield "Only its own machine can describe this device: no floor, and no knobs compared."
    elif not section.studies:
        yield f"No plan has {ENOUGH} trials that worked: no knobs compared."
    left = len(section.reasons) - _MOST_REASONS
    if left > 0:
        yield f"{left} rarer reasons are not shown."


def _covered(knob: KnobCoverage) -> dict[str, str]:
    choices = (
        f"{choice}: {each.configs}" + (f" ({each.best_us:.1f})" if each.best_us < math.inf else "")
        for choice, each in knob.choices.items()
    )
    return {
        "knob": f"{knob.plan} {knob.knob}",
        "tried": f"{knob.tried} of {len(knob.choices)}",
        "choices": ", ".join(choices),
    }


def _cross(crossing: Crossing) -> dict[str, Any]:
    rows = [
        {
            "shape": shape,
            "cells": [
                _ratio(each) + (" *" if at == own else "") for at, each in enumerate(ratios)
            ],
        }
        for shape, ratios, own in crossing.rows
    ]
    return {"device": crossing.device, "configs": crossing.configs, "rows": rows}


def _changed(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "shape": Problem.from_json(each["problem"]).describe(),
            "times": [_number(time_us) for time_us in each["median_us"]],
            "ratio": _ratio(each["ratio"]),
            "provenance": " → ".join(dict.fromkeys(each["provenance"])),
            "knobs": ", ".join(f"{name} {a} → {b}" for name, (a, b) in each["config"].items()),
        }
        for each in found["changed"]
    ]
    return {**found, "rows": rows}


def _drawn(drawing: Any) -> Markup:
    """A figure as a part of the page, which already includes Plotly's library."""
    config = {"displaylogo": False, "responsive": True}
    return Markup(drawing.to_html(full_html=False, include_plotlyjs=False, config=config))


def _number(time_us: float | None) -> str:
    return "" if time_us is None else f"{time_us:.1f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
