"""What a machine elsewhere can be tuned for: asked of several at once.

Usage:
    inquiry = inquire("user@orin", transport, None, why_none)     # far_device.py runs there
    heard({"user@orin": inquiry})["user@orin"]      # what was found, or why nothing can be

An inquiry is a generator: it yields the connection that it waits for, and returns what it found.
"""

import secrets
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashtune.kernels.backends.target import target_of
from flashtune.tuner.workers.answers.message import ReplyError, answer_to, to_line
from flashtune.tuner.workers.answers.report import Report, read_bandwidth, read_report
from flashtune.tuner.workers.connection import Connection, Ending, Transport
from flashtune.tuner.workers.process import wait_for_any
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError

FAR_DEVICE = "flashtune.tuner.workers.far_device"
LAST_SECONDS = 5.0  # for a process that has closed its output to be gone
FIND_SECONDS = 180.0  # to connect, and for a small machine to import torch and Triton


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A machine's device and tools; passed_over: why no device of a kind before it was taken."""

    device: Device
    toolchain: Toolchain
    passed_over: str


Inquiry = Generator[Connection, None, Found]


def inquire(
    name: str, transport: Transport, wanted: Device | None, why_none: Callable[[Ending], str]
) -> Inquiry:
    """Ask a machine for the device that is wanted, or which it has.

    Of the wanted device `cpu`, whatever CPU the machine has is meant. Raises FlashtuneError when
    there is no connection, another device, or not what is needed to tune it. why_none: says so of
    a process that ended before it answered.
    """
    connection = transport.start()
    try:
        report = read_report((yield from _answer(name, connection, None, why_none)))
        found = choose(name, report, wanted)
        sources = target_of(found.device).bandwidth_sources(found.device)
        if sources:
            answer = yield from _answer(name, connection, sources, why_none)
            device = replace(found.device, memory_bandwidth=read_bandwidth(answer))
            found = replace(found, device=device)
    except ReplyError as error:
        raise FlashtuneError(
            f"{name} gave no valid answer ({error}): check that nothing else prints there, such "
            "as a login script"
        ) from None
    finally:
        connection.end()
    return found


def heard(inquiries: Mapping[str, Inquiry]) -> dict[str, Found | FlashtuneError]:
    """What all machines answer, or why one does not; none waits for another."""
    under_way: dict[str, Connection] = {}
    found: dict[str, Found | FlashtuneError] = {}
    try:
        while len(found) < len(inquiries):
            for name, inquiry in inquiries.items():
                if name in found:
                    continue
                try:
                    under_way[name] = next(inquiry)
                except StopIteration as end:
                    found[name] = end.value
                except FlashtuneError as error:
                    found[name] = error
            wait_for_any([under_way[name] for name in inquiries if name not in found], 0.5)
    finally:
        for inquiry in inquiries.values():
            inquiry.close()
    return {name: found[name] for name in inquiries}


def choose(name: str, report: Report, wanted: Device | None) -> Found:
    """The wanted device of those reported; without a wish the first that can be tuned."""
    if report.trouble:
        raise FlashtuneError(f"{name}: {report.trouble}")
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
        raise FlashtuneError(f"{name} has no device of that kind")
    device, tools = found.device, found.toolchain
    if device is None or tools is None:
        raise FlashtuneError(f"{name}: {found.trouble}")
    if wanted is not None and target_of(wanted).registered and device != wanted:
        raise FlashtuneError(
            f"{name} has {device.title} ({device.name}, {device.arch}), not "
            f"{wanted.title} ({wanted.name}, {wanted.arch}): leave --device out"
        )
    return Found(device=device, toolchain=tools, passed_over=passed_over)


def _answer(
    name: str, connection: Connection, content: Any, why_none: Callable[[Ending], str]
) -> Generator[Connection, None, Any]:
    """What the far process answers; raises FlashtuneError where nothing comes, or ReplyError."""
    request = secrets.token_hex(8)
    connection.write(to_line(request, content))
    end = time.monotonic() + FIND_SECONDS
    while time.monotonic() < end:
        yield connection
        try:
            if wait_for_any([connection], 0.0) and (line := connection.read()) is not None:
                return answer_to(request, line)
        except EOFError:
            raise FlashtuneError(why_none(connection.end(LAST_SECONDS))) from None
    raise FlashtuneError(
        f"no answer from {name} in {FIND_SECONDS:.0f} s: check that it can be reached"
    )
