"""How long the probe before a device's first race takes, and what of it is spent on what.

    python benchmarks/probe_time.py [--json FILE]

In a process that has compiled nothing yet, with an empty cache: first a kernel that does nothing
is compiled, which starts Triton's compiler, as the kernels of any head do; then the probe's own
kernels are compiled and loaded; then they are measured. A second probe shows what is left once the
compiled kernels are kept.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
import torch

from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.nvidia.probe import Gauge
from flashtune.kernels.backends.nvidia.target import NVIDIA
from flashtune.kernels.backends.triton.backend import compile_kernel, load_source
from flashtune.kernels.measure.probe import probe

T = TypeVar("T")

NOTHING = """
import triton

@triton.jit
def nothing(state_ptr):
    pass
"""


def timed(seconds: dict[str, float], name: str, what: Callable[[], T]) -> T:
    """What it returns; its duration goes to `seconds`."""
    begun = time.perf_counter()
    found = what()
    seconds[name] = round(time.perf_counter() - begun, 3)
    return found


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(json_file: Path | None) -> None:
    """Time a first and a second probe of the GPU."""
    where = torch.device("cuda", 0)
    torch.zeros(1, device=where)
    device = device_of(where)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        first: dict[str, float] = {}
        timed(
            first,
            "start of Triton's compiler",
            lambda: compile_kernel(
                load_source(NOTHING).nothing,
                {"state_ptr": "*i32"},
                device.capability,
                NVIDIA.lanes,
                num_warps=1,
            ),
        )
        probes = [first, {}]
        for seconds in probes:
            gauge = timed(seconds, "kernels", lambda: Gauge(device, where, NVIDIA.lanes))
            with closing(gauge):
                figures = timed(seconds, "measuring", partial(probe, gauge))
            print(seconds, figures.describe(), flush=True)
    if json_file:
        found = {"device": device.name, "first": probes[0], "again": probes[1]}
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
