"""A machine that is tuned from this one, over ssh.

Usage:
    machine = find_machine("user@orin", find_device("orin"))
    machine.device, machine.toolchain       # what was found there
    WorkerPool(1, machine.transport)        # workers there
"""

import secrets
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any

from flashtune.kernels.backends.target import target_of
from flashtune.tuner.workers.answers.message import ReplyError, answer_to, to_line
from flashtune.tuner.workers.answers.report import Report, read_bandwidth, read_report
from flashtune.tuner.workers.process import Ending, WorkerProcess, wait_for_any
from flashtune.tuner.workers.ssh import NOT_FOUND, PYTHON, SshTransport
from flashtune.tuner.workers.transport import Transport
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError

FAR_DEVICE = "flashtune.tuner.workers.far_device"
LAST_SECONDS = 5.0  # for a process that has closed its output to be gone
FIND_SECONDS = 180.0  # to connect, and for a small machine to import torch and Triton


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteMachine:
    """The device of a machine elsewhere, its tools, and the way to workers there.

    passed_over: why no device of a kind that goes before was taken, where none was asked for.
    """

    destination: str
    device: Device
    toolchain: Toolchain
    transport: Transport
    passed_over: str = ""

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
        described = ", ".join(filter(None, [found, tools.compiler]))
        return f"{self.destination}: {'; '.join(filter(None, [described, self.passed_over]))}"


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
        report = read_report(_answer(process, asked, None))
        device, toolchain, passed_over = _choose(destination, report, wanted)
        sources = target_of(device).bandwidth_sources(device)
        if sources:
            bandwidth = read_bandwidth(_answer(process, asked, sources))
            device = replace(device, memory_bandwidth=bandwidth)
    except ReplyError as error:
        raise FlashtuneError(
            f"{destination} gave no valid answer ({error}): see that nothing else answers for "
            f"{python} there"
        ) from None
    finally:
        process.end()
    return RemoteMachine(
        destination=destination,
        device=device,
        toolchain=toolchain,
        transport=SshTransport(destination=destination, python=python),
        passed_over=passed_over,
    )


def _choose(
    destination: str, report: Report, wanted: Device | None
) -> tuple[Device, Toolchain, str]:
    """The wanted device of those found; without a wish the first that can be tuned.

    With it come its tools, and why the kinds of device before it were passed over.
    """
    if report.trouble:
        raise FlashtuneError(f"{destination}: {report.trouble}")
    passed_over = ""
    if wanted is None:
        every = list(report.found.values())
        usable = [each for each in every if each.device]
        found = next(iter([*usable, *every[::-1]]), None)
        if usable:
            passed_over = "; ".join(each.trouble for each in every[: every.index(usable[0])])
    else:
        found = report.found.get(target_of(wanted).name)
    if found is None:
        raise FlashtuneError(f"{destination} names no device of that kind")
    device, tools = found.device, found.toolchain
    if device is None or tools is None:
        raise FlashtuneError(f"{destination}: {found.trouble}")
    if wanted is not None and target_of(wanted).registered and device != wanted:
        raise FlashtuneError(
            f"{destination} has {device.title} ({device.name}, {device.arch}), not "
            f"{wanted.title} ({wanted.name}, {wanted.arch}): leave --device out"
        )
    return device, tools, passed_over


def _answer(process: WorkerProcess, transport: SshTransport, content: Any) -> Any:
    """What the far process answers; raises FlashtuneError where nothing comes, or ReplyError."""
    request = secrets.token_hex(8)
    process.write(to_line(request, content))
    end = time.monotonic() + FIND_SECONDS
    while time.monotonic() < end:
        try:
            if wait_for_any([process], 1.0) and (line := process.read()) is not None:
                return answer_to(request, line)
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
