"""A report's figures, drawn by Plotly (the extra `flashtune[report]`).

Usage:
    require_plotly()
    figure = history(section)       # a plotly.graph_objects.Figure
"""

import html
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from flashtune.tuner.report.content import Section
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import ConfigData, Outcome, family

TOO_SLOW = "too slow"
PARALLEL_TRIALS = 50  # lines that can still be followed
PARALLEL_KNOBS = 8
_HEIGHT = 420
_LEGEND_BELOW = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
_MARGIN = {"l": 50, "r": 20, "t": 40, "b": 40}
_LOGARITHMIC = {
    "type": "log",
    "tickvals": [
        digits * 10.0**power for power in range(-1, 6) for digits in (1, 1.5, 2, 3, 5, 7)
    ],
    "tickformat": "~g",
    "automargin": True,
}


def require_plotly() -> Any:
    """Plotly's graph objects; raises FlashtuneError if it is not installed."""
    try:
        import plotly.graph_objects as graph
    except ImportError as error:
        raise FlashtuneError("a report needs plotly: pip install 'flashtune[report]'") from error
    return graph


def overview(sections: Sequence[Section]) -> Any:
    """The best time of each problem against its byte floor at the device's bandwidth."""
    graph = require_plotly()
    shown = [each for each in sections if each.best is not None]
    figure = graph.Figure()
    points = (
        ("byte floor", "line-ns-open", [each.floor_us or None for each in shown]),
        ("best", "circle", [_time(each) for each in shown]),
        ("default", "circle-open", [each.default_us for each in shown]),
    )
    names = [html.escape(each.search.name) for each in shown]
    rows = list(range(len(shown)))
    for name, symbol, times in points:
        marker = {"symbol": symbol, "size": 12}
        figure.add_scatter(name=name, y=rows, x=times, text=names, mode="markers", marker=marker)
    labels = [
        f"{html.escape(each.search.problem.describe())}<br>{html.escape(each.search.device)}"
        for each in shown
    ]
    figure.update_layout(
        xaxis={"title": "us a call", **_LOGARITHMIC},
        yaxis={
            "automargin": True,
            "range": [len(shown) - 0.5, -0.5],
            "tickvals": rows,
            "ticktext": labels,
        },
        height=180 + 44 * len(shown),
        legend=_LEGEND_BELOW,
        margin=_MARGIN,
    )
    return figure


def history(section: Section) -> Any:
    """The trials in order: timed ones by family, failed ones, and the best so far."""
    graph = require_plotly()
    figure = graph.Figure()
    times: dict[str, list[tuple[int, float, str]]] = {}
    failed: list[tuple[int, str]] = []
    best, line = math.inf, []
    for number, each in enumerate(section.search.evaluated, start=1):
        first, config = each.first, each.record.config
        told = f"{each.created}<br>{_told(config)}"
        if first.median_us is None:
            reason = html.escape(first.error[:200])
            failed.append((number, f"{told}<br>{first.outcome.value}: {reason}"))
        else:
            name = TOO_SLOW if first.outcome is Outcome.PRUNED else family(config)
            times.setdefault(name, []).append((number, first.median_us, told))
            if first.outcome is Outcome.OK:
                best = min(best, first.median_us)
        line.append(best if best < math.inf else None)
    for name, points in sorted(times.items(), key=lambda each: (each[0] != TOO_SLOW, each[0])):
        numbers, values, texts = zip(*points, strict=True)
        marker = {"size": 4, "color": "lightgray"} if name == TOO_SLOW else {"size": 6}
        figure.add_scatter(
            name=html.escape(name), x=numbers, y=values, text=texts, mode="markers", marker=marker
        )
    figure.add_scatter(
        name="best so far",
        x=list(range(1, len(line) + 1)),
        y=line,
        mode="lines",
        line={"shape": "hv", "color": "black"},
    )
    if failed:
        numbers, texts = zip(*failed, strict=True)
        lowest = section.floor_us or min((each for each in line if each), default=1.0)
        figure.add_scatter(
            name="failed",
            x=numbers,
            y=[lowest] * len(failed),
            text=texts,
            mode="markers",
            marker={"symbol": "x", "color": "red"},
        )
    if section.floor_us:
        figure.add_scatter(
            name="byte floor",
            x=[1, len(line)],
            y=[section.floor_us] * 2,
            mode="lines",
            line={"dash": "dot", "color": "gray"},
        )
    figure.update_layout(
        xaxis_title="trial",
        yaxis={"title": "us a call", **_LOGARITHMIC},
        height=_HEIGHT,
        legend=_LEGEND_BELOW,
        margin=_MARGIN,
    )
    return figure


def importances(found: Mapping[str, float]) -> Any:
    """How much each knob decides which configs are fast."""
    graph = require_plotly()
    names = sorted(found, key=lambda name: found[name])
    figure = graph.Figure()
    figure.add_bar(y=names, x=[found[name] for name in names], orientation="h")
    figure.update_layout(yaxis={"automargin": True}, height=100 + 24 * len(names), margin=_MARGIN)
    return figure


def importance(study: optuna.Study) -> dict[str, float]:
    """The importance of each knob that was varied, by name, from Optuna's PED-ANOVA.

    Empty if none was varied.
    """
    names = _varied(study)
    if not names:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
    return {name.partition(".")[2]: share for name, share in found.items()}


def parallel_coordinates(plan: str, study: optuna.Study, found: Mapping[str, float]) -> Any:
    """The fastest configs of a plan as lines through the choices of the knobs that matter most.

    found: the importance of each knob.
    """
    graph = require_plotly()
    trials = sorted(study.trials, key=lambda trial: trial.value or 0.0)[:PARALLEL_TRIALS]
    times = [trial.value or 0.0 for trial in trials]
    dimensions: list[dict[str, Any]] = [{"label": "us", "values": times, "tickformat": ".4~g"}]
    for name in sorted(found, key=lambda name: -found[name])[:PARALLEL_KNOBS]:
        distribution = trials[0].distributions[f"{plan}.{name}"]
        assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
        choices = distribution.choices
        dimensions.append(
            {
                "label": name.replace("_", "<br>"),
                "values": [choices.index(trial.params[f"{plan}.{name}"]) for trial in trials],
                "range": [0, len(choices) - 1],
                "tickvals": list(range(len(choices))),
                "ticktext": [str(choice) for choice in choices],
            }
        )
    # Larger numbers are drawn above the others: those of the fastest, in the darkest colour.
    line = {"color": [-each for each in times], "colorscale": "Viridis", "reversescale": True}
    figure = graph.Figure(graph.Parcoords(dimensions=dimensions, line=line))
    figure.update_layout(height=_HEIGHT - 80, margin={**_MARGIN, "t": 80})
    return figure


def outcomes(section: Section) -> Any:
    """How the evaluations ended."""
    graph = require_plotly()
    names, counts = zip(*section.outcomes.most_common(), strict=True)
    figure = graph.Figure()
    figure.add_bar(x=names, y=counts, text=counts)
    figure.update_layout(yaxis_title="configs", height=_HEIGHT - 160, margin=_MARGIN)
    return figure


def _varied(study: optuna.Study) -> list[str]:
    """The knobs that every trial has, with more than one value."""
    trials = study.trials
    names = [name for name in trials[0].params if name != "plan"]
    return [
        name
        for name in names
        if all(name in trial.params for trial in trials)
        and len({trial.params[name] for trial in trials}) > 1
    ]


def _time(section: Section) -> float | None:
    return section.best.measurement.median_us if section.best else None


def _told(config: ConfigData) -> str:
    """A config as the lines of a label."""
    pairs = [f"{name}={value}" for name, value in config.items()]
    lines = [" ".join(pairs[start : start + 4]) for start in range(0, len(pairs), 4)]
    return "<br>".join(html.escape(line) for line in lines)
