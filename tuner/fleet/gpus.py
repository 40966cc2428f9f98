"""This machine's GPUs, a worker for each.

Usage:
    gpus_here("all", wanted=None)        # or "0,2"
"""

import os
from collections.abc import Sequence

import torch

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.tuner.fleet.machine import Machine
from flashtune.tuner.workers.transport import LocalTransport, Place
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_here(which: str, wanted: Device | None) -> list[Machine]:
    """This machine's GPUs that are named, of the device that is wanted if one is.

    which: `all`, or numbers as torch counts them. Raises FlashtuneError where there is none of
    these, and for numbers that no GPU has.
    """
    count = torch.cuda.device_count()
    if not count:
        raise FlashtuneError("torch finds no GPU here: leave --gpus out")
    machines = []
    for number in _numbers(which, count):
        device = device_of(torch.device("cuda", number))
        transport = LocalTransport(environment={VISIBLE: _visible(number)})
        machines.append(
            Machine(
                device=device,
                toolchain=toolchain(device),
                place=Place(name=f"gpu {number}", transport=transport),
                elsewhere=False,
            )
        )
    usable = [each for each in machines if wanted is None or each.device == wanted]
    if not usable:
        names = ", ".join(dict.fromkeys(each.device.name for each in machines))
        raise FlashtuneError(
            f"--gpus {which} selects {names}, not {wanted.name if wanted else ''}"
        )
    return usable


def _numbers(which: str, count: int) -> Sequence[int]:
    if which.strip().lower() == "all":
        return range(count)
    words = [word.strip() for word in which.split(",")]
    if not all(word.isdecimal() and int(word) < count for word in words):
        raise FlashtuneError(
            f"--gpus must be all, or numbers from 0 to {count - 1}, not {which!r}"
        )
    return list(dict.fromkeys(int(word) for word in words))


def _visible(number: int) -> str:
    """What a process must see to have this GPU alone: torch counts what we see ourselves."""
    ours = os.environ.get(VISIBLE)
    return ours.split(",")[number].strip() if ours else str(number)
