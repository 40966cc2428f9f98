"""Fitting the cost model's constants to a calibration, with shapes held out.

Usage:
    fitted = fit_model(calibration, device, on_fit=lambda done, total: …)
    write_fit(path, fitted)

Needs scipy (the extra `flashtune[gp]`); reading and using a fit does not.
"""

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.predict.cost_model import (
    VERSION,
    Array,
    Columns,
    Constants,
    CostModel,
    columns_of,
    constants_of,
    stage_us,
)
from flashtune.kernels.predict.stages.registry import stages_of
from flashtune.tuner.predict.calibration import Calibration, Sample, calibration_text
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import items, members, text
from flashtune.tuning_db.problem import PRESETS, Problem
from flashtune.tuning_db.record import MOST_NAME, family
from flashtune.tuning_db.whole_file import write_whole

# Start and bounds of a fit: (least, start, most). A constant that no sample constrains keeps its
# start.
_BOUNDS: dict[str, tuple[float, float, float]] = {
    "launch": (0.01, 1.0, 10.0),
    "overlapped": (0.01, 0.6, 10.0),
    "barrier": (0.01, 2.0, 20.0),
    "end": (0.01, 3.0, 20.0),
    "arrival": (0.001, 1.0, 20.0),
    "sort": (0.1, 8.0, 60.0),
    "score": (0.1, 30.0, 100.0),
    "load": (0.05, 0.5, 3.0),
    "loop": (0.1, 8.0, 1000.0),
    "ragged": (0.01, 0.5, 1.0),
    "turn": (0.001, 0.4, 5.0),
    "crossing": (0.001, 0.2, 5.0),
    "round": (0.001, 0.1, 5.0),
    "round_warps": (0.001, 0.2, 5.0),
    "scan": (0.0001, 0.004, 0.1),
    "element": (0.0001, 0.003, 0.1),
    "work": (0.01, 1.0, 20.0),
    "reach": (0.5, 0.9, 0.96),  # the most that benchmarks/bandwidth.py reached on an H200
    "apart": (0.05, 0.5, 4.0),
    "prefetched": (0.01, 0.1, 0.9),
    "tail": (0.01, 0.3, 1.0),
    "sharpness": (1.0, 2.0, 8.0),
}
_PULL = 0.3  # weight of a constant's start, in samples that miss by as much
_OUTLIER = 0.2  # in log time: samples that miss by more count less
_FEWEST = 30  # held-out samples that a family needs for its own interval
QUANTILES = (0.1, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A model fitted to all shapes, and the constants of fits that never saw some of them.

    calibration: the hash of the calibration it was fitted to. held_out: by the shapes' names.
    """

    calibration: str
    model: CostModel
    held_out: dict[tuple[str, ...], Constants]

    def data(self) -> dict[str, Any]:
        """The fit as plain data."""
        return {
            "version": VERSION,
            "calibration": self.calibration,
            "model": self.model.data(),
            "held_out": [
                {"shapes": list(shapes), "constants": asdict(constants)}
                for shapes, constants in self.held_out.items()
            ],
        }


def shape_name(problem: Problem) -> str:
    """A problem's shape without its probes: the preset's name, or its sizes."""
    shape = (problem.vocab_size, problem.hidden_size, problem.n_clusters)
    sizes = "{}x{} c{}".format(*shape)
    return next((name for name, each in PRESETS.items() if each == shape), sizes)


class Samples:
    """Samples as the fit needs them: their stages' counts, and the logarithms of their times."""

    def __init__(self, samples: Sequence[Sample], device: Device) -> None:
        """Count the stages of each sample's config; `device` is the one it was timed on."""
        self.samples, self.device = samples, device
        stages, owners = [], []
        for number, sample in enumerate(samples):
            own = stages_of(Candidate(sample.problem, sample.config, device), sample.uses)
            stages += own
            owners += [number] * len(own)
        self._columns: Columns = columns_of(stages)
        self._owners = np.array(owners, dtype=np.intp)
        self.shapes = [shape_name(sample.problem) for sample in samples]
        self.families = [family(config_data(sample.config)) for sample in samples]
        self.log_times: Array = np.log([sample.time_us for sample in samples])

    def log_predictions(self, constants: Constants) -> Array:
        """The logarithm of each sample's predicted time in microseconds."""
        times = stage_us(self._columns, constants)
        totals: Array = np.log(np.bincount(self._owners, times, len(self.samples)))
        return totals

    def without(self, shapes: Collection[str]) -> "Samples":
        """The samples of all other shapes."""
        kept = [
            sample
            for sample, shape in zip(self.samples, self.shapes, strict=True)
            if shape not in shapes
        ]
        return Samples(kept, self.device)


def fit_constants(samples: Samples, start: Constants | None = None) -> Constants:
    """The constants that predict the samples best, by robust least squares of log times."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise FlashtuneError("fitting needs scipy: install flashtune[gp]") from error
    names = [each.name for each in fields(Constants)]
    least, middle, most = np.log([_BOUNDS[name] for name in names]).T
    begin = middle if start is None else np.log([getattr(start, name) for name in names])

    def misses(logs: Array) -> Array:
        predicted = samples.log_predictions(_constants(names, logs))
        return np.concatenate([predicted - samples.log_times, _PULL * (logs - middle)])

    slack = 1e-6  # the solver must start inside the bounds
    found = least_squares(
        misses,
        np.clip(begin, least + slack, most - slack),
        bounds=(least, most),
        loss="soft_l1",
        f_scale=_OUTLIER,
    )
    return _constants(names, found.x)


def _constants(names: Sequence[str], logs: Array) -> Constants:
    return Constants(**dict(zip(names, np.exp(logs).tolist(), strict=True)))


def splits(shapes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The shapes to hold out: each one, then each pair."""
    for size in (1, 2):
        if len(shapes) > size:
            yield from itertools.combinations(sorted(shapes), size)


def fit_model(
    calibration: Calibration,
    device: Device,
    on_fit: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Fit to all shapes, and without each single shape and each pair.

    The intervals come from the misses on single shapes of fits that never saw them. Raises
    FlashtuneError without scipy, or with fewer than two shapes.
    """
    samples = Samples(calibration.samples, device)
    shapes = sorted(set(samples.shapes))
    if len(shapes) < 2:
        raise FlashtuneError(
            "a fit needs records of at least two shapes, because one is held out: measure more "
            "shapes"
        )
    wanted = list(splits(shapes))
    everything = rounded(fit_constants(samples))
    held_out = {}
    for done, held in enumerate(wanted, start=1):
        on_fit(done, len(wanted) + 1)
        held_out[held] = rounded(fit_constants(samples.without(held), everything))
    on_fit(len(wanted) + 1, len(wanted) + 1)
    singles = {shapes[0]: each for shapes, each in held_out.items() if len(shapes) == 1}
    problems = [sample.problem for sample in calibration.samples]
    formats = {name for each in problems for name in (each.weight_dtype, each.centroid_dtype)}
    model = CostModel(
        device=device.name,
        formats=tuple(sorted(formats)),
        constants=everything,
        intervals=intervals(samples, held_out_misses(samples, singles)),
    )
    return Fit(calibration=digest(calibration), model=model, held_out=held_out)


def rounded(constants: Constants) -> Constants:
    """The constants as stored in the file: to four digits."""
    return Constants(**{name: float(f"{each:.4g}") for name, each in asdict(constants).items()})


def held_out_misses(samples: Samples, singles: dict[str, Constants]) -> Array:
    """The logarithm of measured over predicted time, each by the fit without that shape."""
    misses: Array = np.full(len(samples.samples), math.nan)
    shapes = np.array(samples.shapes)
    for shape, constants in singles.items():
        own = shapes == shape
        misses[own] = (samples.log_times - samples.log_predictions(constants))[own]
    return misses


def intervals(
    samples: Samples, misses: Array, shapes: Collection[str] | None = None
) -> dict[str, tuple[float, float]]:
    """Each family's interval, as factors of the predicted time that hold 80 % of the misses.

    shapes: count only samples of these. Families with few samples have no interval of their own.
    """
    by_family: dict[str, list[float]] = defaultdict(list)
    for name, shape, miss in zip(samples.families, samples.shapes, misses, strict=True):
        if shapes is None or shape in shapes:
            by_family[name].append(float(miss))
    found = {}
    for name, own in sorted(by_family.items()):
        if len(own) >= _FEWEST:
            low, high = np.exp(np.quantile(own, QUANTILES)).tolist()
            found[name] = (round(low, 4), round(high, 4))
    if not found:
        raise FlashtuneError(f"no family of configs has {_FEWEST} records: measure more configs")
    return found


def digest(calibration: Calibration) -> str:
    """A hash of a calibration's samples."""
    return hashlib.sha256(calibration_text(calibration).encode()).hexdigest()[:16]


def write_fit(path: Path, fit: Fit) -> None:
    """Write the model's file whole or not at all; raises FlashtuneError."""
    read_fit(fit.data())  # never write a file that we would refuse to read
    write_whole(path, (json.dumps(fit.data(), indent=1) + "\n").encode())


def read_fit(data: dict[str, Any]) -> Fit:
    """The fit that a model's decoded file holds; raises FlashtuneError."""
    held_out = {}
    for each in items(data["held_out"], "held_out"):
        members(each, "a fit without some shapes", ("shapes", "constants"))
        names = items(each["shapes"], "shapes")
        shapes = tuple(text(name, "a shape", MOST_NAME) for name in names)
        held_out[shapes] = constants_of(each["constants"])
    return Fit(
        calibration=text(data["calibration"], "calibration", MOST_NAME),
        model=CostModel.from_json(data["model"]),
        held_out=held_out,
    )
