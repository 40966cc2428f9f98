"""What a search minimises: a call's time, its energy, or both.

Usage:
    objective.seen(measurement)       # the measurement as the search ranks it
    objective.best(records)           # the record to report as the winner
    front(records)                    # records that no other beats in both, fastest first
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum

from flashtune.tuning_db.policy import is_final
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.table import rank

MICRO = 1e6


class Objective(str, Enum):
    """TIME: microseconds per call. ENERGY: joules per call. BOTH: their product.

    For BOTH no single config is best. The product only guides the search; the winner reported is
    the fastest config, along with all that no other beats in both time and energy.
    """

    TIME = "time"
    ENERGY = "energy"
    BOTH = "both"

    @property
    def needs_energy(self) -> bool:
        """Whether joules have to be measured."""
        return self is not Objective.TIME

    def cost(self, measurement: Measurement) -> float | None:
        """The value to minimise: microseconds, microjoules, or the square root of their product.

        None if the config failed, or if joules are needed and were not measured.
        """
        time_us, joules = measurement.median_us, measurement.joules
        if self is Objective.TIME or time_us is None:
            return time_us
        if joules is None:
            return None
        return MICRO * joules if self is Objective.ENERGY else math.sqrt(time_us * MICRO * joules)

    def seen(self, measurement: Measurement) -> Measurement:
        """The measurement with the cost instead of its time, for the search to rank."""
        cost = self.cost(measurement)
        if self is Objective.TIME or cost is None:
            return measurement
        return replace(measurement, median_us=cost, spread_us=None)

    def knows(self, measurement: Measurement) -> bool:
        """Whether a measurement is complete for this objective; a failure is complete, too."""
        return measurement.median_us is None or self.cost(measurement) is not None

    def best(self, records: Iterable[Record]) -> Record | None:
        """The record with the least energy if the objective is ENERGY, else the best as usual."""
        worked = [each for each in records if each.measurement.outcome is Outcome.OK]
        if self is not Objective.ENERGY:
            return min(worked, key=rank, default=None)
        known = [each for each in worked if each.measurement.joules is not None]
        return min(known, key=_energy_first, default=None)


def front(records: Iterable[Record]) -> list[Record]:
    """The Pareto front of time and energy, fastest first; records without energy are left out."""
    known = [
        each
        for each in records
        if each.measurement.outcome is Outcome.OK and each.measurement.joules is not None
    ]
    found: list[Record] = []
    for record in sorted(known, key=_time_and_energy):
        if not found or _time_and_energy(record)[1] < _time_and_energy(found[-1])[1]:
            found.append(record)
    return found


def _energy_first(record: Record) -> tuple[bool, float, tuple[int, bool, bool, float, str]]:
    measurement = record.measurement
    return not is_final(measurement.policy), measurement.joules or 0.0, rank(record)


def _time_and_energy(record: Record) -> tuple[float, float]:
    measurement = record.measurement
    assert measurement.median_us is not None and measurement.joules is not None
    return measurement.median_us, measurement.joules
