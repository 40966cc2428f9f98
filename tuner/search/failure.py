"""Why evaluations failed, as one line for the user.

Usage:
    most_frequent(measurements)         # "crash: illegal access" and how often, or None
    reasons(measurements)               # all of them, counted
    known_remedy(device, toolchain)     # what is known to help, or ""
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.record import Measurement

_FIRST_TRITON = {"sm_110": (3, 7)}  # architectures that Triton 3.6 cannot compile for
_LONGEST = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A reason that `count` evaluations share; `remedy` says what helps, if that is known."""

    reason: str
    count: int
    remedy: str = ""

    def describe(self) -> str:
        """The reason and the remedy, in one line."""
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


def most_frequent(measurements: Iterable[Measurement]) -> Failure | None:
    """The most frequent reason why evaluations have no time; None if all have one."""
    found = reasons(measurements).most_common(1)
    return Failure(reason=found[0][0], count=found[0][1]) if found else None


def reasons(measurements: Iterable[Measurement]) -> Counter[str]:
    """The outcome and reason of each evaluation without a time, as one line each, counted."""
    return Counter(
        f"{each.outcome.value}: {_line(each.error)}"
        for each in measurements
        if each.median_us is None
    )


def known_remedy(device: Device, toolchain: Toolchain) -> str:
    """What helps if nothing works on a device with these tools; empty if that is not known."""
    needed = _FIRST_TRITON.get(device.arch)
    version = toolchain.triton.split(".")[:2]
    if needed is None or not all(part.isdecimal() for part in version):
        return ""
    if tuple(map(int, version)) >= needed:
        return ""
    least = ".".join(map(str, needed))
    return f"Triton {toolchain.triton} cannot compile for {device.arch}: install {least} or later"


def _line(error: str) -> str:
    text = " ".join(error.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
