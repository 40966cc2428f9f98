"""Merges tables of one device, and compares two tables.

Usage:
    merged = merge([("a.json", a), ("b.json", b)])
    merged.table
    for conflict in merged.conflicts: …     # whose records were taken, and why
    compare_tables(a, b)                    # plain data

All records of a problem are taken from one table. Measured beats corrected, which beats predicted;
then the newer toolchain beats the older; then a measurement that is faster by more than the noise
beats the slower. If neither is, the table named first keeps its records. Predictions of the same
cost model form a new shortlist; of two cost models, the one used last counts.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.policy import taken_behind
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record, when_made
from flashtune.tuning_db.shortlist import shortlist
from flashtune.tuning_db.table import TuningTable, rank, toolchain_age

BOTH = "both"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """A problem on which tables disagree, whose records were taken (a name or `both`), and why.

    `taken` and `left` are the best records of the two sides.
    """

    problem: Problem
    taken_from: str
    why: str
    taken: Record
    left: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The merged table, and where its sources disagreed."""

    table: TuningTable
    conflicts: tuple[Conflict, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """One table's records of a problem: those that worked, the best first."""

    name: str
    records: tuple[Record, ...]

    @property
    def best(self) -> Record:
        return self.records[0]

    @property
    def provenance(self) -> Provenance:
        return self.best.provenance


def merge(tables: Sequence[tuple[str, TuningTable]]) -> Merged:
    """Merge several tables, each given with its name.

    Raises FlashtuneError if they are of different devices.
    """
    device = _same_device(tables)
    merged: dict[Problem, _Side] = {}
    conflicts = []
    for name, table in tables:
        for problem, records in _by_problem(table).items():
            side = _Side(name=name, records=records)
            before = merged.get(problem)
            if before is None:
                merged[problem] = side
            elif before.records != records:
                merged[problem], why = _settle(before, side)
                left = before if merged[problem] is side else side
                conflicts.append(
                    Conflict(
                        problem=problem,
                        taken_from=merged[problem].name,
                        why=why,
                        taken=merged[problem].best,
                        left=left.best,
                    )
                )
    records = tuple(record for side in merged.values() for record in side.records)
    return Merged(table=TuningTable(device=device, records=records), conflicts=tuple(conflicts))


def _settle(one: _Side, other: _Side) -> tuple[_Side, str]:
    """Whose records to take, and why."""
    if one.provenance is not other.provenance:
        better, worse = sorted((one, other), key=lambda side: side.provenance.rank)
        return better, f"{better.provenance.value}, not {worse.provenance.value}"
    ages = [toolchain_age(side.best)[0] for side in (one, other)]
    if ages[0] != ages[1]:
        newer, older = (one, other) if ages[0] > ages[1] else (other, one)
        return newer, f"{_tools(newer)} is newer than {_tools(older)}"
    if one.provenance is not Provenance.MEASURED:
        return _settle_predictions(one, other)
    behind = [taken_behind(side.best.measurement.policy) for side in (one, other)]
    if behind[0] != behind[1]:
        return one if behind[0] else other, "timed behind another kernel, as decode runs a step"
    times = [side.best.measurement.median_us or 0.0 for side in (one, other)]
    noise = max(side.best.measurement.noise_us for side in (one, other))
    if abs(times[0] - times[1]) <= noise:
        return one, f"{times[0]:.3f} and {times[1]:.3f} us differ by no more than the noise"
    faster = one if times[0] < times[1] else other
    return faster, f"{min(times):.3f} us is faster than {max(times):.3f}"


def _settle_predictions(one: _Side, other: _Side) -> tuple[_Side, str]:
    models = [side.best.measurement.policy for side in (one, other)]
    if models[0] != models[1]:
        newer = max(one, other, key=lambda side: when_made(side.best.created))
        return newer, f"{newer.best.measurement.policy} predicted last"
    newest: dict[str, Record] = {}
    for record in sorted((*one.records, *other.records), key=lambda each: when_made(each.created)):
        newest[record.key] = record
    both = tuple(shortlist(newest.values()))
    return _Side(name=BOTH, records=both), "a shortlist of both"


def compare_tables(a: TuningTable, b: TuningTable) -> dict[str, Any]:
    """How b differs from a, as plain data; each value is a pair, a's and b's.

    `changed` has the problems whose records differ, the largest change of time first: for the best
    records the time with its ratio, the provenance, the toolchain and the knobs that differ; and
    the number of all records. Raises FlashtuneError if the tables are of different devices.
    """
    device = _same_device([("", a), ("", b)])
    ours, theirs = _by_problem(a), _by_problem(b)
    both = sorted(set(ours) & set(theirs))
    changed = [problem for problem in both if ours[problem] != theirs[problem]]
    return {
        "device": device,
        "same": len(both) - len(changed),
        "only_a": [problem.data() for problem in sorted(set(ours) - set(theirs))],
        "only_b": [problem.data() for problem in sorted(set(theirs) - set(ours))],
        "changed": sorted(
            (_change(problem, ours[problem], theirs[problem]) for problem in changed),
            key=_size_of_change,
            reverse=True,
        ),
    }


def _size_of_change(change: dict[str, Any]) -> float:
    """How far a time moved, up or down."""
    return abs(math.log(change["ratio"])) if change["ratio"] else math.inf


def _change(
    problem: Problem, ours: tuple[Record, ...], theirs: tuple[Record, ...]
) -> dict[str, Any]:
    one, other = ours[0], theirs[0]
    times = [each.measurement.median_us or 0.0 for each in (one, other)]
    tools = {field.name for field in fields(Toolchain)}
    chains = [asdict(each.toolchain) for each in (one, other)]
    configs = [one.config, other.config]
    knobs = sorted({*one.config, *other.config})
    return {
        "problem": problem.data(),
        "median_us": times,
        "ratio": times[1] / times[0] if times[0] else None,
        "provenance": [one.provenance.value, other.provenance.value],
        "toolchain": {
            name: [chain[name] for chain in chains]
            for name in sorted(tools)
            if chains[0][name] != chains[1][name]
        },
        "config": {
            name: [config.get(name) for config in configs]
            for name in knobs
            if one.config.get(name) != other.config.get(name)
        },
        "records": [len(ours), len(theirs)],
    }


def _same_device(tables: Sequence[tuple[str, TuningTable]]) -> str:
    devices = list(dict.fromkeys(table.device for _, table in tables))
    if len(devices) != 1:
        raise FlashtuneError(
            f"tables of {' and '.join(devices)} cannot be merged: give tables of one device"
        )
    return devices[0]


def _by_problem(table: TuningTable) -> dict[Problem, tuple[Record, ...]]:
    """The records that worked, by problem, the best of each first."""
    found = defaultdict(list)
    for record in table.records:
        if record.measurement.outcome is Outcome.OK:
            found[record.problem].append(record)
    return {problem: tuple(sorted(records, key=rank)) for problem, records in found.items()}


def _tools(side: _Side) -> str:
    chain = side.best.toolchain
    named = (("triton", chain.triton), ("torch", chain.torch), ("driver", chain.driver))
    return " ".join(f"{name} {version}" for name, version in named if version) or "no toolchain"
