"""Search a device's kernels for one shape, and export the results as a table.

python examples/tune_and_export.py

The device is a Jetson that is not here: kernels are cross-compiled and their times predicted. On
your own GPU, name it or leave --device out, and times are measured. The shape is a toy, and the
search is short. For your own model give --model DIR, and leave --trials and --db out.
"""

import tempfile
from pathlib import Path

from flashtune.tuner.cli.main import cli

SHAPE = "vocab=4096,hidden=64,clusters=256,probes=16"


def flashtune(command: str) -> None:
    """Run a command, as a terminal would."""
    cli(command.split(), standalone_mode=False)


with tempfile.TemporaryDirectory() as folder:
    database, table = Path(folder, "tuning.db"), Path(folder, "orin-nano-super.json")
    flashtune(f"search --device orin --shape {SHAPE} --trials 3 --db {database}")
    flashtune(f"best --device orin --shape {SHAPE} --db {database}")
    flashtune(f"tables export --device orin --db {database} --out {table}")
    flashtune(f"tables check {table}")
