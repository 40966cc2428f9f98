"""Published figures of a device, compared with the cost model's predictions for it.

Usage:
    why = why_less_trusted("agx-thor")     # one line; empty if nothing contradicts them

`flashtune model check` computes the evidence, and a test compares the file with the result.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

MOST_MISSED = 0.5  # share of published figures; above it, predictions are trusted less


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """How far predictions for a device differ from published figures, as shares of those.

    missed: how many published figures are missed by more than `bound`. least and most: the errors.
    """

    published: int
    missed: int
    bound: float
    least: float
    most: float

    @property
    def less_trusted(self) -> bool:
        """Whether more figures are missed than met."""
        return self.missed > MOST_MISSED * self.published

    def describe(self) -> str:
        """One line, which begins with the verdict if the device's predictions are off."""
        verdict = "less trusted: " if self.less_trusted else ""
        return (
            f"{verdict}predictions miss {self.missed} of {self.published} published savings by "
            f"more than {self.bound:.0%} ({self.least:+.0%} to {self.most:+.0%})"
        )


@functools.cache
def published_evidence() -> Mapping[str, Evidence]:
    """The evidence by device name; devices without published figures are left out."""
    file = resources.files("flashtune.tuning_db") / "calibration" / "evidence.json"
    data = json.loads(file.read_text("utf-8"))
    return {name: Evidence(**each) for name, each in data.items()}


def why_less_trusted(device_name: str) -> str:
    """Why predictions for a device are trusted less than others; empty if they are not."""
    found = published_evidence().get(device_name)
    return found.describe() if found and found.less_trusted else ""
