"""How much faster a search ends with two GPUs of this machine than with one.

    python benchmarks/fleet_gpus.py                    # prints JSON; minutes
    python benchmarks/fleet_gpus.py --gpus 4 --trials 300 --shape qwen3-vl-2b

Each search begins with its own empty database and caches. A search of a few configs comes first
and does not count: it makes the machine load its libraries.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

PROGRAM = "from flashtune.tuner.cli.main import cli; cli(prog_name='flashtune')"


def search(gpus: int, shapes: Sequence[str], trials: int) -> dict[str, Any]:
    """The seconds that a search with the first `gpus` GPUs takes, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["search", "--gpus", ",".join(map(str, range(gpus))), "--json"]
        words += ["--trials", str(trials), "--db", str(Path(folder, "tuning.db"))]
        words += [word for shape in shapes for word in ("--shape", shape)]
        caches = {
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
            "FLASHTUNE_CACHE": str(Path(folder, "flashtune")),
        }
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            env={**os.environ, **caches},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"flashtune {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    found = json.loads(done.stdout)
    return {
        "gpus": gpus,
        "device": found["device"],
        "seconds": round(seconds, 1),
        "evaluated": [each["evaluated"] for each in found["results"]],
        "failed": [each["failed"] for each in found["results"]],
        "winners_us": [each["winner"]["measurement"]["median_us"] for each in found["results"]],
        "said": [line for line in done.stderr.splitlines() if " trials, " not in line],
    }


@click.command()
@click.option("--gpus", default=2, show_default=True, help="Of the second search.")
@click.option("--shape", "shapes", multiple=True, default=("qwen3-vl-2b", "gemma-3-1b"))
@click.option("--trials", default=150, show_default=True)
def main(gpus: int, shapes: Sequence[str], trials: int) -> None:
    """Search with one GPU and with several."""
    search(gpus, shapes[:1], 4)
    runs = [search(count, shapes, trials) for count in (1, gpus)]
    ratio = round(runs[0]["seconds"] / runs[1]["seconds"], 2)
    print(json.dumps({"shapes": shapes, "trials": trials, "ratio": ratio, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
