"""The cost model for one particular device: its probe's figures instead of published ones.

Usage:
    model, here = corrected(shipped_model(), device, probe.figures)
    corrected_records(records, device, probe)

Constants are in the words of the cost model. Each figure of a probe stands for those that cost the
same thing: a launch alone for library calls too, a barrier for all that a grid waits for at one
address, a load for every wait for memory. A figure that could not be measured changes nothing.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from importlib import resources

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.kernels.predict.cost_model import CostModel, shipped_model
from flashtune.kernels.predict.stages.stage import scales
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.probe import Figures, Probe
from flashtune.tuning_db.record import Outcome, Provenance, Record

STANDS_FOR = {
    "launch_us": ("launch", "sort"),
    "overlapped_us": ("overlapped",),
    "load_us": ("load", "turn"),
    "barrier_us": ("barrier", "end", "arrival"),
}
REFERENCE_FILE = resources.files("flashtune.tuning_db") / "calibration" / "reference-probe.json"


def expected_figures(model: CostModel, device: Device) -> Figures:
    """The expected probe of a device, from its published figures and the model's constants."""
    constants, clock = model.constants, scales(device)["clock"]
    return Figures(
        bandwidth=constants.reach * device.memory_bandwidth or None,
        launch_us=constants.launch * clock,
        overlapped_us=constants.overlapped * clock,
        load_us=constants.load * (1 + clock) / 2,
        barrier_us=constants.barrier * clock,
    )


def corrected(
    model: CostModel, device: Device, measured: Figures, reference: Probe | None = None
) -> tuple[CostModel, Device]:
    """The model and the device, corrected by the measured figures.

    reference: a probe of a device whose figures are right, which says by how much a probe of this
    kind misses what constants are named for; without one it is taken not to miss.
    """
    factors = _ratios(measured, expected_figures(model, device))
    if reference is not None:
        usual = expected_figures(model, find_device(reference.device))
        units = _ratios(reference.figures, usual)
        factors = {name: each / units[name] for name, each in factors.items()}
    constants = {
        constant: getattr(model.constants, constant) * factors[name]
        for name, constants in STANDS_FOR.items()
        for constant in constants
    }
    return (
        replace(model, constants=replace(model.constants, **constants)),
        replace(device, memory_bandwidth=device.memory_bandwidth * factors["bandwidth"]),
    )


def _ratios(measured: Figures, expected: Figures) -> dict[str, float]:
    """Measured over expected, figure by figure; 1 where either is not known."""
    pairs = {
        each.name: (getattr(measured, each.name), getattr(expected, each.name))
        for each in fields(Figures)
    }
    return {name: one / other if one and other else 1.0 for name, (one, other) in pairs.items()}


@functools.cache
def reference_probe() -> Probe | None:
    """The probe that others are judged by, as `flashtune devices --probe --json` printed it.

    None while none ships.
    """
    if not REFERENCE_FILE.is_file():
        return None
    data = json.loads(REFERENCE_FILE.read_text("utf-8"))
    return Probe(**{**data, "figures": Figures.from_json(data["figures"])})


def corrected_records(records: Iterable[Record], device: Device, probe: Probe) -> list[Record]:
    """The predictions for a device, corrected by its probe.

    Each time is scaled by what the model says, corrected over published, of the config with
    estimated needs: what its compiled kernels need is in the time already. Records that are not
    successful predictions, or whose configs no longer exist, are left out.
    """
    model = shipped_model()
    here_model, here = corrected(model, device, probe.figures, reference_probe())
    found = []
    for record in records:
        worked = record.measurement.outcome is Outcome.OK
        if not worked or record.provenance is not Provenance.PREDICTED:
            continue
        try:
            config = parse_config(record.config)
            now = Candidate(record.problem, config, here)
            before = Candidate(record.problem, config, device)
            ratio = (
                here_model.predict(now, now.launches).time_us
                / model.predict(before, before.launches).time_us
            )
        except FlashtuneError:  # of another version of its plan, or of one that has no stages
            continue
        found.append(_scaled(record, ratio, probe.created))
    return found


def _scaled(record: Record, ratio: float, created: str) -> Record:
    before = record.measurement
    assert before.median_us is not None
    spread_us = None if before.spread_us is None else before.spread_us * ratio
    return replace(
        record,
        provenance=Provenance.CORRECTED,
        measurement=replace(before, median_us=before.median_us * ratio, spread_us=spread_us),
        created=created,
    )
