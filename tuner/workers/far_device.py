"""Reports the devices of the machine that it runs on, for which kernels can be tuned.

Usage:
    python -m flashtune.tuner.workers.far_device < requests 3> answers     # lines of message.py

If a request's content is null, the answer is a report: `trouble` says why nothing can be tuned
there, or is empty; `devices` has for each kind of device its own `trouble`, or a `device` with its
`toolchain`. Otherwise the content is a target's `bandwidth_sources` for the CPU, and the answer is
the `bandwidth` of its memory in bytes/s.
"""

import os
import sys
from dataclasses import asdict
from typing import Any

from flashtune.tuner.workers.answers.message import from_line, to_line
from flashtune.tuner.workers.keeper import REPLIES
from flashtune.tuning_db.package import why_unusable


def main() -> None:
    """Answer until standard input ends."""
    os.set_inheritable(REPLIES, False)
    with os.fdopen(REPLIES, "w", encoding="utf-8") as replies:
        for line in sys.stdin:
            request, sources = from_line(line)
            replies.write(to_line(request, report() if sources is None else _rate(sources)) + "\n")
            replies.flush()


def report() -> dict[str, Any]:
    """The machine's devices by kind, or for each kind the first thing that is missing."""
    trouble = why_unusable("torch")
    if trouble:
        return {"trouble": trouble, "devices": {}}
    from flashtune.kernels.backends.target import Target, all_targets

    def found(target: Target) -> dict[str, Any]:
        trouble = target.trouble()
        device = None if trouble else target.described()
        if device is None:
            trouble = trouble or "there is no such device"
            return {"trouble": trouble, "device": None, "toolchain": None}
        return {"trouble": "", "device": device.data(), "toolchain": asdict(target.toolchain())}

    return {"trouble": "", "devices": {each.name: found(each) for each in all_targets()}}


def _rate(sources: list[str]) -> dict[str, float]:
    from flashtune.kernels.backends.cpp.this_cpu import describe_cpu, fresh_bandwidth

    return {"bandwidth": fresh_bandwidth(describe_cpu(), sources)}


if __name__ == "__main__":
    main()
