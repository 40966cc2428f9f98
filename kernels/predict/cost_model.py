"""How long a config should take on a device that is not available here, with an interval.

Usage:
    prediction = predict(candidate, uses)
    prediction.time_us, prediction.low_us, prediction.high_us

Stages ask for counts (stage.py), constants turn counts into time; the constants are fitted to
measured records (cost_fit.py) and read from a file. Equations and sources: docs/cost-model.md.
What comes out ranks candidates: it is a prediction, and records say so.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.predict.stages.registry import stages_of
from flashtune.kernels.predict.stages.stage import REFERENCE_HZ, Stage
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import items, members, number, parse_json, read_text, text
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.problem import FORMATS, Problem
from flashtune.tuning_db.record import MOST_NAME, ConfigData, Measurement, family

VERSION = "stages-2"
_LEAST, _MOST = 1e-6, 1e6  # of constants and of factors, far beyond what any fit gives
CYCLES_US = 1e9 / REFERENCE_HZ  # microseconds of a thousand cycles of the reference clock
MODEL_FILE = resources.files("flashtune.tuning_db") / "calibration" / "cost-model.json"

Array = NDArray[np.float64]
Columns = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What a count costs: in µs at the reference clock, unless stated otherwise."""

    launch: float  # from one kernel of a graph to the next
    overlapped: float  # the same by programmatic dependent launch
    barrier: float
    end: float  # the step's token: the last arrival, and what else every step has
    arrival: float  # of a thousand programs at one address
    sort: float  # a call of torch.topk
    score: float  # of ten thousand scores, there
    load: float  # a memory access that others wait for; half of it scales with the clock
    loop: float  # steps of a loop until the compiler no longer has their loads overlap
    ragged: float  # share of a load that a masked step of a loop waits for
    turn: float  # from one tile of a loop over tiles to the next
    crossing: float  # a sum across 16 warps
    round: float  # a reduction of the search for the threshold
    round_warps: float  # the same, for 16 warps
    scan: float  # a score that a thread looks at
    element: float  # of the matrix, for a thread
    work: float  # thousand cycles of a multiprocessor's arithmetic
    reach: float  # share of the published bandwidth that is reached
    apart: float  # the same, of sectors in which single numbers are stored
    prefetched: float  # share of the wait for bytes that prefetching them saves
    tail: float  # share of a wave that its missing programs cost
    sharpness: float  # of the maximum of waiting, moving and working: 1 adds them up


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """µs per call, and the interval that held 80 % of the measured times."""

    time_us: float
    low_us: float
    high_us: float


def columns_of(stages: Sequence[Stage]) -> Columns:
    """Each field of the stages as an array, a value a stage."""
    return {
        each.name: np.array([getattr(stage, each.name) for stage in stages], dtype=np.float64)
        for each in fields(Stage)
    }


def stage_us(counts: Columns, constants: Constants) -> Array:
    """µs of each stage."""
    clock, c = counts["clock"], constants
    latency = (1 + clock) / 2  # the way through the chip scales with the clock, memory does not
    fixed = clock * (
        c.launch * counts["launches"]
        + c.overlapped * counts["overlapped"]
        + c.barrier * counts["barriers"]
        + c.end * counts["ends"]
        + c.arrival * counts["arrivals"]
        + c.sort * counts["sorts"]
        + c.score * counts["scores"]
    )
    trips = counts["trips"]
    serial = np.maximum(trips / (trips + c.loop), c.ragged * counts["ragged"])
    loads = (counts["loads"] + serial * counts["repeats"]) * (
        1 - c.prefetched * counts["prefetched"]
    )
    waiting = latency * (c.load * loads + c.turn * counts["turns"]) + clock * (
        c.crossing * counts["crossings"]
        + c.round * counts["rounds"]
        + c.round_warps * counts["round_warps"]
        + c.scan * counts["scans"]
        + c.element * counts["elements"]
    )
    waiting = waiting * (counts["waves"] + c.tail * counts["tail"])
    moved = counts["moved"] / c.reach + counts["scattered"] / c.apart
    moving = 1e6 * moved / counts["bandwidth"]
    working = clock * c.work * counts["work"]
    widening = clock * CYCLES_US * counts["widening"]
    parts = (waiting, moving, working, widening)
    most = np.maximum.reduce(parts)
    scale = np.where(most > 0, most, 1.0)
    powers = sum((part / scale) ** c.sharpness for part in parts)
    return fixed + scale * powers ** (1 / c.sharpness)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Fitted constants, and each family's interval as factors of the predicted time.

    device: whose records they were fitted to. formats: of the weights and centroids of these. A
    family without records has the widest interval, and so has every config for a problem in a
    quantised format without records.
    """

    device: str
    formats: tuple[str, ...]
    constants: Constants
    intervals: Mapping[str, tuple[float, float]]

    def predict(self, candidate: Candidate, uses: Sequence[KernelUse]) -> Prediction:
        """Predict a candidate; raises FlashtuneError for a plan that the model does not cover."""
        found = self.interval(candidate.problem, candidate.config)
        return self._predict(found, stages_of(candidate, uses))

    def predict_stages(self, family_name: str, stages: Sequence[Stage]) -> Prediction:
        """Predict a step of plain weights that is given as its stages."""
        return self._predict(self.intervals.get(family_name) or self.widest(), stages)

    def interval(self, problem: Problem, config: Config) -> tuple[float, float]:
        """The interval of a config's predicted time, as factors of it."""
        data = config_data(config)
        if self.unfitted(problem, data):
            return self.widest()
        return self.intervals[family(data)]

    def unfitted(self, problem: Problem, config: ConfigData) -> list[str]:
        """The formats, or else the family, of which no record was fitted."""
        names = dict.fromkeys((problem.weight_dtype, problem.centroid_dtype))
        formats = [name for name in names if FORMATS[name].quantised and name not in self.formats]
        return formats or [name for name in (family(config),) if name not in self.intervals]

    def _predict(self, interval: tuple[float, float], stages: Sequence[Stage]) -> Prediction:
        time_us = float(stage_us(columns_of(stages), self.constants).sum())
        low, high = interval
        return Prediction(time_us=time_us, low_us=low * time_us, high_us=high * time_us)

    def widest(self) -> tuple[float, float]:
        """The interval that holds every family's."""
        lows, highs = zip(*self.intervals.values(), strict=True)
        return min(lows), max(highs)

    def data(self) -> dict[str, Any]:
        """The model as plain data."""
        return {
            "device": self.device,
            "formats": list(self.formats),
            "constants": asdict(self.constants),
            "intervals": {name: list(each) for name, each in self.intervals.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> "CostModel":
        """Read `data`'s result back; raises FlashtuneError."""
        members(data, "the model", [field.name for field in fields(cls)])
        found = data["intervals"]
        if not isinstance(found, dict) or not found:
            raise FlashtuneError("intervals must be an object with at least one family")
        return cls(
            device=text(data["device"], "device", MOST_NAME),
            formats=tuple(
                text(each, "a format", MOST_NAME) for each in items(data["formats"], "formats")
            ),
            constants=constants_of(data["constants"]),
            intervals={name: _interval(name, each) for name, each in found.items()},
        )


def constants_of(data: Any) -> Constants:
    """The constants that plain data hold; raises FlashtuneError."""
    names = [field.name for field in fields(Constants)]
    members(data, "the constants", names)
    found = {name: number(data[name], name, _LEAST, _MOST) for name in names}
    return Constants(**found)


def _interval(name: str, data: Any) -> tuple[float, float]:
    what = f"the interval of {quoted(name)}"
    ends = [number(each, what, _LEAST, _MOST) for each in items(data, what)]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise FlashtuneError(f"{what} must be two numbers, the smaller first")
    return ends[0], ends[1]


@functools.cache
def shipped_model() -> CostModel:
    """The model that ships; raises FlashtuneError when its file is not one of this version."""
    data = read_model_file(MODEL_FILE)
    return CostModel.from_json(data["model"])


def read_model_file(path: Any) -> dict[str, Any]:
    """The decoded file of a fit; raises FlashtuneError when it cannot be used."""
    try:
        content = read_text(Path(str(path)))
    except FlashtuneError as error:
        raise FlashtuneError(f"cannot read the cost model {error}") from error
    try:
        data = parse_json(content, exact=True)
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise FlashtuneError(
                f"it has version {quoted(version)}, but this flashtune reads {VERSION}"
            )
        members(data, "a fit", ("version", "calibration", "model", "held_out"))
        CostModel.from_json(data["model"])
    except FlashtuneError as error:
        raise FlashtuneError(
            f"cannot use the cost model {path} ({error}): make it again with `flashtune model fit`"
        ) from error
    return dict(data)


def interval_us(
    problem: Problem, config: Config, measurement: Measurement
) -> tuple[float, float] | None:
    """The 80 % interval of a recorded prediction; None if the record has none.

    A record holds the interval's width, which is divided as the model's interval is.
    """
    if measurement.median_us is None or not measurement.spread_us:
        return None
    low, high = shipped_model().interval(problem, config)
    scale = measurement.spread_us / (high - low)
    return (
        measurement.median_us - (1 - low) * scale,
        measurement.median_us + (high - 1) * scale,
    )


def unfitted(problem: Problem, config: ConfigData) -> list[str]:
    """The part of a recorded prediction for which the shipped model has no measured time."""
    return shipped_model().unfitted(problem, config)


def predict(candidate: Candidate, uses: Sequence[KernelUse]) -> Prediction:
    """Predict with the model that ships. `uses` are the compiled kernels' needs.

    Raises FlashtuneError for a plan that the model does not cover, as those of CPUs.
    """
    return shipped_model().predict(candidate, uses)
