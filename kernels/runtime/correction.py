"""Correct the predictions for a device: probe it, and rank its records again.

Usage:
    probe = known_probe(device, where, store) or fresh_probe(device, where, store)
    correct(device, where, predictions, store)      # how many records were written

Probes and corrected records are kept in the user's database. A probe counts under the conditions
(power mode, clocks) in which it was made.
"""

import logging
import time
from collections.abc import Iterable
from datetime import datetime, timezone

import torch

from flashtune.kernels.backends.target import target_of
from flashtune.kernels.predict.correction import corrected_records
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.probe import Probe
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.store import Store

LOG = logging.getLogger("flashtune")


def known_probe(device: Device, where: torch.device, store: Store) -> Probe | None:
    """The device's probe under the current conditions; None if it has not been probed."""
    return store.probe(device.name, target_of(device).conditions(where))


def fresh_probe(device: Device, where: torch.device, store: Store) -> Probe | None:
    """Probe a device of this machine and keep the result; None if its kind has no probe.

    Lets exceptions of compilers and drivers through.
    """
    target = target_of(device)
    conditions = target.conditions(where)
    begun = time.monotonic()
    figures = target.probe(device, where)
    if figures is None:
        return None
    probe = Probe(
        device=device.name,
        conditions=conditions,
        figures=figures,
        seconds=round(time.monotonic() - begun, 3),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    store.keep_probe(probe)
    LOG.info("probed %s in %.1f s: %s", device.name, probe.seconds, figures.describe())
    return probe


def correct(
    device: Device, where: torch.device, predictions: Iterable[Record], store: Store
) -> int:
    """Correct predictions for this device, probing it if necessary; returns how many."""
    ours = [each for each in predictions if each.config["plan"] in PLAN_STAGES]
    probe = None
    if ours:
        probe = known_probe(device, where, store) or fresh_probe(device, where, store)
    if probe is None:
        return 0
    found = corrected_records(ours, device, probe)
    store.add(*found)
    return len(found)
