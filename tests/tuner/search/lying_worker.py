"""A worker that starts at once, and of which some configs go wrong, by a number and their knobs.

python lying_worker.py NUMBER < tasks 3> replies
"""

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

MIB = 2**20
FAULTS = (
    "segfault", "garbage", "binary", "half", "huge", "another's", "empty", "negative", "text",
    "nan", "nothing", "policy", "floods", "escapes", "fake", "fake", "fake", "flaky", "flaky",
    "flaky", "late",
)  # fmt: skip
SHARE = 0.4  # of the configs that go wrong
BROKEN: dict[str, Any] = {
    "negative": {"median_us": -5.0}, "text": {"median_us": "fast"},
    "nan": {"median_us": float("nan")}, "nothing": {"median_us": 0.0},
    "policy": {"policy": "chosen"},
}  # fmt: skip


def fault_of(config: dict[str, Any], number: int) -> tuple[str, float]:
    """What is wrong with a config, if anything, and how long it takes: 40 to 50 us, if honest."""
    text = f"{number} {json.dumps(config, sort_keys=True)}"
    drawn = int(hashlib.sha256(text.encode()).hexdigest(), 16)
    time_us = 40 + (drawn // 1000) % 1000 / 100
    if drawn % 1000 >= 1000 * SHARE:
        return "", time_us
    fault = FAULTS[(drawn // 10**6) % len(FAULTS)]
    return fault, time_us - (8 if fault in ("flaky", "late") else 0)


def measured(config: dict[str, Any], number: int, final: bool) -> dict[str, Any]:
    """A measurement, or the end of this process."""
    fault, time_us = fault_of(config, number)
    if fault == "segfault" or (fault == "late" and final):
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "floods":
        for _ in range(50):
            os.write(2, b"x" * MIB)
    if fault == "escapes" and os.fork() == 0:
        os.setsid()
        time.sleep(600)
    if fault == "fake" and not final:
        time_us = 1.0
    if fault == "flaky" and final:
        return {
            "outcome": "wrong_result", "median_us": None, "spread_us": None, "samples": 0,
            "error": "flaky", "policy": "final-behind", "joules": None,
        }  # fmt: skip
    found = {
        "outcome": "ok", "median_us": time_us, "spread_us": 0.1, "samples": 10, "error": "",
        "policy": "final-behind" if final else "search-behind", "joules": None,
    }  # fmt: skip
    return {**found, **BROKEN.get(fault, {})}


def spoil(config: dict[str, Any], number: int, replies: int) -> None:
    """Write what is no reply."""
    fault, _ = fault_of(config, number)
    lines = {
        "garbage": b"Segmentation fault? no, {garbage]\n", "binary": b"\xff\xfe\x00\x01\n",
        "half": b'{"request": "', "huge": b"x" * 20 * MIB, "empty": b"\n",
        "another's": b'{"request": "another", "content": {"measurements": [], "uses": []}}\n',
    }  # fmt: skip
    if fault in lines:
        os.write(replies, lines[fault])
    if fault == "half":
        os._exit(0)


def main() -> None:
    number, replies = int(sys.argv[1]), 3
    os.set_inheritable(replies, False)
    for line in sys.stdin:
        data = json.loads(line)
        task = data["content"]
        if task is None:  # the question whether it has started
            os.write(replies, line.encode())
            continue
        final = task["kind"] == "compare"
        for config in task["configs"]:
            spoil(config, number, replies)
        found = [measured(config, number, final) for config in task["configs"]]
        content = {"measurements": found, "uses": [], "fatal": False}
        answer = json.dumps({"request": data["request"], "content": content}) + "\n"
        os.write(replies, answer.encode())


if __name__ == "__main__":
    main()
