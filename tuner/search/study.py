"""A recorded search, and the equivalent Optuna study.

Usage:
    for found in searches(store):
        study = optuna.create_study(direction="minimize")
        study.add_trials(trials_of(found, space))
    export_studies(searches(store), "sqlite:///studies.db")    # for optuna-dashboard
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna

from flashtune.kernels.plans.config import parse_config
from flashtune.tuner.here import device_named
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

MOST_ATTRIBUTE = 2000  # characters of an error; some databases' columns hold 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A config's record, with its first measurement and when that ended (UTC).

    The record has the newest measurement; for finalists, that of the comparison.
    """

    record: Record
    first: Measurement
    created: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSearch:
    """The evaluations of one problem on one device with the same tools, in order."""

    device: str
    toolchain: Toolchain
    problem: Problem
    provenance: Provenance
    evaluated: list[Evaluated] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A one-line name that tells it from other searches."""
        tools = self.toolchain
        named = (("triton", tools.triton), ("torch", tools.torch), ("driver", tools.driver))
        versions = [f"{name} {version}" for name, version in named if version]
        parts = [self.device, self.problem.describe(), self.provenance.value, *versions]
        return " ".join([*parts, tools.compiler] if tools.compiler else parts)


def searches(
    store: Store, device: str | None = None, problems: Sequence[Problem] = ()
) -> list[RecordedSearch]:
    """The searches of a device and some problems, or of all, sorted by device and problem."""
    chosen = [
        record
        for problem in problems or (None,)
        for record in store.records(device=device, problem=problem)
    ]
    records = {each.key: each for each in chosen}
    found: dict[tuple[str, Problem, str, Toolchain], RecordedSearch] = {}
    for key, created, first in store.first_measurements():
        record = records.get(key)
        if record is None:
            continue
        place = record.device, record.problem, record.provenance.value, record.toolchain
        search = found.setdefault(
            place,
            RecordedSearch(
                device=record.device,
                toolchain=record.toolchain,
                problem=record.problem,
                provenance=record.provenance,
            ),
        )
        search.evaluated.append(Evaluated(record=record, first=first, created=created))
    return [found[place] for place in sorted(found)]


def space_of(search: RecordedSearch) -> Space | None:
    """The space that was searched; None for a device that only its own machine can describe."""
    try:
        return Space(search.problem, device_named(search.device))
    except FlashtuneError:
        return None


def trials_of(search: RecordedSearch, space: Space) -> list[optuna.trial.FrozenTrial]:
    """The trials of a search, as far as this version of flashtune can read them.

    A failure is a failed trial; a config that was too slow to be timed in full is a pruned trial,
    whose time is its only intermediate value.
    """
    trials = []
    for each in search.evaluated:
        try:
            config = parse_config(each.record.config)
        except FlashtuneError:
            continue  # from another version of its plan
        parameters = space.parameters(config)
        if parameters is None:
            continue
        measurement = each.record.measurement
        ok, pruned = (measurement.outcome is each for each in (Outcome.OK, Outcome.PRUNED))
        states = optuna.trial.TrialState
        trial = optuna.trial.create_trial(
            params=parameters,
            distributions=space.distributions(config),
            value=measurement.median_us if ok else None,
            intermediate_values={0: measurement.median_us or 0.0} if pruned else {},
            state=states.COMPLETE if ok else states.PRUNED if pruned else states.FAIL,
            user_attrs=_attributes(each.record),
        )
        trial.datetime_start = trial.datetime_complete = _local(each.created)
        trials.append(trial)
    return trials


def export_studies(found: Sequence[RecordedSearch], storage: str) -> list[tuple[str, int]]:
    """Write each search as a study to an Optuna storage; returns names and numbers of trials.

    A search on a device that only its own machine can describe is left out. Raises FlashtuneError
    if the storage cannot be used; or, with nothing written, if it already has a study of one of
    the names.
    """
    known = [(each, space) for each in found if (space := space_of(each))]
    names = [each.name for each, _ in known]
    trials = [trials_of(each, space) for each, space in known]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        opened = optuna.storages.RDBStorage(storage)
        there = set(names) & set(optuna.get_all_study_names(opened))
        if there:
            raise FlashtuneError(
                f"a study named {min(there)!r} already exists: give another storage"
            )
        for name, each in zip(names, trials, strict=True):
            study = optuna.create_study(storage=opened, study_name=name, direction="minimize")
            study.add_trials(each)
    except Exception as error:  # SQLAlchemy, a missing driver, a path, a full disk
        raise FlashtuneError(f"cannot write to the storage {storage}: {error}") from error
    return [(name, len(each)) for name, each in zip(names, trials, strict=True)]


def _attributes(record: Record) -> dict[str, Any]:
    found = {
        "record": record.key,
        "outcome": record.measurement.outcome.value,
        "provenance": record.provenance.value,
        "policy": record.measurement.policy,
    }
    error = record.measurement.error
    return {**found, "error": error[:MOST_ATTRIBUTE]} if error else found


def _local(created: str) -> datetime:
    """A record's time as Optuna keeps times: in this machine's time zone, without naming it."""
    utc = datetime.fromisoformat(created.replace("Z", "+00:00"))
    with suppress(OverflowError):  # at either end of the supported years
        utc = utc.astimezone()
    return utc.replace(tzinfo=None)
