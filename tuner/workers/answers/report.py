"""A remote machine's report on its devices, and how it is checked.

Usage:
    report = read_report(answer_to(request, line))     # raises ReplyError
    report.found["nvidia"].device

Figures are computed with, names go to the database, and texts to the terminal: all are bounded. A
device with published figures has exactly these.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from flashtune.tuner.workers.answers.message import (
    ReplyError,
    items,
    members,
    number,
    text,
    whole_number,
)
from flashtune.tuning_db.device import Device, Toolchain, all_devices

MOST_BANDWIDTH = 1e15  # bytes/s
_MOST_MULTIPROCESSORS = 2**16
_MOST_CACHE = 2**40  # bytes
_MOST_CLOCK = 1e11  # Hz
_MOST_NAMES = 64
_MOST_TITLE = 200  # characters
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")
_ARCHES = re.compile(r"sm_\d{2,4}|[a-z0-9_]{1,32}-[a-z0-9_]{1,32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A device and its tools, or the reason why there is none."""

    trouble: str
    device: Device | None = None
    toolchain: Toolchain | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Why nothing can be tuned on a machine, or what was found there, by kind of device."""

    trouble: str
    found: Mapping[str, Found]


def read_report(data: Any) -> Report:
    """Read far_device.py's report; raises ReplyError."""
    data = members(data, "trouble", "devices")
    devices = data["devices"]
    if not isinstance(devices, dict):
        raise ReplyError("devices is not an object")
    return Report(
        trouble=text(data, "trouble"),
        found={kind: _found(kind, each) for kind, each in devices.items()},
    )


def read_bandwidth(data: Any) -> float:
    """Bytes/s, 0 if not known; raises ReplyError."""
    return number(members(data, "bandwidth"), "bandwidth", MOST_BANDWIDTH)


def _found(kind: str, data: Any) -> Found:
    data = members(data, "trouble", "device", "toolchain")
    trouble = text(data, "trouble")
    if trouble:
        return Found(trouble=trouble)
    device = _device(data["device"])
    if device.vendor != kind:
        raise ReplyError(f"a device of {device.vendor or 'no vendor'} among those of {kind}")
    tools = members(data["toolchain"], *(field.name for field in fields(Toolchain)))
    versions = {name: text(tools, name, _MOST_TITLE) for name in tools}
    return Found(trouble="", device=device, toolchain=Toolchain(**versions))


def _device(data: Any) -> Device:
    data = members(data, *(field.name for field in fields(Device)))
    for name, pattern in (("name", _NAME), ("vendor", _NAME), ("arch", _ARCHES)):
        if not isinstance(data[name], str) or not pattern.fullmatch(data[name]):
            raise ReplyError(f"{name} of a device is not valid")
    device = Device(
        name=data["name"],
        title=text(data, "title", _MOST_TITLE),
        vendor=data["vendor"],
        arch=data["arch"],
        sm_count=whole_number(data, "sm_count", _MOST_MULTIPROCESSORS, least=1),
        memory_bandwidth=number(data, "memory_bandwidth", MOST_BANDWIDTH),
        l2_bytes=whole_number(data, "l2_bytes", _MOST_CACHE),
        clock_hz=number(data, "clock_hz", _MOST_CLOCK),
        aliases=_names(data, "aliases"),
        reported_names=_names(data, "reported_names"),
        source=text(data, "source"),
    )
    for published in all_devices():
        if published.name == device.name:
            if replace(device, source=published.source) != published:
                raise ReplyError(f"its figures of {device.name} differ from the published ones")
            return published
    return device


def _names(data: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(text({name: each}, name, _MOST_TITLE) for each in items(data, name, _MOST_NAMES))
