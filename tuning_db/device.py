"""The device that a kernel runs on, and the versions of the tools that built it.

Usage:
    find_device("orin")          # by name or alias, from devices.json
    match_device("NVIDIA H200")  # by the name that the driver reports
"""

import functools
import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from flashtune.tuning_db.errors import FlashtuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device's published figures; `source` says where each comes from.

    Units: bytes, bytes/s, Hz. `reported_names`: the names that the driver gives it.
    """

    name: str
    title: str
    vendor: str
    arch: str
    sm_count: int
    memory_bandwidth: float
    l2_bytes: int
    clock_hz: float
    aliases: tuple[str, ...] = ()
    reported_names: tuple[str, ...] = ()
    source: str

    def data(self) -> dict[str, Any]:
        """The device as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: Any) -> "Device":
        """Build from one of our decoded JSON objects."""
        names = {name: tuple(data.get(name, ())) for name in ("aliases", "reported_names")}
        return cls(**{**data, **names})

    @property
    def capability(self) -> int:
        """The compute capability as Triton's target wants it: `sm_87` is 87."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def limits(self) -> "ArchLimits":
        """The limits of one multiprocessor; of the nearest lower architecture if this is unknown.

        Raises FlashtuneError for an architecture older than any known.
        """
        known = sorted((int(arch.removeprefix("sm_")), arch) for arch in ARCH_LIMITS)
        below = [arch for capability, arch in known if capability <= self.capability]
        if not below:
            raise FlashtuneError(f"no kernels for {self.arch}: {known[0][1]} or later is needed")
        return ARCH_LIMITS[below[-1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchLimits:
    """Per-multiprocessor limits of an architecture.

    Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
    """

    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536
    reserved_per_block: int = 1024  # bytes of shared memory per block for the driver


_KIB = 1024
ARCH_LIMITS = {
    "sm_80": ArchLimits(
        shared_per_block=163 * _KIB,
        shared_per_sm=164 * _KIB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_86": ArchLimits(
        shared_per_block=99 * _KIB,
        shared_per_sm=100 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=16,
    ),
    "sm_87": ArchLimits(
        shared_per_block=163 * _KIB,
        shared_per_sm=164 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=16,
    ),
    "sm_89": ArchLimits(
        shared_per_block=99 * _KIB,
        shared_per_sm=100 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
    "sm_90": ArchLimits(
        shared_per_block=227 * _KIB,
        shared_per_sm=228 * _KIB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_100": ArchLimits(
        shared_per_block=227 * _KIB,
        shared_per_sm=228 * _KIB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_110": ArchLimits(
        shared_per_block=227 * _KIB,
        shared_per_sm=228 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
    "sm_120": ArchLimits(
        shared_per_block=99 * _KIB,
        shared_per_sm=100 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
    "sm_121": ArchLimits(
        shared_per_block=99 * _KIB,
        shared_per_sm=100 * _KIB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Toolchain:
    """The versions that a measurement depends on; empty if not applicable.

    compiler: of C++ kernels, as its own `--version` prints it.
    """

    triton: str = ""
    torch: str = ""
    driver: str = ""
    compiler: str = ""

    @property
    def key(self) -> str:
        """Canonical JSON, the database key."""
        return _key_of(self)

    def outdated(self, now: "Toolchain") -> tuple[str, ...]:
        """The tools whose change makes a measurement stale, by name.

        Triton's and torch's minor version, the driver, and the compiler of C++ kernels.
        """
        return tuple(
            name
            for name in (field.name for field in fields(self))
            if _told_apart(name, getattr(self, name)) != _told_apart(name, getattr(now, name))
        )

    @classmethod
    def from_json(cls, data: Any) -> "Toolchain":
        """Build from a decoded JSON object; raises FlashtuneError for any other key or type."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise FlashtuneError(f"a toolchain must have exactly the keys {sorted(names)}")
        if not all(isinstance(value, str) for value in data.values()):
            raise FlashtuneError("a toolchain's versions must be text")
        return cls(**data)


@functools.lru_cache(maxsize=64)  # every record of a search has the same
def _key_of(tools: Toolchain) -> str:
    data = {field.name: getattr(tools, field.name) for field in fields(tools)}
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _told_apart(tool: str, version: str) -> str:
    """The part of a tool's version that may change a kernel's speed."""
    if tool not in ("triton", "torch"):
        return version
    return ".".join(version.partition("+")[0].split(".")[:2])


@functools.cache
def all_devices() -> tuple[Device, ...]:
    """Every registered device, in the file's order."""
    text = resources.files("flashtune.tuning_db").joinpath("devices.json").read_text("utf-8")
    return tuple(Device.from_json(row) for row in json.loads(text)["devices"])


def find_device(name: str) -> Device:
    """The device of that name or alias; raises FlashtuneError if there is none."""
    wanted = name.strip().lower()
    for device in all_devices():
        if wanted == device.name or wanted in device.aliases:
            return device
    known = ", ".join(device.name for device in all_devices())
    raise FlashtuneError(f"unknown device {name!r}: use one of {known} (see `flashtune devices`)")


def match_device(reported_name: str) -> Device | None:
    """The registered device that the driver calls `reported_name`, or None."""
    wanted = reported_name.strip().lower()
    for device in all_devices():
        if wanted in (name.lower() for name in device.reported_names):
            return device
    return None
