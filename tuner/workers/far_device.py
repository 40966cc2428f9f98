"""What a machine can be tuned for: run there, it prints its devices as a line of JSON.

Usage:
    python -m flashtune.tuner.workers.far_device

`trouble` says why nothing can be tuned there; else `gpu` and `cpu` each have their own `trouble`,
or a `device` with its `toolchain`. For each line with what `read_sources` renders for the CPU it
then prints the bandwidth of its memory in bytes/s.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Any

LEAST = {"torch": (2, 8), "triton": (3, 6)}


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
    """The machine's devices, or the first thing that is missing for each."""
    trouble = why_unusable("torch")
    if trouble:
        return {"trouble": trouble}
    return {"trouble": None, "gpu": _gpu(), "cpu": _cpu()}


def why_unusable(package: str) -> str | None:
    """None when the package loads and is new enough, else a line that says what to install."""
    least = ".".join(map(str, LEAST[package]))
    cure = f"install {package} {least} or later for {sys.executable}"
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError) as error:
        return f"{package} does not load there ({' '.join(str(error).split())}): {cure}"
    found = re.match(r"(\d+)\.(\d+)", module.__version__)
    if found is None or (int(found[1]), int(found[2])) < LEAST[package]:
        return f"{package} there is {module.__version__}: {cure}"
    return None


def _gpu() -> dict[str, Any]:
    import torch

    from flashtune.kernels.backends.host import device_of, toolchain

    if not torch.cuda.is_available() or torch.version.hip:
        return {"trouble": f"torch {torch.__version__} finds no NVIDIA GPU there"}
    trouble = why_unusable("triton") or _why_no_launchers()
    if trouble:
        return {"trouble": trouble}
    device = device_of(torch.device("cuda", 0))
    assert device
    return {"trouble": None, "device": asdict(device), "toolchain": asdict(toolchain(device))}


def _why_no_launchers() -> str | None:
    """Why Triton could not build the code that launches its kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler, which Triton needs: install gcc there"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no Python.h, which Triton needs: install python3-dev there"
    return None


def _cpu() -> dict[str, Any]:
    from flashtune.kernels.backends.cpp.this_cpu import describe_cpu
    from flashtune.kernels.backends.host import toolchain

    device = describe_cpu()
    found = toolchain(device)
    if not found.compiler:
        return {"trouble": "there is no C++ compiler: install g++ there, or set CXX"}
    return {"trouble": None, "device": asdict(device), "toolchain": asdict(found)}


if __name__ == "__main__":
    main()
