"""The GPU under a tensor as a device, and the tools that make its kernels."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flashtune.tuning_db.device import Device, Toolchain, all_devices, match_device

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_LARGER_ORIN_BYTES = 9 * 2**30  # tells an Orin NX 16GB from an Orin Nano 8GB: both have 8 SMs


def describe(device: torch.device) -> Device | None:
    """The registered device, or one that its driver describes; None if it is not NVIDIA's.

    A GPU with fewer multiprocessors than its registered namesake (a slice of it) is a device of
    its own.
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    return describe_gpu(torch.cuda.get_device_properties(device))


def describe_gpu(properties: Any) -> Device:
    """The Device for CUDA device properties, as `torch.cuda.get_device_properties` has them.

    If the driver does not report memory clock and bus width, the bandwidth is 0: unknown.
    """
    arch = f"sm_{properties.major}{properties.minor}"
    sm_count = properties.multi_processor_count
    registered = match_device(properties.name) or _jetson(properties, arch)
    if registered and (registered.arch, registered.sm_count) == (arch, sm_count):
        return registered
    memory_hz = getattr(properties, "memory_clock_rate", 0) * 1000.0
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return Device(
        name=f"{slug}-{sm_count}sm",
        title=properties.name,
        vendor="nvidia",
        arch=arch,
        sm_count=sm_count,
        memory_bandwidth=2 * memory_hz * bus_bytes,  # two transfers a clock
        l2_bytes=properties.L2_cache_size,
        clock_hz=getattr(properties, "clock_rate", 0) * 1000.0,
        reported_names=(properties.name,),
        source="the CUDA driver",
    )


def _jetson(properties: Any, arch: str) -> Device | None:
    """The Jetson with these properties: the driver gives a whole family one name."""
    if not properties.is_integrated:
        return None
    found = [
        device
        for device in all_devices()
        if (device.arch, device.sm_count) == (arch, properties.multi_processor_count)
        and not device.reported_names
    ]
    if len(found) > 1:
        larger = properties.total_memory > _LARGER_ORIN_BYTES
        found = [device for device in found if (device.name == "orin-nx") == larger]
    return found[0] if found else None


def toolchain() -> Toolchain:
    """The versions of Triton, torch and the driver; empty for a tool that is missing."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return Toolchain(triton=triton, torch=torch.__version__, driver=_driver_version())


def _driver_version() -> str:
    """The kernel driver's version, else the CUDA version that it serves."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER_FILE.read_text("utf-8"))
    except OSError:
        found = None
    if found:
        return found.group()
    if not torch.cuda.is_available():
        return ""
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"cuda {version // 1000}.{version % 1000 // 10}"
