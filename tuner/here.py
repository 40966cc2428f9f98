"""This machine's devices, by the names that users give them.

Usage:
    this_device()                # its GPU, else its CPU
    device_named("gpu")          # or `cpu`, or a registered name or alias
    torch_device_named("cpu")    # "cpu" or "cuda", for what runs in this process
"""

from dataclasses import replace

from flashtune.kernels.backends.cpp.this_cpu import (
    ALIAS,
    describe_cpu,
    fresh_bandwidth,
    this_cpu,
)
from flashtune.kernels.backends.host import devices_here, named_device
from flashtune.kernels.backends.target import target_of
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError

GPU_NAMES = ("gpu", "cuda")


def this_gpu() -> Device | None:
    """This machine's first GPU; None if it has none that kernels can run on."""
    found = (each for each in devices_here() if target_of(each).torch_device == "cuda")
    return next(found, None)


def as_it_is_now(device: Device) -> Device:
    """The device; this machine's CPU gets its memory bandwidth measured now.

    Memory bandwidth depends on what else the machine does, so a time is judged by a bandwidth
    measured around the same time. Other devices keep their known bandwidth.
    """
    if device.name != describe_cpu().name:
        return device
    return replace(device, memory_bandwidth=fresh_bandwidth(device) or device.memory_bandwidth)


def this_device() -> Device:
    """This machine's GPU; its CPU if it has no GPU that kernels can run on."""
    return this_gpu() or this_cpu()


def device_named(name: str) -> Device:
    """A device by name or alias: `cpu` and `gpu` (or `cuda`) are this machine's.

    Raises FlashtuneError if there is none.
    """
    if name.strip().lower() not in GPU_NAMES:
        return named_device(name)
    gpu = this_gpu()
    if gpu is None:
        raise FlashtuneError(
            "torch finds no GPU here: name a device that `flashtune devices` lists"
        )
    return gpu


def torch_device_named(name: str | None) -> str:
    """The torch name of the device for work in this process; without a name, a GPU if possible.

    Takes the names that `device_named` takes, but only of this machine's devices, and measures
    nothing. Raises FlashtuneError for a device of another machine.
    """
    gpu = this_gpu()
    if name is None:
        return "cuda" if gpu else "cpu"
    wanted = name.strip().lower()
    if wanted in (ALIAS, describe_cpu().name):
        return "cpu"
    if wanted in GPU_NAMES and gpu is None:
        raise FlashtuneError("torch finds no GPU here: give --device cpu")
    if gpu is not None and (wanted in GPU_NAMES or device_named(name) == gpu):
        return "cuda"
    raise FlashtuneError(
        f"{device_named(name).title} is not a device of this machine: give cpu or gpu"
    )
