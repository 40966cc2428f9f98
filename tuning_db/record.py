"""What was found out about one config on one problem and device: the database's row.

A config is kept here as plain data (`{"plan": "staged", "score_rows": 2, …}`): whoever runs
it must first pass it through `flashtune.kernels.plans.config.parse_config`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.problem import Problem

NOISE = 0.01  # of a time; a smaller lead is none
Scalar = int | float | str | bool
ConfigData = Mapping[str, Scalar]


class Outcome(str, Enum):
    """How one evaluation ended. Everything but OK is a failure that is kept as data.

    ENVIRONMENT alone is none of the config's: the machine could not compile or run anything. It
    ends a search, and no record says so.
    """

    OK = "ok"
    COMPILE_ERROR = "compile_error"
    INVALID = "invalid"
    WRONG_RESULT = "wrong_result"
    CRASH = "crash"
    TIMEOUT = "timeout"
    OUT_OF_RESOURCES = "out_of_resources"
    PRUNED = "pruned"
    ENVIRONMENT = "environment"


class Provenance(str, Enum):
    """Whether a time was measured on the device or predicted by the cost model."""

    MEASURED = "measured"
    PREDICTED = "predicted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One evaluation of a config. Times are microseconds a call.

    OK and PRUNED measurements have a time, and only they: PRUNED is a config that was right, but
    so slow at its first sample that no more were taken.

    `spread_us` is the distance between the 10th and 90th percentile of the samples or, of a
    prediction, the width of its 80 % interval; `error` says why the outcome is not OK; `policy`
    names how the time was taken (`search`, `final`, `race`) or, for a prediction, the cost
    model's version.
    """

    outcome: Outcome
    median_us: float | None = None
    spread_us: float | None = None
    samples: int = 0
    error: str = ""
    policy: str = "search"

    def __post_init__(self) -> None:
        """An OK measurement has a time, and only then; times are finite and not negative."""
        for time_us in (self.median_us, self.spread_us):
            if time_us is not None and not 0 <= time_us < math.inf:
                raise ValueError(f"a measurement of {time_us} microseconds")
        timed = self.outcome in (Outcome.OK, Outcome.PRUNED)
        if (self.median_us is not None) != timed:
            raise ValueError(
                f"a measurement with outcome {self.outcome.value} and median {self.median_us}"
            )

    @property
    def noise_us(self) -> float:
        """By how much another time must be less to be faster: 1 %, or half the spread."""
        return max(NOISE * (self.median_us or 0.0), (self.spread_us or 0.0) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A database row: device, toolchain, problem, config, provenance and the newest measurement.

    `created` is UTC in ISO 8601, to the second.
    """

    device: str
    toolchain: Toolchain
    problem: Problem
    config: ConfigData
    provenance: Provenance
    measurement: Measurement
    created: str

    def __post_init__(self) -> None:
        """The machine's trouble is held against no config."""
        if self.measurement.outcome is Outcome.ENVIRONMENT:
            raise ValueError(f"a record of the machine's trouble: {self.measurement.error}")

    @property
    def key(self) -> str:
        """The row's identity: device, toolchain, problem and config, hashed."""
        return record_key(self.device, self.toolchain, self.problem, self.config)

    def data(self) -> dict[str, Any]:
        """The record and its key as plain data."""
        return {
            "key": self.key,
            "device": self.device,
            "toolchain": asdict(self.toolchain),
            "problem": self.problem.data(),
            "config": dict(self.config),
            "provenance": self.provenance.value,
            "measurement": {
                **asdict(self.measurement),
                "outcome": self.measurement.outcome.value,
            },
            "created": self.created,
        }


def family(config: ConfigData) -> str:
    """What configs of one kind have in common: `staged/in_gather`, or the plan alone.

    The plan, and how it selects clusters where it can do so in several ways.
    """
    plan, selection = config.get("plan"), config.get("selection")
    return str(plan) if selection is None else f"{plan}/{selection}"


def config_key(config: ConfigData) -> str:
    """Canonical JSON of a config: sorted keys, no spaces."""
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":"))


def record_key(device: str, toolchain: Toolchain, problem: Problem, config: ConfigData) -> str:
    """The identity of the record of a config, as 32 hex digits."""
    parts = "\n".join((device, toolchain.key, problem.key, config_key(config)))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]
