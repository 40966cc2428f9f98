"""The result for one config on one problem and device: a row of the database.

A config is kept here as plain data (`{"plan": "staged", "score_rows": 2, …}`): to run it, first
pass it through `flashtune.kernels.plans.config.parse_config`.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.problem import Problem

NOISE = 0.01  # of a time; a smaller lead does not count
MOST_NAME = 500  # characters of a name or a version
MOST_ERROR = 10_000  # characters of an error's text
_LEAST_US, _MOST_US = 1e-3, 1e12  # a nanosecond, which tables round to, and eleven days
_MOST_SAMPLES = 2**31 - 1
_MOST_JOULES = 1e9
YOUNGER = frozenset(["joules"])  # fields of measurements that older databases and tables lack
_KNOB = re.compile("[a-z][a-z0-9_]*")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)", re.ASCII)
_CLOCKS_APART = timedelta(days=1)  # allowed between machines whose clocks are set
Scalar = int | float | str | bool
ConfigData = Mapping[str, Scalar]


class Outcome(str, Enum):
    """How one evaluation ended. Everything but OK is a failure that is kept as data.

    Only ENVIRONMENT is not due to the config: the machine could not compile or run anything. It
    ends a search and is never recorded.
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
    """How a time was obtained, the most trusted first.

    MEASURED on the device; CORRECTED: predicted from what a probe measured on the device instead
    of its published figures; PREDICTED from published figures. The last two are not measurements
    of the config.
    """

    MEASURED = "measured"
    CORRECTED = "corrected"
    PREDICTED = "predicted"

    @property
    def rank(self) -> int:
        """Its place in that order: lower is more trusted."""
        return list(Provenance).index(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One evaluation of a config. Times are microseconds per call.

    Only OK and PRUNED measurements have a time. PRUNED is a config that was correct, but so slow
    at its first sample that no more were taken.

    `spread_us` is the distance between the 10th and 90th percentile of the samples or, for a
    prediction (corrected or not), the width of its 80 % interval; `error` says why the outcome is
    not OK; `policy` says how the time was measured (`search`, `final`, `race`) or, for a
    prediction, names the cost model's version. `joules` is the energy of a call, None if not
    measured.
    """

    outcome: Outcome
    median_us: float | None = None
    spread_us: float | None = None
    samples: int = 0
    error: str = ""
    policy: str = "search"
    joules: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an impossible measurement.

        Only OK and PRUNED outcomes have a time, of at least a nanosecond.
        """
        if not isinstance(self.outcome, Outcome):
            raise ValueError(f"outcome must be an Outcome, not {quoted(self.outcome)}")
        _check_time("median_us", self.median_us, _LEAST_US)
        _check_time("spread_us", self.spread_us, 0.0)
        timed = self.outcome in (Outcome.OK, Outcome.PRUNED)
        if (self.median_us is not None) != timed:
            raise ValueError(
                f"a measurement with outcome {self.outcome.value} cannot have the median "
                f"{self.median_us}"
            )
        if type(self.samples) is not int or not 0 <= self.samples <= _MOST_SAMPLES:
            raise ValueError(f"samples must be a count, not {quoted(self.samples)}")
        _check_text("error", self.error, MOST_ERROR, empty=True)
        _check_text("policy", self.policy, MOST_NAME)
        if self.joules is not None and not (
            timed and type(self.joules) in (int, float) and 0 <= self.joules <= _MOST_JOULES
        ):
            raise ValueError(
                f"joules must be from 0 to {_MOST_JOULES:g}, or null, and null without a time, "
                f"not {quoted(self.joules)}"
            )

    def data(self) -> dict[str, Any]:
        """The measurement as plain data.

        Newer fields are left out if unknown, so that tables without them stay unchanged.
        """
        data = {**asdict(self), "outcome": self.outcome.value}
        unknown = {name for name in YOUNGER if data[name] is None}
        return {name: each for name, each in data.items() if name not in unknown}

    @property
    def noise_us(self) -> float:
        """How much shorter another time must be to count as faster: 1 %, or half the spread."""
        return max(NOISE * (self.median_us or 0.0), (self.spread_us or 0.0) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A database row: device, toolchain, problem, config, provenance and the newest measurement.

    `created` is UTC in ISO 8601, to the second. Raises ValueError for an invalid record.
    """

    device: str
    toolchain: Toolchain
    problem: Problem
    config: ConfigData
    provenance: Provenance
    measurement: Measurement
    created: str

    def __post_init__(self) -> None:
        """Check the fields; a fault of the machine must not be recorded for a config."""
        if self.measurement.outcome is Outcome.ENVIRONMENT:
            raise ValueError(
                "a problem of the machine must not be recorded for a config: "
                f"{self.measurement.error}"
            )
        _check_text("device", self.device, MOST_NAME)
        _check_tools(self.toolchain)
        _check_config(self.config)
        if not isinstance(self.provenance, Provenance):
            raise ValueError(f"provenance must be a Provenance, not {quoted(self.provenance)}")
        check_created(self.created)

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
            "measurement": self.measurement.data(),
            "created": self.created,
        }


def family(config: ConfigData) -> str:
    """The family of a config: `staged/in_gather`, or only the plan.

    The plan, and its way to select clusters if it has several.
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


def when_made(created: str) -> str:
    """A record's `created`, to compare ages; empty, older than any, if it is in the future.

    A clock was wrong then. Otherwise no measurement made now could replace one of next year.
    """
    latest = datetime.now(timezone.utc) + _CLOCKS_APART
    return created if created < latest.strftime("%Y-%m-%dT%H:%M:%SZ") else ""


@functools.lru_cache(maxsize=64)
def _check_tools(tools: Toolchain) -> None:
    for tool, version in asdict(tools).items():
        _check_text(f"the toolchain's {tool}", version, MOST_NAME, empty=True)


def check_created(created: Any) -> None:
    """Raises ValueError for an invalid creation time."""
    if not isinstance(created, str) or not _CREATED.fullmatch(created):
        raise ValueError(f"created must be UTC as 2026-01-31T12:00:00Z, not {quoted(created)}")
    try:
        datetime.fromisoformat(created.removesuffix("Z").removesuffix("+00:00"))
    except ValueError as error:
        raise ValueError(f"created is not a time: {created}: {error}") from error


def _check_time(name: str, time_us: Any, least: float) -> None:
    if time_us is None:
        return
    if type(time_us) not in (int, float) or not least <= time_us <= _MOST_US:
        raise ValueError(
            f"{name} must be microseconds from {least:g} to {_MOST_US:g}, or null, "
            f"not {quoted(time_us)}"
        )


def _check_text(name: str, text: Any, most: int, *, empty: bool = False) -> None:
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(
            f"{name} must be text{'' if empty else ' and not empty'}, not {quoted(text)}"
        )
    if len(text) > most:
        raise ValueError(f"{name} has more than {most} characters: {quoted(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} cannot be encoded: {quoted(text)}") from error


def _check_config(config: Any) -> None:
    """Check for plain data: names, and values that a plan may have."""
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be an object, not {quoted(config)}")
    for name, value in config.items():
        if not isinstance(name, str) or not _KNOB.fullmatch(name):
            raise ValueError(f"config has a key {quoted(name)}: use small letters, digits and _")
        if type(value) not in (int, float, str, bool):
            raise ValueError(f"{name} in config must be a number, text or boolean")
        if type(value) is str:
            _check_text(f"{name} in config", value, MOST_NAME, empty=True)
        elif not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} in config must be a number of 64 bits")
    if type(config.get("plan")) is not str:
        raise ValueError("config must name its plan")
