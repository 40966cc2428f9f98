"""What a machine can be tuned for: run there, it prints its devices as a line of JSON.

Usage:
    python -m flashtune.tuner.workers.far_device

`trouble` says why nothing can be tuned there; else `devices` has for each kind of device its own
`trouble`, or a `device` with its `toolchain`. For each line with what a target's
`bandwidth_sources` are for the CPU it then prints the bandwidth of its memory in bytes/s.
"""

import contextlib
import json
import sys
from dataclasses import asdict
from typing import Any

from flashtune.tuning_db.package import why_unusable


def main() -> None:
    """Print the report, then bandwidths until standard input ends."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what is imported may print
        print(json.dumps(report()), file=answers, flush=True)
        for line in sys.stdin:
            from flashtune.kernels.backends.cpp.this_cpu import describe_cpu, fresh_bandwidth

            bandwidth = fresh_bandwidth(describe_cpu(), json.loads(line))
            print(bandwidth, file=answers, flush=True)


def report() -> dict[str, Any]:
    """The machine's devices by their kind, or the first thing that is missing for each."""
    trouble = why_unusable("torch")
    if trouble:
        return {"trouble": trouble}
    from flashtune.kernels.backends.target import Target, all_targets

    def found(target: Target) -> dict[str, Any]:
        trouble = target.trouble()
        device = None if trouble else target.described()
        if device is None:
            return {"trouble": trouble or "there is no such device"}
        return {
            "trouble": None,
            "device": asdict(device),
            "toolchain": asdict(target.toolchain()),
        }

    return {"trouble": None, "devices": {each.name: found(each) for each in all_targets()}}


if __name__ == "__main__":
    main()
