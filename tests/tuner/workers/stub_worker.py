"""A worker that starts at once: it knows the lines of message.py alone, and a task's seed says
what it does. A reply's time is the number of the process that wrote it."""

import json
import os
import signal
import subprocess
import sys
import time

ANSWER, FATAL, EXIT, SEGFAULT, HANG, IN_PIECES, SPAWN, HALF, LATE = range(9)


def main() -> None:
    os.set_inheritable(3, False)
    replies = os.fdopen(3, "w")
    for line in sys.stdin:
        data = json.loads(line)
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
        if seed == SPAWN:
            time_us = subprocess.Popen(["sleep", "600"]).pid
        measurement = {
            "outcome": "ok", "median_us": time_us, "spread_us": 0.5, "samples": 2, "error": "",
            "policy": "search",
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
        replies.flush()
        if seed == FATAL:
            return


if __name__ == "__main__":
    main()
