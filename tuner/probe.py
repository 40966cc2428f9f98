"""Probes of this machine's devices, which correct the predictions for them.

Usage:
    for probed in probe_here(store):
        probed.probe.figures, probed.expected, probed.corrected
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flashtune.kernels.backends.host import devices_here
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.predict.correction import corrected_records, expected_figures
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.kernels.runtime.correction import fresh_probe
from flashtune.kernels.runtime.records import read_sources
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.probe import Figures, Probe
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """A device's probe, what its published figures led to expect, and what the probe changed.

    expected: empty for a device without predictions. corrected: the number of records.
    """

    probe: Probe
    expected: Figures
    corrected: int

    def data(self) -> dict[str, Any]:
        """As plain data: the probe, with `expected` and `corrected`."""
        return {
            **self.probe.data(),
            "expected": asdict(self.expected),
            "corrected": self.corrected,
        }


def probe_here(store: Store) -> list[Probed]:
    """Probe each of this machine's devices, and correct every prediction for it.

    Raises FlashtuneError if a device that has a probe cannot run it.
    """
    found = []
    for device in devices_here():
        target = target_of(device)
        try:
            probe = fresh_probe(device, torch.device(target.torch_device), store)
        except FlashtuneError:
            raise
        except Exception as error:  # compilers and drivers may raise anything
            raise FlashtuneError(f"{device.name} cannot be probed: {error}") from error
        if probe is None:
            continue
        records: list[Record] = []
        if target.registered:
            sources = read_sources(device, None, [], store.path)
            own = (each for source in sources for each in source.records)
            records = corrected_records(
                (each for each in own if each.device == device.name), device, probe
            )
            store.add(*records)
        expected = expected_figures(shipped_model(), device) if target.registered else Figures()
        found.append(Probed(probe=probe, expected=expected, corrected=len(records)))
    return found
