"""What a report compares: choices of a knob, shapes with each other's configs, a table of before.

Usage:
    coverage(trials)                # how much of each knob was tried, and what it gave
    crossings(sections)             # what one config for all shapes would cost
    changes(table, store)           # today's records against an earlier table
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from flashtune.kernels.plans.config import config_data, short_config
from flashtune.tuner.report.content import Section
from flashtune.tuning_db.merge import compare_tables
from flashtune.tuning_db.record import Outcome, config_key
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import TuningTable, table_from_store


@dataclass(slots=True)
class ChoiceTried:
    """A choice of a knob: in how many configs it was tried, and the best time of these (µs)."""

    configs: int = 0
    best_us: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobCoverage:
    """The choices of a plan's knob, those that were never tried too."""

    plan: str
    knob: str
    choices: dict[Any, ChoiceTried] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """The number of choices that at least one config has."""
        return sum(each.configs > 0 for each in self.choices.values())


def coverage(trials: Iterable[optuna.trial.FrozenTrial]) -> list[KnobCoverage]:
    """Of each knob of each plan that was searched, in the order in which they came up."""
    found: dict[str, KnobCoverage] = {}
    for trial in trials:
        plan = trial.params["plan"]
        for name, distribution in trial.distributions.items():
            owner, _, knob = name.partition(".")
            if owner != plan:
                continue
            assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
            own = found.setdefault(name, KnobCoverage(plan=plan, knob=knob))
            for choice in distribution.choices:
                own.choices.setdefault(choice, ChoiceTried())
            tried = own.choices[trial.params[name]]
            tried.configs += 1
            if trial.value is not None:
                tried.best_us = min(tried.best_us, trial.value)
    return list(found.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """The times of a device's searches with the configs that won the others.

    configs: the winners, in short form. rows: a search's shape and provenance; its time with each
    of these over its best time, None where that was not measured; and the number of its winner.
    """

    device: str
    configs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...], int], ...]


def crossings(sections: Sequence[Section]) -> list[Crossing]:
    """A table for each device with at least two shapes that have times."""
    by_device: dict[str, list[Section]] = defaultdict(list)
    for section in sections:
        if section.best is not None:
            by_device[section.search.device].append(section)
    return [_crossing(name, own) for name, own in by_device.items() if len(own) > 1]


def _crossing(device: str, sections: Sequence[Section]) -> Crossing:
    winners = {
        config_key(section.best.config): section.best.config
        for section in sections
        if section.best
    }
    rows = []
    for section in sections:
        times = times_of(section)
        assert section.best is not None
        own = config_key(section.best.config)
        best = times[own]
        ratios = tuple(times[key] / best if key in times else None for key in winners)
        shape = f"{section.search.problem.describe()} {section.search.provenance.value}"
        rows.append((shape, ratios, list(winners).index(own)))
    configs = tuple(short_config(config) for config in winners.values())
    return Crossing(device=device, configs=configs, rows=tuple(rows))


def times_of(section: Section) -> dict[str, float]:
    """A search's times in microseconds, by config."""
    return {
        config_key(record.config): record.measurement.median_us
        for record in (each.record for each in section.search.evaluated)
        if record.measurement.outcome is Outcome.OK and record.measurement.median_us
    }


def cost_of_choice(section: Section) -> float | None:
    """The time of what a head would run, over the best on record; None where it has no time."""
    times = times_of(section)
    if section.choice is None or section.best is None:
        return None
    time_us = times.get(config_key(config_data(section.choice.config)))
    return None if time_us is None else time_us / times[config_key(section.best.config)]


def changes(before: TuningTable, store: Store) -> dict[str, Any]:
    """How the database's records differ from a table of the same device, as `tables diff`."""
    return compare_tables(before, table_from_store(store, before.device))
