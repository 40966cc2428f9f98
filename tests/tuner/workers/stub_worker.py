"""A worker that starts at once: it knows the lines of task.py alone, and a task's seed says what
it does. A reply's time is the number of the process that wrote it."""

import json
import os
import signal
import subprocess
import sys
import time

ANSWER, FATAL, EXIT, SEGFAULT, HANG, IN_PIECES, SPAWN, HALF, LATE = range(9)


def main() -> None:
    for line in sys.stdin:
        seed, time_us = json.loads(line)["seed"], os.getpid()
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
        measurement = {"outcome": "ok", "median_us": time_us}
        reply = {"measurements": [measurement], "uses": [], "fatal": seed == FATAL}
        text = json.dumps(reply) + "\n"
        if seed == HALF:
            sys.stdout.write(text[:20])
            sys.stdout.flush()
            os._exit(0)
        if seed == IN_PIECES:
            for character in text[:-1]:
                sys.stdout.write(character)
                sys.stdout.flush()
            time.sleep(0.1)
            text = text[-1]
        sys.stdout.write(text)
        sys.stdout.flush()
        if seed == FATAL:
            return


if __name__ == "__main__":
    main()
