"""CPUs: the plans in C++, compiled by the machine's own compiler."""

import torch

from flashtune.kernels.backends.backend import Backend
from flashtune.kernels.backends.cpp.compiler import compiler_version
from flashtune.kernels.backends.cpp.read_bandwidth import read_sources
from flashtune.kernels.backends.cpp.this_cpu import ALIAS, describe_cpu, fresh_bandwidth, this_cpu
from flashtune.kernels.backends.target import Target, no_energy
from flashtune.kernels.measure.timing import WallTimer
from flashtune.kernels.plans import CPP_FUSED, CPP_STAGED, cpp_fused, cpp_staged
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.probe import Figures


def _describe(device: torch.device) -> Device | None:
    return this_cpu() if device.type == "cpu" else None


def _named(name: str) -> Device | None:
    return this_cpu() if name in (ALIAS, describe_cpu().name) else None


def _trouble() -> str | None:
    if compiler_version():
        return None
    return "there is no C++ compiler: install g++ there, or set CXX"


def _probe(device: Device, where: torch.device) -> Figures | None:
    """How fast memory is read, measured now; nothing of a CPU's records is predicted by more."""
    return Figures(bandwidth=fresh_bandwidth(device) or None)


def _cpp() -> Backend:
    from flashtune.kernels.backends.cpp.backend import CppBackend

    return CppBackend()


CPU = Target(
    name="cpu",
    lanes=1,
    plans=(CPP_FUSED, CPP_STAGED),
    starts=(CPP_FUSED, CPP_STAGED),
    builders={"cpp": _cpp},
    torch_device="cpu",
    default=cpp_fused.default,
    baseline=cpp_staged.baseline,
    timer=WallTimer,
    times_behind=False,
    describe=_describe,
    here=this_cpu,
    described=describe_cpu,
    named=_named,
    toolchain=lambda: Toolchain(compiler=compiler_version()),
    trouble=_trouble,
    unused=lambda: None,
    why_missing=lambda plan: None,
    times_alone=True,
    registered=False,
    compiles_elsewhere=False,
    bandwidth_sources=read_sources,
    probe=_probe,
    conditions=lambda where: {},
    energy=no_energy,
)
