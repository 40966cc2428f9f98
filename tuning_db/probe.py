"""The figures that a probe measured on a device, by which its predictions are corrected.

Usage:
    probe = Probe(device="nvidia-h100", figures=Figures(bandwidth=3.1e12, launch_us=1.1), …)
    store.keep_probe(probe)
    store.probe("nvidia-h100", conditions)

The conditions are what the device's speed depends on besides its kind, as far as that can be read:
power mode and limit, highest clocks. A probe made under other conditions does not apply.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.record import MOST_NAME

_MOST_BANDWIDTH, _MOST_US = 1e15, 1e6
_MOST_CONDITIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The measured figures; None for those that could not be measured.

    bandwidth: bytes/s read from memory. For launches in a graph, microseconds from one kernel to
    the next: launch_us if each waits for the previous one, overlapped_us with programmatic
    dependent launch. load_us: a load from memory that depends on the previous one. barrier_us: a
    barrier of a grid of one program per multiprocessor.
    """

    bandwidth: float | None = None
    launch_us: float | None = None
    overlapped_us: float | None = None
    load_us: float | None = None
    barrier_us: float | None = None

    def __post_init__(self) -> None:
        """Raises FlashtuneError for an impossible figure."""
        for field in fields(self):
            value = getattr(self, field.name)
            most = _MOST_BANDWIDTH if field.name == "bandwidth" else _MOST_US
            if value is not None and not (
                type(value) in (int, float) and math.isfinite(value) and 0 < value <= most
            ):
                raise FlashtuneError(
                    f"{field.name} of a probe must be more than 0 and at most {most:g}, "
                    f"not {quoted(value)}"
                )

    def describe(self) -> str:
        """One line with the measured figures."""
        times = {
            "a launch": self.launch_us,
            "an overlapped launch": self.overlapped_us,
            "a dependent load": self.load_us,
            "a barrier": self.barrier_us,
        }
        parts = [f"{name} {value:.2f} us" for name, value in times.items() if value]
        if self.bandwidth:
            parts.insert(0, f"reads {self.bandwidth / 1e9:.0f} GB/s")
        return ", ".join(parts) or "nothing could be measured"

    @classmethod
    def from_json(cls, data: Any) -> "Figures":
        """Build from a decoded JSON object; raises FlashtuneError for any other or missing key."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise FlashtuneError(f"a probe's figures must have exactly the keys {sorted(names)}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A device's figures, with the conditions, time and duration of their measurement."""

    device: str
    conditions: Mapping[str, str]
    figures: Figures
    seconds: float
    created: str

    @property
    def conditions_key(self) -> str:
        """Canonical JSON of the conditions."""
        return conditions_key(self.conditions)

    def data(self) -> dict[str, Any]:
        """The probe as plain data."""
        return {
            "device": self.device,
            "conditions": dict(self.conditions),
            "figures": asdict(self.figures),
            "seconds": self.seconds,
            "created": self.created,
        }


def conditions_key(conditions: Mapping[str, str]) -> str:
    """Canonical JSON of conditions: sorted keys, no spaces."""
    return json.dumps(dict(conditions), sort_keys=True, separators=(",", ":"))


def checked_conditions(data: Any) -> dict[str, str]:
    """Conditions read from elsewhere; raises FlashtuneError if they are invalid."""
    good = (
        isinstance(data, dict)
        and len(data) <= _MOST_CONDITIONS
        and all(
            isinstance(text, str) and len(text) <= MOST_NAME
            for pair in data.items()
            for text in pair
        )
    )
    if not good:
        raise FlashtuneError(
            f"a probe's conditions must be an object of a few short texts, not {quoted(data)}"
        )
    return dict(data)
