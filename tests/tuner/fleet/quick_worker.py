"""A worker that starts at once and measures honestly: 40 to 50 us, by a config's knobs.

python quick_worker.py FACTOR LOG < tasks 3> replies      # times are FACTOR times that
python -m quick_worker TOKEN < tasks 3> replies           # the same without factor and log

LOG gets a line for each task: this process, the task's kind, and how many configs it was about.
"""

import hashlib
import json
import os
import sys
import time
from typing import Any


def time_of(config: dict[str, Any]) -> float:
    drawn = int(hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(), 16)
    return 40 + drawn % 1000 / 100


def main() -> None:
    factor, log = (float(sys.argv[1]), sys.argv[2]) if sys.argv[2:] else (1.0, os.devnull)
    os.set_inheritable(3, False)
    for line in sys.stdin:
        data = json.loads(line)
        task = data["content"]
        if task is None:  # the question whether it has started
            os.write(3, line.encode())
            continue
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {task['kind']} {len(task['configs'])}\n")
        time.sleep(0.05)
        policy = "final-behind" if task["kind"] == "compare" else "search-behind"
        found = [
            {
                "outcome": "ok", "median_us": factor * time_of(config), "spread_us": 0.1,
                "samples": 10, "error": "", "policy": policy, "joules": None,
            }
            for config in task["configs"]
        ]  # fmt: skip
        if task["kind"] == "compile":
            found = []
        content = {"measurements": found, "uses": [], "fatal": False}
        answer = json.dumps({"request": data["request"], "content": content}) + "\n"
        os.write(3, answer.encode())


if __name__ == "__main__":
    main()
