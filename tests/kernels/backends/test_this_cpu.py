"""What is known of a CPU, from what systems say of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from flashtune.kernels.backends.cpp import this_cpu as module
from flashtune.kernels.backends.cpp.this_cpu import (
    cpu_arch,
    cpu_quota,
    cpu_title,
    describe_cpu,
    last_cache_bytes,
    this_cpu,
    usable_cores,
)
from flashtune.kernels.backends.host import named_device
from flashtune.kernels.plans.parts.simd import simd_levels
from flashtune.tuning_db.errors import FlashtuneError

AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "arch"),
    [
        ("x86_64", "flags\t: sse2 fpu", "x86_64-scalar"),
        ("x86_64", f"flags\t: fpu {AVX2}", "x86_64-avx2"),
        ("x86_64", "flags\t: avx2 fma", "x86_64-scalar"),
        ("x86_64", f"flags\t: {AVX512}", "x86_64-avx512"),
        ("x86_64", f"flags\t: {AVX512} avx512_vnni", "x86_64-avx512_vnni"),
        ("x86_64", f"flags\t: {AVX512} avx512_vnni avx512_bf16", "x86_64-avx512_bf16"),
        ("x86_64", f"flags\t: {AVX512} avx512_bf16", "x86_64-avx512"),
        ("x86_64", f"flags\t: {AVX2} avx512f avx512_bf16", "x86_64-avx2"),
        ("aarch64", "Features\t: fp asimd", "aarch64-neon"),
        ("aarch64", "Features\t: fp asimd asimddp", "aarch64-neon_dot"),
        ("aarch64", "Features\t: fp asimd asimdhp asimddp bf16", "aarch64-neon_bf16"),
        ("aarch64", "Features\t: fp asimd asimdhp bf16", "aarch64-neon"),
        ("riscv64", "isa : rv64gc", "riscv64-scalar"),
        ("x86_64", "", "x86_64-scalar"),
    ],
)
def test_the_arch_names_the_best_instructions(machine: str, cpuinfo: str, arch: str) -> None:
    assert cpu_arch(machine, cpuinfo) == arch
    assert arch.endswith(simd_levels(arch)[-1])


def test_levels_below_the_best_are_there_as_well() -> None:
    assert simd_levels("x86_64-avx512") == ("scalar", "avx2", "avx512")
    assert simd_levels("aarch64-neon") == ("scalar", "neon")
    assert simd_levels("aarch64-avx2") == simd_levels("sm_90") == ("scalar",)


def test_the_title_is_the_models_else_the_boards() -> None:
    intel = "model name\t: Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz\n"
    assert cpu_title(intel * 2, "") == "Intel Xeon E5-2680 v4"
    assert cpu_title("Features\t: fp", "Raspberry Pi 5 Model B\0") == "Raspberry Pi 5 Model B"
    assert cpu_title("", "") != ""


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    assert last_cache_bytes(tmp_path) == 32 * 2**20
    for index, size in enumerate(("32K", "1024K", "odd", "8M\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert last_cache_bytes(tmp_path) == 8 * 2**20


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "-1"}, None),
        (
            "3:cpu,cpuacct:/x\n0::/",
            {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
    ],
)
def test_a_containers_quota_is_found(
    membership: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(membership, tmp_path) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, None, 8), (8, 2.9, 2), (2, 4.0, 2), (8, 0.5, 1)]
)
def test_cores_are_what_affinity_and_quota_leave(
    affinity: int, quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(module, "cpu_quota", lambda *_: quota)
    assert usable_cores() == cores
    assert describe_cpu().sm_count == cores


def test_cpu_is_a_name_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_bandwidth", lambda *_: 1e9)
    assert named_device("CPU") == this_cpu() == named_device(this_cpu().name)
    assert named_device("orin").vendor == "nvidia"
    with pytest.raises(FlashtuneError, match="unknown device"):
        named_device("gpu")


def test_the_bandwidth_is_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path))
    (tmp_path / "cpp").mkdir()
    measured = []

    def measure(device: Any, sources: Any) -> float:
        measured.append(device)
        return 2e10

    monkeypatch.setattr(module, "measure_bandwidth", measure)
    assert [module.known_bandwidth(describe_cpu()) for _ in range(2)] == [2e10, 2e10]
    assert len(measured) == 1
    (kept,) = (tmp_path / "cpp").glob("bandwidth-*.json")
    for broken in ("", "[]", json.dumps({"read_bytes_per_s": None})):
        kept.write_text(broken)
        assert module.known_bandwidth(describe_cpu()) == 2e10
    assert len(measured) == 4


def test_without_a_compiler_the_bandwidth_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module.known_bandwidth(describe_cpu()) == 0.0
