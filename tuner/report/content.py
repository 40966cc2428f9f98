"""What a report says about each recorded search.

Usage:
    sections = read_sections(database)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.runtime.choice import Choice
from flashtune.kernels.runtime.records import look
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.search.failure import reasons
from flashtune.tuner.search.study import RecordedSearch, searches, space_of, trials_of
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import rank

ENOUGH = 8  # trials of a plan from which its knobs can be compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A search, and what can be said about it.

    Times are microseconds per call. For a device that only its own machine can describe there is
    no floor, trial, study, choice or default. studies: one for each plan with `ENOUGH` trials that
    worked, first the plan of the best record. choice: what a head would run.
    """

    search: RecordedSearch
    device: Device | None
    floor_us: float | None
    default_us: float | None
    best: Record | None
    outcomes: Counter[str]
    reasons: Counter[str]
    trials: tuple[optuna.trial.FrozenTrial, ...]
    studies: dict[str, optuna.Study]
    choice: Choice | None
    troubles: tuple[str, ...]


def read_sections(
    database: Path, device: Device | None = None, problems: Sequence[Problem] = ()
) -> list[Section]:
    """The searches in a database, of a device and some problems, or of all.

    Raises FlashtuneError if there is none, or the database cannot be read.
    """
    with Store(database, read_only=True) as store:
        found = searches(store, device.name if device else None, problems)
    if not found:
        raise FlashtuneError(f"no such record in {database}: run `flashtune search`")
    return [_section(each, database) for each in found]


def _section(search: RecordedSearch, database: Path) -> Section:
    records = [each.record for each in search.evaluated]
    measurements = [record.measurement for record in records]
    worked = [record for record in records if record.measurement.outcome is Outcome.OK]
    best = min(worked, key=rank, default=None)
    space = space_of(search)
    troubles: list[str] = []
    choice = default_us = None
    trials: list[optuna.trial.FrozenTrial] = []
    if space is not None:
        choice = look(search.problem, space.device, search.toolchain, troubles, database)[0]
        default_us = _default_us(search.problem, space.device, records)
        trials = trials_of(search, space)
    return Section(
        search=search,
        device=space.device if space else None,
        floor_us=floor_us(search.problem, space.device) if space else None,
        default_us=default_us,
        best=best,
        outcomes=Counter(each.outcome.value for each in measurements),
        reasons=reasons(measurements),
        trials=tuple(trials),
        studies=_studies(trials, str(best.config["plan"]) if best else ""),
        choice=choice,
        troubles=tuple(troubles),
    )


def _default_us(problem: Problem, device: Device, records: Sequence[Record]) -> float | None:
    try:
        default = config_data(default_config(problem, device))
    except FlashtuneError:  # no kernel can solve it any more
        return None
    times = (each.measurement.median_us for each in records if each.config == default)
    return next(times, None)


def _studies(trials: Sequence[optuna.trial.FrozenTrial], first: str) -> dict[str, optuna.Study]:
    """An in-memory study of each plan with enough trials, by the plan's name."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_plan: dict[str, list[optuna.trial.FrozenTrial]] = {first: []}
    for trial in trials:
        if trial.state is optuna.trial.TrialState.COMPLETE:
            by_plan.setdefault(trial.params["plan"], []).append(trial)
    found = {}
    for plan, those in by_plan.items():
        if len(those) >= ENOUGH:
            found[plan] = optuna.create_study(direction="minimize")
            found[plan].add_trials(those)
    return found
