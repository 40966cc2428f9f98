"""Machines that are tuned from this one, over ssh.

Usage:
    machine = find_machine("user@orin", find_device("orin"))
    machine.device, machine.toolchain       # what was found there
    WorkerPool([machine.place])             # a worker there
"""

import shutil
from collections.abc import Callable, Sequence

from flashtune.tuner.fleet.inquiry import FAR_DEVICE, Inquiry, heard, inquire
from flashtune.tuner.fleet.machine import Machine
from flashtune.tuner.workers.connection import Ending
from flashtune.tuner.workers.ssh import NOT_FOUND, PYTHON, SshTransport
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError


def find_machine(destination: str, wanted: Device | None, python: str = PYTHON) -> Machine:
    """Connect, and see that the machine has the device that is wanted, or which it has.

    Of the wanted device `cpu`, whatever CPU the machine has is meant. Raises FlashtuneError when
    there is no connection, another device, or not what is needed to tune it.
    """
    return find_machines([destination], wanted, python)[0]


def find_machines(
    destinations: Sequence[str],
    wanted: Device | None,
    python: str = PYTHON,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[Machine]:
    """Connect to several machines at once; see `find_machine`.

    Of several, one that cannot be used is left out, with a note. Raises FlashtuneError where none
    can.
    """
    names = list(dict.fromkeys(destinations))
    found = heard({name: _inquiry(name, wanted, python) for name in names})
    machines, errors = [], []
    for name, each in found.items():
        if isinstance(each, FlashtuneError):
            errors.append(each)
            continue
        transport = SshTransport(destination=name, python=python)
        machines.append(
            Machine(
                device=each.device,
                toolchain=each.toolchain,
                place=Place(name=name, transport=transport, site=name),
                passed_over=each.passed_over,
            )
        )
    if not machines:
        raise errors[0]
    for error in errors:
        on_note(f"{error}: left out")
    return machines


def _inquiry(destination: str, wanted: Device | None, python: str) -> Inquiry:
    if destination.startswith("-") or not destination.strip():
        raise FlashtuneError(f"{destination!r} is not an ssh destination: give user@host")
    asked = SshTransport(destination=destination, python=python, module=FAR_DEVICE)
    if shutil.which(asked.command[0]) is None:
        raise FlashtuneError("ssh is not installed: install the OpenSSH client")
    return inquire(destination, asked, wanted, lambda ending: _why_none(ending, asked))


def _why_none(ending: Ending, transport: SshTransport) -> str:
    """Why a far process ended before it answered."""
    host = transport.destination
    if ending.why_lost:
        return f"{ending.why_lost}: check that `ssh {host}` works"
    if ending.code == NOT_FOUND:
        return f"{host} has no {transport.python}: name a Python by --remote-python"
    return f"{host}: {ending.said or f'the Python there ended with exit code {ending.code}'}"
