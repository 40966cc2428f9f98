"""This machine's devices, and the toolchain of this process, as records name them.

Usage:
    device_of(weight.device)
    devices_here()             # the GPU first, if there is one
    toolchain(device)

If torch does not find a GPU that this machine should have, a line in the log `flashtune` says so.
Otherwise the CPU would be used silently.
"""

import functools
import logging

import torch

from flashtune.kernels.backends.target import all_targets, target_of
from flashtune.tuning_db.device import Device, Toolchain, find_device

LOG = logging.getLogger("flashtune")


def device_of(device: torch.device) -> Device:
    """The device under a torch device, as its target describes it."""
    if device.type == "cpu":
        _warn_of_unused()
    found = (target.describe(device) for target in all_targets())
    return next(each for each in found if each is not None)


def devices_here() -> tuple[Device, ...]:
    """This machine's devices that have kernels, the preferred first."""
    _warn_of_unused()
    found = (target.here() for target in all_targets())
    return tuple(each for each in found if each is not None)


def named_device(name: str) -> Device:
    """The device of that name or alias: `cpu` is this machine's, the others are registered.

    Raises FlashtuneError if there is none.
    """
    wanted = name.strip().lower()
    found = (target.named(wanted) for target in all_targets())
    return next((each for each in found if each is not None), None) or find_device(name)


@functools.cache
def _warn_of_unused() -> None:
    """Warn once about a device that this machine should have but torch does not find."""
    for why in filter(None, (target.unused() for target in all_targets())):
        LOG.warning("%s", why)


@functools.cache
def toolchain(device: Device) -> Toolchain:
    """The tools that build kernels for a device in this process; no tool, no version."""
    return target_of(device).toolchain()
