"""Published times of heads on other devices, and what the model says of the same steps.

Usage:
    for figure in FIGURES:
        predicted_us = published_prediction(model, figure, n_probes=256).time_us

Source: https://www.embedl.com/knowledge/faster-multi-modal-reasoning-with-flashhead-triton-kernel
(the head of Cosmos-Reason2-2B, which is Qwen3-VL-2B's, in vLLM). It gives neither the number of
probes nor whether the host's launches are in the times; here they are not.
"""

from dataclasses import dataclass

from flashtune.tuner.predict.cost_model import CostModel, Prediction
from flashtune.tuner.predict.stages.stage import Stage, scales, sorting
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.problem import Problem, parse_shape

LIBRARY = "staged/torch_topk"  # the family whose interval these steps have
SHAPE = "qwen3-vl-2b"
PROBES = (256, 593)  # flashtune's default, and a model folder's: a sixteenth of the clusters


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


def published_prediction(model: CostModel, figure: Figure, n_probes: int) -> Prediction:
    """What the model says of a figure's step at a number of probes."""
    problem = parse_shape(f"{SHAPE},probes={n_probes}")
    device = find_device(figure.device)
    stages = fused_stages(problem, device) if figure.fused else framework_stages(problem, device)
    return model.predict_stages(LIBRARY, stages)


def fused_stages(problem: Problem, device: Device) -> list[Stage]:
    """A product with the centroids and a top-k by a framework, then one kernel for the rest."""
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
    """Every step a kernel of a framework: rows are copied, then multiplied, then compared."""
    own = scales(device)
    rows = problem.n_tokens * problem.n_probes * problem.cluster_bytes
    again = rows if rows > device.l2_bytes else 0  # what lies in the cache is not read again
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
