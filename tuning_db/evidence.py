"""What others published of a device, held against what the cost model predicts for it.

Usage:
    why = why_less_trusted("agx-thor")     # one line; empty where nothing speaks against it

`flashtune model check` finds it out, and a test holds the file against what it finds.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

MOST_MISSED = 0.5  # of what was published, where predictions are trusted as others are


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """How far predictions are off what was published of a device, as shares of that.

    missed: how many of the published figures by more than `bound`. least and most: the errors.
    """

    published: int
    missed: int
    bound: float
    least: float
    most: float

    @property
    def less_trusted(self) -> bool:
        """Whether more is missed than met."""
        return self.missed > MOST_MISSED * self.published

    def describe(self) -> str:
        """One line, that begins with the verdict where the device's predictions are off."""
        verdict = "less trusted: " if self.less_trusted else ""
        return (
            f"{verdict}predictions miss {self.missed} of {self.published} published savings by "
            f"more than {self.bound:.0%} ({self.least:+.0%} to {self.most:+.0%})"
        )


@functools.cache
def published_evidence() -> Mapping[str, Evidence]:
    """What is known, by the device's name; devices of which nothing was published are not in."""
    file = resources.files("flashtune.tuning_db") / "calibration" / "evidence.json"
    data = json.loads(file.read_text("utf-8"))
    return {name: Evidence(**each) for name, each in data.items()}


def why_less_trusted(device_name: str) -> str:
    """Why predictions for a device are less trusted than others; empty where they are not."""
    found = published_evidence().get(device_name)
    return found.describe() if found and found.less_trusted else ""
