"""Published times of heads on devices that we do not have, and the model's predictions.

Usage:
    for figure in FIGURES:
        published_prediction(model, figure, n_probes=256).time_us
    for rate in published_rates():
        rate.saved_us, predicted_saving_us(model, find_device(rate.device), rate.problem)

No constant is fitted to any of these. Figures are times of a head (that of Cosmos-Reason2-2B,
which is Qwen3-VL-2B's, in vLLM), from
https://www.embedl.com/knowledge/faster-multi-modal-reasoning-with-flashhead-triton-kernel; it
gives neither the number of probes nor whether the host's launches are included; here they are not.
Rates are tokens per second with each head, so only the saving per token is due to the head; the
file names their source.
"""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashtune.kernels.predict.cost_model import CostModel, Prediction
from flashtune.kernels.predict.stages.stage import Stage, scales, sorting
from flashtune.tuner.predict.calibration import CALIBRATIONS
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.foreign import read_text
from flashtune.tuning_db.problem import DEFAULT_PROBES, Problem, parse_shape

LIBRARY = "staged/torch_topk"  # the family whose interval these steps use
SHAPE = "qwen3-vl-2b"
PROBES = (256, 593)  # flashtune's default, and a model folder's: a sixteenth of the clusters
RATES = CALIBRATIONS / "published-decode-rates.csv"
CLUSTER_SIZE = 16
FOLDER_SHARE = 16  # a model folder probes 1/16 of the clusters by default
DENSE_REACH = 0.9  # of the published bandwidth, assumed for a dense head


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A published time. `fused`: one kernel gathers and multiplies, else a framework's do."""

    device: str
    fused: bool
    time_us: float


FIGURES = (
    Figure(device="nvidia-a40", fused=True, time_us=191.0),
    Figure(device="orin-nano-super", fused=True, time_us=951.0),
    Figure(device="nvidia-a40", fused=False, time_us=341.0),
    Figure(device="orin-nano-super", fused=False, time_us=1821.0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Published tokens per second of a model on a device, with the dense head and with FlashHead.

    step: the resolution of the published rates, in tokens per second.
    """

    device: str
    model: str
    vocab_size: int
    hidden_size: int
    body: str
    dense: float
    flash_head: float
    step: float

    @property
    def saved_us(self) -> float:
        """Microseconds per token that FlashHead saves."""
        return 1e6 / self.dense - 1e6 / self.flash_head

    @property
    def rounding(self) -> float:
        """How far off the saving may be by rounding alone, as a share of it."""
        half = self.step / 2
        most = 1e6 / (self.dense - half) - 1e6 / (self.flash_head + half)
        return most / self.saved_us - 1

    @property
    def problem(self) -> Problem:
        """The head, with the clusters of the published models, and a model folder's probes."""
        n_clusters = self.vocab_size // CLUSTER_SIZE
        return Problem(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            n_clusters=n_clusters,
            n_probes=n_clusters // FOLDER_SHARE,
        )

    @property
    def with_default_probes(self) -> Problem:
        """The same with flashtune's default number of probes, which is smaller."""
        return replace(self.problem, n_probes=DEFAULT_PROBES)


@functools.cache
def published_rates() -> Sequence[Rate]:
    """The published rates, in the file's order."""
    text = read_text(Path(str(RATES)))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        Rate(
            device=row["device"],
            model=row["model"],
            vocab_size=int(row["vocab"]),
            hidden_size=int(row["hidden"]),
            body=row["body"],
            dense=float(row["dense_tokens_s"]),
            flash_head=float(row["flashhead_tokens_s"]),
            step=0.01 if "." in row["dense_tokens_s"] else 1.0,
        )
        for row in csv.DictReader(lines)
    )


def predicted_saving_us(model: CostModel, device: Device, problem: Problem) -> float:
    """The predicted saving per token: a dense head's bytes, less a framework's pipeline."""
    dense_bytes = problem.n_clusters * problem.cluster_bytes
    dense_us = 1e6 * dense_bytes / (DENSE_REACH * device.memory_bandwidth)
    return dense_us - model.predict_stages(LIBRARY, framework_stages(problem, device)).time_us


def published_prediction(model: CostModel, figure: Figure, n_probes: int) -> Prediction:
    """The model's prediction of a figure's step at a number of probes."""
    problem = parse_shape(f"{SHAPE},probes={n_probes}")
    device = find_device(figure.device)
    stages = fused_stages(problem, device) if figure.fused else framework_stages(problem, device)
    return model.predict_stages(LIBRARY, stages)


def fused_stages(problem: Problem, device: Device) -> list[Stage]:
    """A framework's product with the centroids and top-k, then one kernel for the rest."""
    own = scales(device)
    rows = problem.n_tokens * problem.n_probes * problem.cluster_bytes
    gather = Stage(
        **own,
        launches=1,
        loads=3,  # the list, the ids, the rows
        moved=rows,
        ends=1,
        arrivals=problem.n_tokens * problem.n_probes / 1000,
    )
    return [*_selection(problem, device), gather]


def framework_stages(problem: Problem, device: Device) -> list[Stage]:
    """A framework's kernel for every step: rows are copied, then multiplied, then compared."""
    own = scales(device)
    rows = problem.n_tokens * problem.n_probes * problem.cluster_bytes
    again = rows if rows > device.l2_bytes else 0  # rows in the cache are not read again
    return [
        *_selection(problem, device),
        Stage(**own, launches=1, loads=2, moved=2 * rows),  # read and written
        Stage(**own, launches=1, loads=1, moved=again),
        Stage(**own, launches=1, loads=1),  # argmax
        Stage(**own, launches=1, loads=2, ends=1),  # its token's id
    ]


def _selection(problem: Problem, device: Device) -> list[Stage]:
    own = scales(device)
    return [
        Stage(**own, launches=1, loads=1, moved=problem.centroid_bytes),
        Stage(**own, launches=1, **sorting(problem)),
    ]
