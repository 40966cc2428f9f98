"""NVIDIA GPUs: the plans in Triton, and one in CUDA C++."""

import os
import shutil
import sysconfig
from contextlib import closing
from pathlib import Path

import torch

from flashtune.kernels.backends.backend import Backend
from flashtune.kernels.backends.cuda import nvrtc
from flashtune.kernels.backends.nvidia.gpu import describe, toolchain
from flashtune.kernels.backends.nvidia.jetson import why_unused
from flashtune.kernels.backends.nvidia.power import conditions, energy_counter
from flashtune.kernels.backends.nvidia.step import index_of
from flashtune.kernels.backends.target import Target
from flashtune.kernels.measure.probe import probe
from flashtune.kernels.measure.timing import BehindTimer
from flashtune.kernels.plans import BATCHED, DENSE, PERSISTENT, STAGED, STREAMED, batched, staged
from flashtune.kernels.plans.candidate import Candidate, Plan, why_broken
from flashtune.kernels.plans.knob import Config
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.package import why_unusable
from flashtune.tuning_db.probe import Figures
from flashtune.tuning_db.problem import Problem

BATCHED_FROM = 8  # tokens: with fewer, the plan for one token was as fast on an H200


def _default(problem: Problem, device: Device) -> Config:
    config = batched.default(problem)
    broken = why_broken(BATCHED.rules, Candidate(problem, config, device))
    if problem.n_tokens >= BATCHED_FROM and not broken:
        return config
    return staged.default(problem, device)


def _here() -> Device | None:
    return describe(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def _trouble() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip:
        return why_unused() or f"torch {torch.__version__} finds no NVIDIA GPU there"
    return why_unusable("triton") or _why_no_launchers()


def _why_no_launchers() -> str | None:
    """Why Triton cannot build the code that launches its kernels; None if it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler, which Triton needs: install gcc there"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no Python.h, which Triton needs: install python3-dev there"
    return None


def _why_missing(plan: Plan) -> str | None:
    missing = nvrtc.why_missing() if plan.builder == "cuda" else None
    return f"plan {plan.name} needs {missing}" if missing else None


def _probe(device: Device, where: torch.device) -> Figures:
    from flashtune.kernels.backends.nvidia.probe import Gauge

    with closing(Gauge(device, where, NVIDIA.lanes)) as gauge:
        return probe(gauge)


def _triton() -> Backend:
    from flashtune.kernels.backends.triton.backend import TritonBackend

    return TritonBackend()


def _cuda() -> Backend:
    from flashtune.kernels.backends.cuda.backend import CudaBackend

    return CudaBackend()


NVIDIA = Target(
    name="nvidia",
    lanes=32,
    plans=(STAGED, PERSISTENT, BATCHED, DENSE, STREAMED),
    starts=(STREAMED, STAGED, PERSISTENT, BATCHED, DENSE),
    builders={"triton": _triton, "cuda": _cuda},
    torch_device="cuda",
    default=_default,
    baseline=staged.baseline,
    timer=BehindTimer,
    times_behind=True,
    describe=describe,
    here=_here,
    described=_here,
    named=lambda name: None,
    toolchain=toolchain,
    trouble=_trouble,
    unused=why_unused,
    why_missing=_why_missing,
    times_alone=False,
    registered=True,
    compiles_elsewhere=True,
    bandwidth_sources=lambda device: (),
    probe=_probe,
    conditions=lambda where: conditions(index_of(where)),
    energy=lambda where: energy_counter(index_of(where)),
)
