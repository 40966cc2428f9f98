"""A machine that is tuned from this one, over ssh.

Usage:
    machine = find_machine("user@orin", find_device("orin"))
    machine.device, machine.toolchain       # what was found there
    WorkerPool(1, machine.transport)        # workers there
"""

import json
import selectors
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any

from flashtune.kernels.backends.target import target_of
from flashtune.tuner.workers.process import Ending, WorkerProcess
from flashtune.tuner.workers.ssh import NOT_FOUND, PYTHON, SshTransport
from flashtune.tuner.workers.transport import Transport
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError

FAR_DEVICE = "flashtune.tuner.workers.far_device"
LAST_SECONDS = 5.0  # for a process that has closed its output to be gone
FIND_SECONDS = 180.0  # to connect, and for a small machine to import torch and Triton


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteMachine:
    """The device of a machine elsewhere, its tools, and the way to workers there."""

    destination: str
    device: Device
    toolchain: Toolchain
    transport: Transport

    def compiles_as(self, here: Toolchain) -> bool:
        """Whether what compiles here compiles there: by the same minor version of Triton.

        C++ is compiled by the machine that runs it.
        """
        there, ours = (each.triton.split(".")[:2] for each in (self.toolchain, here))
        return target_of(self.device).compiles_elsewhere and there == ours

    def describe(self) -> str:
        """The machine in a line: device, and the tools there."""
        tools = self.toolchain
        named = {"triton": tools.triton, "torch": tools.torch, "driver": tools.driver}
        versions = [f"{name} {version}" for name, version in named.items() if version]
        found = ", ".join([f"{self.device.title} ({self.device.arch})", *versions])
        return f"{self.destination}: {', '.join(filter(None, [found, tools.compiler]))}"


def find_machine(destination: str, wanted: Device | None, python: str = PYTHON) -> RemoteMachine:
    """Connect, and see that the machine has the device that is wanted, or which it has.

    Of the wanted device `cpu`, whatever CPU the machine has is meant. Raises FlashtuneError when
    there is no connection, another device, or not what is needed to tune it.
    """
    if destination.startswith("-") or not destination.strip():
        raise FlashtuneError(f"{destination!r} is no destination for ssh: give user@host")
    asked = SshTransport(destination=destination, python=python, module=FAR_DEVICE)
    if shutil.which(asked.command[0]) is None:
        raise FlashtuneError("there is no ssh here: install OpenSSH's client")
    process = WorkerProcess(asked)
    try:
        device, toolchain = _choose(destination, json.loads(_answer(process, asked)), wanted)
        sources = target_of(device).bandwidth_sources(device)
        if sources:
            process.write(json.dumps(sources))
            device = replace(device, memory_bandwidth=float(_answer(process, asked)))
    finally:
        process.end()
    return RemoteMachine(
        destination=destination,
        device=device,
        toolchain=toolchain,
        transport=SshTransport(destination=destination, python=python),
    )


def _choose(
    destination: str, report: dict[str, Any], wanted: Device | None
) -> tuple[Device, Toolchain]:
    """The wanted device of those found; without a wish the first that can be tuned."""
    if report["trouble"]:
        raise FlashtuneError(f"{destination}: {report['trouble']}")
    devices = report["devices"]
    if wanted is None:
        usable = [each for each in devices.values() if not each["trouble"]]
        found = usable[0] if usable else list(devices.values())[-1]
    else:
        target = target_of(wanted)
        found = devices[target.name]
    if found["trouble"]:
        raise FlashtuneError(f"{destination}: {found['trouble']}")
    device = Device.from_json(found["device"])
    if wanted is not None and target.registered and device != wanted:
        raise FlashtuneError(
            f"{destination} has {device.title} ({device.name}, {device.arch}), not "
            f"{wanted.title} ({wanted.name}, {wanted.arch}): leave --device out"
        )
    return device, Toolchain.from_json(found["toolchain"])


def _answer(process: WorkerProcess, transport: SshTransport) -> str:
    """The next line of the far process; raises FlashtuneError where none comes."""
    end = time.monotonic() + FIND_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            try:
                if selector.select(1.0) and (line := process.read()) is not None:
                    return line
            except EOFError:
                raise FlashtuneError(_why_none(process.end(LAST_SECONDS), transport)) from None
    host = transport.destination
    raise FlashtuneError(
        f"no answer from {host} in {FIND_SECONDS:.0f} s: see that `ssh {host}` works"
    )


def _why_none(ending: Ending, transport: SshTransport) -> str:
    """Why a far process ended before it answered."""
    host = transport.destination
    if ending.why_lost:
        return f"{ending.why_lost}; see that `ssh {host}` works"
    if ending.code == NOT_FOUND:
        return f"{host} has no {transport.python}: name a Python by --remote-python"
    return f"{host}: {ending.said or f'the Python there ended with exit code {ending.code}'}"
