"""A worker that starts at once: it knows the lines of message.py alone, and a task's seed says
what it does. A reply's time is the number of the process that wrote it."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import TextIO

ANSWER, FATAL, EXIT, SEGFAULT, HANG, IN_PIECES, SPAWN, HALF, LATE = range(9)
GARBAGE, ANOTHERS, HUGE, ENDLESS, MORE, NO_TIME, FLOOD, ESCAPE, DEAF, TROUBLE = range(9, 19)
MIB = 2**20


def speak(seed: int, replies: TextIO) -> None:
    """What no worker of ours says."""
    if seed == GARBAGE:
        replies.write("Segmentation fault? no, {garbage]\n")
    if seed == ANOTHERS:
        replies.write(json.dumps({"request": "another", "content": {}}) + "\n")
    if seed == HUGE:
        replies.write("x" * 20 * MIB + "\n")
    while seed == ENDLESS:
        replies.write("x" * MIB)
    if seed == FLOOD:
        for _ in range(300):
            os.write(2, b"x" * MIB)
        os.write(2, b"\n\x1b[2Jlast words\n")
        os._exit(7)
    replies.flush()


def escape() -> int:
    """A process of another group and session, whose parent is gone."""
    report, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, b"%d" % os.getpid())
            time.sleep(600)
        os._exit(0)
    return int(os.read(report, 20))


def main() -> None:
    os.set_inheritable(3, False)
    replies = os.fdopen(3, "w")
    for line in sys.stdin:
        data = json.loads(line)
        if data["content"] is None:  # the question whether it has started
            replies.write(line)
            replies.flush()
            continue
        seed, time_us = data["content"]["seed"], os.getpid()
        if seed in (EXIT, SEGFAULT):
            print("first words\nlast words", file=sys.stderr, flush=True)
        if seed == EXIT:
            os._exit(7)
        if seed == SEGFAULT:
            os.kill(os.getpid(), signal.SIGSEGV)
        if seed == HANG:
            time.sleep(600)
        if seed == LATE:
            time.sleep(2.0)
        if seed == DEAF:
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(each, signal.SIG_IGN)
            print(escape(), file=sys.stderr, flush=True)
            time.sleep(600)
        if seed == ESCAPE:
            time_us = escape()
        speak(seed, replies)
        if seed == SPAWN:
            time_us = subprocess.Popen(["sleep", "600"]).pid
        measurement = {
            "outcome": "ok", "median_us": 0 if seed == NO_TIME else time_us, "spread_us": 0.5,
            "samples": 2, "error": "", "policy": "search-behind", "joules": None,
        }  # fmt: skip
        if seed == TROUBLE:
            measurement |= {
                "outcome": "environment", "median_us": None, "spread_us": None, "samples": 0,
                "error": "no space left on device",
            }  # fmt: skip
        content = {"measurements": [measurement], "uses": [], "fatal": seed == FATAL}
        text = json.dumps({"request": data["request"], "content": content}) + "\n"
        if seed == HALF:
            replies.write(text[:20])
            replies.flush()
            os._exit(0)
        if seed == IN_PIECES:
            for character in text[:-1]:
                replies.write(character)
                replies.flush()
            time.sleep(0.1)
            text = text[-1]
        replies.write(text)
        if seed == MORE:
            replies.write("and more\n")
        replies.flush()
        if seed == FATAL:
            return


if __name__ == "__main__":
    main()
