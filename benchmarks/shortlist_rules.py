"""How good shortlists are by other rules, judged by measured configs of two cards.

    python benchmarks/shortlist_rules.py

Of each problem of the shipped calibrations, the measured configs are predicted and shortlisted: on
the H200, to which the model was fitted, each by the fit without the problem's shape. Prints, as
Markdown, how much slower the best of a shortlist is than the best of all, as measured: the worst
of the problems, how many exceed 5 %, and the mean. Nothing runs on a device.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from flashtune.kernels.plans.config import config_data
from flashtune.kernels.predict.cost_model import MODEL_FILE, read_model_file
from flashtune.tuner.predict.calibration import CARDS, Calibration, read_calibration
from flashtune.tuner.predict.check import MOST_LOSS, losses
from flashtune.tuner.predict.fit import Fit, Samples, read_fit
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import ConfigData

NEAR = (math.inf, 1.3, 1.2, 1.1, 1.05, 1.0)
LIKENESS = (0.0, 0.1, 0.3)


@dataclass
class Predicted:
    """A problem's configs, with their predicted and measured times in microseconds."""

    configs: list[ConfigData] = field(default_factory=list)
    predicted_us: list[float] = field(default_factory=list)
    measured_us: list[float] = field(default_factory=list)

    def loss(self, near: float, likeness: float) -> float:
        """How much slower the best of the shortlist is than the best of all."""
        times = self.predicted_us, self.measured_us
        return losses(*times, self.configs, near=near, likeness=likeness)[1]


def predicted(fit: Fit, calibration: Calibration) -> list[Predicted]:
    """Each problem, on the fit's own device predicted by the fit without its shape."""
    samples = Samples(calibration.samples, find_device(calibration.device))
    held_out = fit.held_out if calibration.device == fit.model.device else {}
    by_shape = {
        shape: samples.log_predictions(held_out.get((shape,), fit.model.constants))
        for shape in set(samples.shapes)
    }
    found: dict[Problem, Predicted] = defaultdict(Predicted)
    for at, (sample, shape) in enumerate(zip(samples.samples, samples.shapes, strict=True)):
        own = found[sample.problem]
        own.configs.append(config_data(sample.config))
        own.predicted_us.append(math.exp(by_shape[shape][at]))
        own.measured_us.append(sample.time_us)
    return list(found.values())


def cells(losses: Sequence[float]) -> list[str]:
    """The worst, how many are too much, and the mean."""
    over = sum(each > MOST_LOSS for each in losses)
    return [f"{max(losses):.1%}", str(over), f"{statistics.mean(losses):.2%}"]


def main() -> None:
    """Print the table."""
    fit = read_fit(read_model_file(MODEL_FILE))
    headings, cards = ["near", "likeness"], []
    for path in CARDS:
        calibration = read_calibration(path)
        cards.append(predicted(fit, calibration))
        name = f"{calibration.device}, {len(cards[-1])} problems"
        headings += [f"{name}: worst", f"over {MOST_LOSS:.0%}", "mean"]
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for near in NEAR:
        for likeness in LIKENESS:
            row = ["any" if near == math.inf else f"{near:g}", f"{likeness:g}"]
            for problems in cards:
                row += cells([each.loss(near, likeness) for each in problems])
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
