"""The race at first load: times configs that are only predicted, or measured with other tools.

Usage:
    choice, race = hold(start, choice)      # the choice to run, and how it was made
    race.explain()                          # plain data

Predictions for this problem and device are first corrected by a probe of the device
(`correction`). The contenders (`choice.contenders`) are compared with the default in this process,
on the head's own weights, and the winner is kept in the user's database: the next load finds it
there. A contender that does not beat the default by more than the noise is dropped, and the
default is kept as the winner. If several processes load the same problem on the same kind of
device, one races and the others wait for its winner. Nothing here raises if there is no race.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.runtime.choice import (
    USER,
    Choice,
    Level,
    Source,
    contenders,
    default_choice,
)
from flashtune.kernels.runtime.correction import correct
from flashtune.kernels.runtime.heat import RUN_SECONDS, Comparison, Entry, compare
from flashtune.kernels.runtime.records import look
from flashtune.kernels.runtime.trouble import is_of_a_signal, one_line
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.lock import Lock
from flashtune.tuning_db.lock import hold as hold_lock
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record, config_key
from flashtune.tuning_db.store import Store, default_path

LOG = logging.getLogger("flashtune")
MOST_SECONDS = 20.0  # of all races of a head, with compilation
WAIT_SECONDS = 30.0  # for another process's race, which may take longer than those
LEAST_SECONDS = RUN_SECONDS + 1.0  # that must be left for a race to start
_KEPT_FAILURES = (Outcome.WRONG_RESULT, Outcome.CRASH)  # those that would recur
UNKEPT = "this process"  # the source of a winner that could not be written down


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a race is about.

    `seconds` is the time limit. What a user should know goes to `troubles`.
    """

    problem: Problem
    weights: Weights
    device: Device
    toolchain: Toolchain
    seconds: float
    troubles: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """How a race went, or why none was held (`why_not`). `dropped` says why a config lost.

    `seconds` is its duration without waiting for other processes.
    """

    seconds: float = 0.0
    why_not: str = ""
    comparison: Comparison | None = None
    dropped: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log."""
        if self.comparison is None:
            return f"not raced: {self.why_not}"
        n_timed = sum(bool(each.measurement) for each in self.comparison.entries)
        return f"raced {n_timed} configs in {self.seconds:.1f} s"

    def explain(self) -> dict[str, Any]:
        """Plain data: each config that took part, with its times and why it was dropped."""
        comparison = self.comparison
        data: dict[str, Any] = {"why_not": self.why_not or None, "seconds": self.seconds}
        if comparison is None:
            return data
        return {
            **data,
            "compile_seconds": comparison.compile_s,
            "run_seconds": comparison.run_s,
            "most_bytes": comparison.most_bytes,
            "centroids": "cold" if comparison.is_cold else "warm: no room for copies",
            "timed": [
                {
                    "config": dict(config_data(entry.config)),
                    "outcome": entry.measurement.outcome.value if entry.measurement else None,
                    "median_us": entry.measurement.median_us if entry.measurement else None,
                    "spread_us": entry.measurement.spread_us if entry.measurement else None,
                    "dropped": reason or None,
                }
                for entry, reason in zip(comparison.entries, self.dropped, strict=True)
            ],
        }


def hold(start: Start, choice: Choice) -> tuple[Choice, Race]:
    """Race for a choice that is not settled; returns what to run, even without a race."""
    why_not = _why_not(start)
    if why_not:
        return choice, Race(why_not=why_not)
    begun = time.monotonic()
    try:
        database = _writable(start.troubles)
        with _alone(start, database) as lock:
            begun = time.monotonic()
            found, race = _take_turn(start, choice, lock, database)
    except Exception as error:  # a full device, a compiler, a driver: the head must answer
        found, race = choice, Race(why_not=one_line(error))
    return found, replace(race, seconds=time.monotonic() - begun)


def _why_not(start: Start) -> str:
    if start.seconds < LEAST_SECONDS:
        return f"the {MOST_SECONDS:.0f} s that a head may spend on races are used up"
    if start.weights.weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""


def _writable(troubles: list[str]) -> Path | None:
    """The database's path, created if necessary; None if it can't be written."""
    try:
        path = default_path()
        Store(path).close()
    except FlashtuneError as error:
        troubles.append(f"the winner of a race is used, but not kept: {error}")
        return None
    return path


@contextmanager
def _alone(start: Start, database: Path | None) -> Iterator[Lock | None]:
    """The lock of this device and problem, or None if another process kept it too long.

    If winners can't be kept, no process could read another's winner, so none waits.
    """
    if database is None:
        with NamedTemporaryFile() as file, hold_lock(Path(file.name), 0.0) as lock:
            yield lock
        return
    subject = f"{start.device.name}\n{start.problem.key}"
    name = hashlib.sha256(subject.encode()).hexdigest()[:16]
    with hold_lock(Path(f"{database}.race-{name}"), WAIT_SECONDS) as lock:
        yield lock


def _take_turn(
    start: Start, choice: Choice, lock: Lock | None, database: Path | None
) -> tuple[Choice, Race]:
    """Race, unless another process has raced in the meantime or is still racing."""
    if lock is None:
        if choice.record is None or choice.record.provenance is not Provenance.MEASURED:
            choice = default_choice(start.problem, start.device, skipped=choice.skipped)
        why_not = f"another process has raced for {WAIT_SECONDS:.0f} s and has not finished"
        return choice, Race(why_not=why_not)
    choice, sources = look(start.problem, start.device, start.toolchain, start.troubles)
    begun = time.monotonic()
    if database is not None and not choice.settled and _corrected(start, sources, database):
        choice, sources = look(start.problem, start.device, start.toolchain, start.troubles)
    start = replace(start, seconds=start.seconds - (time.monotonic() - begun))
    configs = contenders(start.problem, start.device, start.toolchain, sources)
    if choice.settled:
        return choice, Race(why_not="another process has raced in the meantime")
    if len(configs) == 1:
        return choice, Race(why_not="the default is the only config")
    comparison = _compare(start, configs, lock)
    winner = _winner(comparison)
    failed = [each for each in comparison.entries if _outcome(each) in _KEPT_FAILURES]
    kept = _keep(start, database, [*failed, *([winner] if winner else [])])
    race = Race(comparison=comparison, dropped=_dropped(comparison, winner))
    if winner is None:
        if any(entry.config == choice.config for entry in failed):
            choice = default_choice(start.problem, start.device, skipped=choice.skipped)
        return choice, replace(race, why_not="there were too few to compare")
    return _won(start, winner, comparison, kept), race


def _corrected(start: Start, sources: Sequence[Source], database: Path) -> bool:
    """Whether the predictions for exactly this problem here were corrected by a probe."""
    predictions = [
        record
        for source in sources
        for record in source.records
        if (record.device, record.problem) == (start.device.name, start.problem)
        and record.provenance is Provenance.PREDICTED
    ]
    if not predictions:
        return False
    try:
        with Store(database) as store:
            return correct(start.device, start.weights.weight.device, predictions, store) > 0
    except Exception as error:  # a compiler, a driver, a database: the race is held all the same
        if is_of_a_signal(error):
            raise
        start.troubles.append(f"predictions are not corrected by a probe: {one_line(error)}")
        return False


def _compare(start: Start, configs: Sequence[Config], lock: Lock) -> Comparison:
    """Compare all configs except one that killed the process in an earlier race."""
    died = [config for config in configs[1:] if _key(config) == lock.left]

    def note(config: Config | None) -> None:
        lock.note("" if config == configs[0] else _key(config))

    problem = start.problem
    name, seconds = problem.describe(), start.seconds
    LOG.info("racing %d configs for %s, up to %.0f s", len(configs), name, seconds)
    comparison = compare(
        problem,
        start.weights,
        start.device,
        [config for config in configs if config not in died],
        seconds=seconds,
        note=note,
    )
    passed_over = (Entry(config=config, why="a process died while it ran") for config in died)
    return replace(comparison, entries=(*comparison.entries, *passed_over))


def _winner(comparison: Comparison) -> Entry | None:
    """The fastest, if it beats the default by more than the noise, else the default.

    None if the default had no turn, or only the default had one.
    """
    default, *others = comparison.entries
    right = [each for each in comparison.entries if _outcome(each) is Outcome.OK]
    ran = default.measurement and any(each.measurement for each in others)
    if comparison.device_lost or not ran or not right:
        return None
    fastest = min(right, key=_time_us)
    if default in right and _time_us(fastest) > _time_us(default) - _noise_us(default):
        return default
    return fastest


def _dropped(comparison: Comparison, winner: Entry | None) -> tuple[str, ...]:
    """Why each entry did not win; empty for the winner."""
    reasons = []
    for entry in comparison.entries:
        measurement = entry.measurement
        if entry is winner:
            reasons.append("")
        elif measurement is None:
            reasons.append(entry.why)
        elif measurement.outcome is Outcome.OK and winner is comparison.entries[0]:
            reasons.append(
                f"not faster than the default by more than the noise, {_noise_us(winner):.2f} us"
            )
        elif measurement.outcome in (Outcome.OK, Outcome.PRUNED):
            reasons.append("slower")
        else:
            reasons.append(f"{measurement.outcome.value}: {measurement.error}")
    return tuple(reasons)


def _won(start: Start, winner: Entry, comparison: Comparison, kept: bool) -> Choice:
    default = comparison.entries[0]
    n_timed = sum(bool(each.measurement) for each in comparison.entries)
    name = "the default" if winner is default else "it"
    why = f"{name} won a race of {n_timed} configs here with {_time_us(winner):.1f} us"
    if winner is not default:
        failed = _outcome(default) is not Outcome.OK
        why += "; the default failed" if failed else f"; the default took {_time_us(default):.1f}"
    return Choice(
        config=winner.config,
        level=Level.EXACT,
        why=why,
        record=_record(start, winner),
        source=USER if kept else UNKEPT,
        toolchain_matches=True,
    )


def _keep(start: Start, database: Path | None, entries: Sequence[Entry]) -> bool:
    """Write entries to the database; a failed write does not stop a winner from being used."""
    if database is None:
        return False
    try:
        with Store(database) as store:
            for entry in entries:
                store.add(_record(start, entry))
    except FlashtuneError as error:
        start.troubles.append(f"the winner of a race is used, but not kept: {error}")
        return False
    return True


def _record(start: Start, entry: Entry) -> Record:
    assert entry.measurement is not None
    return Record(
        device=start.device.name,
        toolchain=start.toolchain,
        problem=start.problem,
        config=config_data(entry.config),
        provenance=Provenance.MEASURED,
        measurement=entry.measurement,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _outcome(entry: Entry) -> Outcome | None:
    return entry.measurement.outcome if entry.measurement else None


def _time_us(entry: Entry) -> float:
    return (entry.measurement and entry.measurement.median_us) or 0.0


def _noise_us(entry: Entry) -> float:
    return entry.measurement.noise_us if entry.measurement else 0.0


def _key(config: Config | None) -> str:
    return config_key(config_data(config)) if config else ""
