"""Devices described by their drivers' properties, and the toolchain."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.cpp.compiler import compiler_version
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.backends.nvidia.gpu import describe_gpu
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError


def properties(name: str, major: int, minor: int, sm_count: int, **more: Any) -> SimpleNamespace:
    values = {"L2_cache_size": 2**21, "is_integrated": 0, "total_memory": 8 * 2**30, **more}
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=sm_count, **values
    )


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (properties("NVIDIA H200", 9, 0, 132), "nvidia-h200"),
        (properties("Orin", 8, 7, 8, is_integrated=1), "orin-nano-super"),
        (properties("Orin", 8, 7, 8, is_integrated=1, total_memory=2**34), "orin-nx"),
        (properties("Orin", 8, 7, 16, is_integrated=1), "agx-orin"),
        (properties("NVIDIA Thor", 11, 0, 20, is_integrated=1), "agx-thor"),
        (properties("NVIDIA H200", 9, 0, 60), "nvidia-h200-60sm"),
        (properties("Orin", 8, 7, 14, is_integrated=1), "orin-14sm"),
    ],
)
def test_a_gpu_is_known_by_name_and_multiprocessors(found: Any, name: str) -> None:
    assert describe_gpu(found).name == name


def test_an_unregistered_gpu_is_described_by_its_driver() -> None:
    device = describe_gpu(
        properties(
            "NVIDIA GeForce RTX 3060",
            8,
            6,
            28,
            memory_clock_rate=7_501_000,
            memory_bus_width=192,
            clock_rate=1_777_000,
        )
    )
    assert (device.name, device.arch, device.sm_count) == (
        "nvidia-geforce-rtx-3060-28sm",
        "sm_86",
        28,
    )
    assert device.memory_bandwidth == pytest.approx(360e9, rel=0.01)
    assert device.clock_hz == 1.777e9


def test_an_unknown_architecture_has_the_limits_of_the_nearest_lower_one() -> None:
    later = describe_gpu(properties("NVIDIA B300", 10, 3, 148))
    assert later.limits == describe_gpu(properties("NVIDIA B200", 10, 0, 148)).limits
    earlier = describe_gpu(properties("Tesla T4", 7, 5, 40))
    assert earlier.memory_bandwidth == 0
    with pytest.raises(FlashtuneError, match="no kernels for sm_75"):
        _ = earlier.limits


def test_the_toolchain_names_this_torch() -> None:
    found = toolchain(find_device("h200"))
    assert found.torch == torch.__version__
    assert found.triton.startswith("3.")
    assert found.compiler == ""


def test_the_toolchain_of_a_cpu_is_its_compiler() -> None:
    tools = toolchain(this_cpu())
    assert tools == Toolchain(compiler=compiler_version())
    assert any(character.isdigit() for character in tools.compiler)
