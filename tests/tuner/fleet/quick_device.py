"""Says at once that this machine has an H200: what a Ray node is asked in tests."""

import json
import os
import sys
from importlib import resources

DEVICES = resources.files("flashtune.tuning_db").joinpath("devices.json")
TOOLS = {"triton": "3.6.0", "torch": "", "driver": "", "compiler": ""}


def main() -> None:
    h200 = next(
        each
        for each in json.loads(DEVICES.read_text())["devices"]
        if each["name"] == "nvidia-h200"
    )
    device = {"aliases": [], "reported_names": [], **h200}
    found = {"trouble": "", "device": device, "toolchain": TOOLS}
    for line in sys.stdin:
        request = json.loads(line)["request"]
        content = {"trouble": "", "devices": {"nvidia": found}}
        answer = json.dumps({"request": request, "content": content}) + "\n"
        os.write(3, answer.encode())


if __name__ == "__main__":
    main()
