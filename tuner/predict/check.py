"""How far the cost model can be trusted: on unseen shapes, devices, formats, published figures.

Usage:
    report = check_model(fit, calibration, device)
    report.splits[0].results[0].rank_correlation
    report.data()      # for scripts

Nothing is fitted here: the model's file has the constants of the fits without the held-out shapes.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.predict.cost_model import Array, CostModel
from flashtune.tuner.predict.calibration import (
    CARDS,
    FORMATS_TIMED,
    LATER,
    Calibration,
    read_calibration,
)
from flashtune.tuner.predict.fit import (
    Fit,
    Samples,
    digest,
    held_out_misses,
    intervals,
)
from flashtune.tuner.predict.published import (
    FIGURES,
    PROBES,
    predicted_saving_us,
    published_prediction,
    published_rates,
)
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.evidence import Evidence
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import ConfigData
from flashtune.tuning_db.shortlist import LIKENESS, near_of, shortlisted

HEADLINE = ("gemma-3-270m", "qwen3-vl-2b")  # the smallest hidden size, and the published shape
LEAST_CORRELATION = 0.8
MOST_LOSS = 0.05
MOST_ERROR = 0.35
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemResult:
    """A model's results on one problem that it never saw.

    loss: how much slower the best of its shortlist is than the best of all, as measured. first:
    the same for its first choice. inside: the share of measurements inside the 80 % interval.
    error: the median of predicted over measured times, less 1.
    """

    problem: Problem
    shape: str
    samples: int
    rank_correlation: float
    loss: float
    first: float
    inside: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The results on several problems."""

    results: tuple[ProblemResult, ...]

    @property
    def rank_correlation(self) -> float:
        """The mean over the problems."""
        return float(np.mean([each.rank_correlation for each in self.results]))

    @property
    def loss(self) -> float:
        """The worst of the problems."""
        return max(each.loss for each in self.results)

    @property
    def inside(self) -> float:
        """The share of all the split's measurements inside their intervals."""
        counts = [each.samples for each in self.results]
        return float(np.average([each.inside for each in self.results], weights=counts))

    def data(self) -> dict[str, Any]:
        """Means, worst, and each problem, as plain data."""
        return {
            "rank_correlation": self.rank_correlation,
            "loss": self.loss,
            "inside": self.inside,
            "problems": [asdict(each) for each in self.results],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitResult(Results):
    """The results of a fit without some shapes, on those shapes."""

    held_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CardResult(Results):
    """The results on a shipped calibration, by its file's name, of which the fit saw no time."""

    device: str
    records: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureResult:
    """A published time, and the prediction at a number of probes."""

    device: str
    fused: bool
    n_probes: int
    published_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        """Predicted over published time, less 1."""
        return self.predicted_us / self.published_us - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RateResult:
    """The published saving of a token on a device, and the predicted one.

    fewer_probes_us: the predicted saving with flashtune's default number of probes. rounding: how
    far off the published saving may be by rounding alone, as a share of it.
    """

    device: str
    model: str
    body: str
    problem: Problem
    published_us: float
    predicted_us: float
    fewer_probes_us: float
    rounding: float

    @property
    def error(self) -> float:
        """Predicted over published saving, less 1."""
        return self.predicted_us / self.published_us - 1

    @property
    def fewer_probes_error(self) -> float:
        """The same error with flashtune's default number of probes."""
        return self.fewer_probes_us / self.published_us - 1

    @property
    def missed(self) -> bool:
        """Whether the error exceeds both the required bound and what rounding explains."""
        return abs(self.error) > max(MOST_ERROR, self.rounding)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatResult:
    """A time measured on a device, for a plan or format unknown to the fit.

    inside: whether it lies in the prediction's 80 % interval.
    """

    device: str
    problem: Problem
    plan: str
    measured_us: float
    predicted_us: float
    inside: bool

    @property
    def error(self) -> float:
        """Predicted over measured time, less 1."""
        return self.predicted_us / self.measured_us - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that was checked."""

    device: str
    samples: int
    splits: tuple[SplitResult, ...]
    figures: tuple[FigureResult, ...]
    rates: tuple[RateResult, ...]
    cards: tuple[CardResult, ...]
    formats: tuple[FormatResult, ...]

    @property
    def headline(self) -> SplitResult:
        """The split fixed beforehand; the first split if its shapes are not recorded."""
        return next((each for each in self.splits if each.held_out == HEADLINE), self.splits[0])

    @property
    def evidence(self) -> dict[str, Evidence]:
        """What published savings say about the predictions for each device, by its name."""
        devices = sorted({each.device for each in self.rates})
        return {
            name: _evidence([one for one in self.rates if one.device == name]) for name in devices
        }

    def data(self) -> dict[str, Any]:
        """The report as plain data, with the requirements and whether they hold."""
        headline = self.headline
        return {
            "device": self.device,
            "samples": self.samples,
            "asked": {
                "rank_correlation": LEAST_CORRELATION,
                "loss": MOST_LOSS,
                "error": MOST_ERROR,
            },
            "headline": list(headline.held_out),
            "passed": {
                "rank_correlation": headline.rank_correlation >= LEAST_CORRELATION,
                "loss": headline.loss <= MOST_LOSS,
                "error": {
                    str(probes): all(
                        abs(each.error) <= MOST_ERROR
                        for each in self.figures
                        if each.n_probes == probes
                    )
                    for probes in PROBES
                },
                "cards": {card.records: card.loss <= MOST_LOSS for card in self.cards},
            },
            "splits": [
                {"held_out": list(split.held_out), **split.data()} for split in self.splits
            ],
            "cards": [
                {"device": card.device, "records": card.records, **card.data()}
                for card in self.cards
            ],
            "figures": [{**asdict(each), "error": each.error} for each in self.figures],
            "rates": [
                {**asdict(each), "error": each.error, "missed": each.missed} for each in self.rates
            ],
            "devices": {name: asdict(each) for name, each in self.evidence.items()},
            "formats": [{**asdict(each), "error": each.error} for each in self.formats],
        }


def check_model(fit: Fit, calibration: Calibration, device: Device) -> Report:
    """Check a fit against the calibration that it was made from.

    Raises FlashtuneError if the model was fitted to another calibration.
    """
    samples = Samples(calibration.samples, device)
    if digest(calibration) != fit.calibration or not _is_of(fit, set(samples.shapes)):
        raise FlashtuneError(
            "the cost model was fitted to another calibration: run `flashtune model fit`"
        )
    singles = {shapes[0]: each for shapes, each in fit.held_out.items() if len(shapes) == 1}
    misses = held_out_misses(samples, singles)
    splits = [
        _split(samples, misses, held, samples.log_predictions(constants))
        for held, constants in fit.held_out.items()
    ]
    figures = [
        FigureResult(
            device=figure.device,
            fused=figure.fused,
            n_probes=probes,
            published_us=figure.time_us,
            predicted_us=published_prediction(fit.model, figure, probes).time_us,
        )
        for probes in PROBES
        for figure in FIGURES
    ]
    rates = [
        RateResult(
            device=rate.device,
            model=rate.model,
            body=rate.body,
            problem=rate.problem,
            published_us=rate.saved_us,
            predicted_us=predicted_saving_us(fit.model, find_device(rate.device), rate.problem),
            fewer_probes_us=predicted_saving_us(
                fit.model, find_device(rate.device), rate.with_default_probes
            ),
            rounding=rate.rounding,
        )
        for rate in published_rates()
    ]
    return Report(
        device=device.name,
        samples=len(calibration.samples),
        splits=tuple(splits),
        figures=tuple(figures),
        rates=tuple(rates),
        cards=tuple(_unseen(fit)),
        formats=tuple(_formats(fit.model)),
    )


def _evidence(rates: Sequence[RateResult]) -> Evidence:
    errors = [each.error for each in rates]
    return Evidence(
        published=len(rates),
        missed=sum(each.missed for each in rates),
        bound=MOST_ERROR,
        least=round(min(errors), 2),
        most=round(max(errors), 2),
    )


def _is_of(fit: Fit, shapes: set[str]) -> bool:
    """Whether a fit held out each of these shapes alone, and otherwise some of them."""
    some = all(held and set(held) < shapes for held in fit.held_out)
    return some and bool(shapes) and all((shape,) in fit.held_out for shape in shapes)


def _unseen(fit: Fit) -> Iterator[CardResult]:
    """A fit's results on each shipped calibration but its own."""
    for path in (*CARDS, LATER):
        calibration = read_calibration(path)
        if digest(calibration) != fit.calibration:
            yield _card(fit.model, calibration, path.name.removesuffix(".json.gz"))


def _card(model: CostModel, calibration: Calibration, records: str) -> CardResult:
    """A model's results on measured configs that its fit has not seen."""
    samples = Samples(calibration.samples, find_device(calibration.device))
    predictions = samples.log_predictions(model.constants)
    inside = _inside(samples, predictions, model.intervals)
    results = _results(samples, predictions, inside, set(samples.shapes))
    return CardResult(device=calibration.device, records=records, results=tuple(results))


def _formats(model: CostModel) -> Iterator[FormatResult]:
    """The times measured in other formats, on a device other than the fit's."""
    timed = read_calibration(FORMATS_TIMED)
    device = find_device(timed.device)
    for sample in timed.samples:
        found = model.predict(Candidate(sample.problem, sample.config, device), sample.uses)
        yield FormatResult(
            device=device.name,
            problem=sample.problem,
            plan=sample.config.plan,
            measured_us=sample.time_us,
            predicted_us=found.time_us,
            inside=found.low_us <= sample.time_us <= found.high_us,
        )


def _split(
    samples: Samples, misses: Array, held: tuple[str, ...], predictions: Array
) -> SplitResult:
    """A fit's results on the shapes that it never saw, with the intervals of the other shapes."""
    others = set(samples.shapes) - set(held)
    inside = _inside(samples, predictions, intervals(samples, misses, others))
    return SplitResult(
        held_out=held, results=tuple(_results(samples, predictions, inside, set(held)))
    )


def _inside(
    samples: Samples, predictions: Array, bounds: Mapping[str, tuple[float, float]]
) -> Flags:
    """Whether each measured time is inside its prediction's interval."""
    widest = (min(low for low, _ in bounds.values()), max(high for _, high in bounds.values()))
    factors = np.array([bounds.get(family, widest) for family in samples.families])
    ratios = np.exp(samples.log_times - predictions)
    inside: Flags = (factors[:, 0] <= ratios) & (ratios <= factors[:, 1])
    return inside


def _results(
    samples: Samples, predictions: Array, inside: Flags, shapes: Collection[str]
) -> Iterator[ProblemResult]:
    """The results of predictions (logarithms of microseconds) on each problem of these shapes."""
    problems = [sample.problem for sample in samples.samples]
    for problem in sorted(set(problems)):
        own = np.array([each == problem for each in problems])
        shape = samples.shapes[int(np.argmax(own))]
        if shape not in shapes:
            continue
        times, guesses = samples.log_times[own], predictions[own]
        configs = [config_data(samples.samples[at].config) for at in np.flatnonzero(own).tolist()]
        both = np.exp(guesses).tolist(), np.exp(times).tolist()
        first, loss = losses(*both, configs, near=near_of(samples.device.name))
        yield ProblemResult(
            problem=problem,
            shape=shape,
            samples=int(own.sum()),
            rank_correlation=rank_correlation(times, guesses),
            loss=loss,
            first=first,
            inside=float(inside[own].mean()),
            error=math.expm1(float(np.median(guesses - times))),
        )


def losses(
    predicted_us: Sequence[float],
    measured_us: Sequence[float],
    configs: Sequence[ConfigData],
    *,
    near: float,
    likeness: float = LIKENESS,
) -> tuple[float, float]:
    """How much slower the first choice and the best of the shortlist are than the best of all.

    As measured. near, likeness: those of the shortlist's rule.
    """
    places = shortlisted(predicted_us, configs, near=near, likeness=likeness)
    times = [measured_us[at] for at in places]
    best_us = min(measured_us)
    return times[0] / best_us - 1, min(times) / best_us - 1


def rank_correlation(one: Sequence[float] | Array, other: Sequence[float] | Array) -> float:
    """Spearman's rank correlation, with ties at their mean rank; 0 if all are tied."""
    ranks = _ranks(one), _ranks(other)
    if any(float(np.ptp(each)) == 0 for each in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Sequence[float] | Array) -> Array:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[place]
    return ranks
