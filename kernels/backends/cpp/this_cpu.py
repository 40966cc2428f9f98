"""This machine's CPU as a device: its name, instruction sets, usable cores, cache and bandwidth.

Usage:
    this_cpu()          # the same Device throughout a process
    usable_cores()      # what affinity and the container's quota leave
"""

import functools
import json
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flashtune.kernels.backends.cpp.read_bandwidth import measure_bandwidth
from flashtune.kernels.plans.parts.simd import SIMD_LEVELS
from flashtune.tuning_db.cached_file import keep, whole
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.environment import cache_dir
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import MOST_NAME

ALIAS = "cpu"
_CPUINFO = Path("/proc/cpuinfo")
_BOARD = Path("/proc/device-tree/model")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
_UNKNOWN_CACHE = 32 * 2**20  # bytes, where the system doesn't tell
_NEEDED: dict[str, set[str]] = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "neon": {"asimd"},
    "neon_dot": {"asimddp"},
    "neon_bf16": {"bf16", "asimdhp"},
}  # flags in /proc/cpuinfo, beside those of the levels below


@functools.cache
def this_cpu() -> Device:
    """This machine's CPU. Its read bandwidth is measured once and kept in the cache folder.

    If it cannot be measured, without a compiler or enough memory, it is 0: unknown.
    """
    device = describe_cpu()
    return replace(device, memory_bandwidth=known_bandwidth(device))


def describe_cpu() -> Device:
    """The CPU as the system describes it, of unknown bandwidth."""
    text = _read(_CPUINFO)
    title = cpu_title(text, _read(_BOARD))
    arch = cpu_arch(platform.machine(), text)
    cores = usable_cores()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{title} {cores}c {arch.partition('-')[2]}".lower())
    return Device(
        name=slug.strip("-")[:MOST_NAME],
        title=f"{title}, {cores} cores",
        vendor="cpu",
        arch=arch,
        sm_count=cores,
        memory_bandwidth=0.0,
        l2_bytes=last_cache_bytes(_CACHES),
        clock_hz=1000.0 * float(_read(_CLOCK) or 0),
        aliases=(ALIAS,),
        source="this machine's system; the read bandwidth is measured",
    )


def cpu_title(cpuinfo: str, board: str) -> str:
    """The model's name, or the board's if the system names no model."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    name = found.group(1) if found else board.strip("\0\n ")
    return " ".join(re.sub(r"\((R|TM)\)|CPU|@.*", " ", name).split()) or platform.machine()


def cpu_arch(machine: str, cpuinfo: str) -> str:
    """Machine and best SIMD level, as `x86_64-avx512_bf16`."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    best = "scalar"
    for level in SIMD_LEVELS.get(machine, ("scalar",)):
        if not _NEEDED[level] <= flags:
            break
        best = level
    return f"{machine}-{best}"


def last_cache_bytes(folder: Path) -> int:
    """The size of the last cache before memory."""
    sizes = [_read(path) for path in folder.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [re.fullmatch(r"(\d+)([KMG])\s*", size) for size in sizes]
    known = [int(match[1]) * units[match[2]] for match in found if match]
    return max(known, default=_UNKNOWN_CACHE)


def _read(path: Path) -> str:
    """The file's text; empty if there is none."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may use: affinity, cut down to the container's quota of time."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(_read(_CGROUP), _CGROUPS)
    return max(1, min(cores, int(quota))) if quota else cores


def cpu_quota(membership: str, root: Path) -> float | None:
    """The cores' worth of time that the control groups allow; None where they don't say.

    membership: the text of /proc/self/cgroup. root: where the groups are mounted.
    """
    quotas = []
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for parent in (Path(group), *Path(group).parents):
            inner = parent.relative_to("/")
            if controllers:  # version 1
                folder = root / "cpu" / inner
                parts = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                limit = " ".join(map(_read, parts))
            else:
                limit = _read(root / inner / "cpu.max")
            found = re.fullmatch(r"(\d+)\s+(\d+)\s*", limit)
            if found and int(found[2]):
                quotas.append(int(found[1]) / int(found[2]))
    return min(quotas, default=None)


def known_bandwidth(device: Device, sources: Sequence[str] = ()) -> float:
    """Bytes/s from the cache folder, else measured now and kept there; 0 if that fails.

    sources: as `measure_bandwidth` has them.
    """
    with suppress(FlashtuneError, ValueError, KeyError, TypeError):
        return float(json.loads(whole(_bandwidth_file(device)) or b"")["read_bytes_per_s"])
    return fresh_bandwidth(device, sources)


def fresh_bandwidth(device: Device, sources: Sequence[str] = ()) -> float:
    """Bytes/s measured now, and kept in the cache folder; 0 if that fails."""
    try:
        bandwidth = measure_bandwidth(device, sources)
    except (FlashtuneError, RuntimeError, MemoryError):
        return 0.0
    with suppress(OSError, FlashtuneError):
        keep(_bandwidth_file(device), json.dumps({"read_bytes_per_s": bandwidth}).encode())
    return bandwidth


def _bandwidth_file(device: Device) -> Path:
    return cache_dir() / "cpp" / f"bandwidth-{device.name}-{platform.node()}.json"
