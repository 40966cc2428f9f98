"""How much memory is left: of the machine, of control groups, of a GPU as the driver tells."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.cuda.backend import CudaScratch
from flashtune.kernels.backends.target import default_config, known_good
from flashtune.kernels.backends.triton.backend import load_source, scratch_of
from flashtune.kernels.measure import memory
from flashtune.kernels.measure.memory import free_bytes, scratch_bytes
from flashtune.kernels.plans.candidate import Candidate
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.problem import parse_shape

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 1000 kB available, and no limits yet."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    (tmp_path / "cgroup").write_text("")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return tmp_path


def limit(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text + "\n")


def test_without_limits_it_is_what_the_machine_has(system: Path) -> None:
    assert free_bytes(CPU) == 1000 * 1024
    (system / "cgroup").write_text("0::/a\n5:cpu:/b\n")
    limit(system / "a", max="max", current="999")
    limit(system / "cpu" / "b", max="1", current="1")  # not of memory
    assert free_bytes(CPU) == 1000 * 1024


def test_the_tightest_group_counts_and_page_cache_is_free(system: Path) -> None:
    (system / "cgroup").write_text("0::/a/b\n")
    limit(system / "a", max="5000", current="4000")
    limit(system / "a" / "b", max="4000", current="3900", stat="anon 1\ninactive_file 700")
    assert free_bytes(CPU) == 800
    limit(system / "a", max="4100", current="4000")
    assert free_bytes(CPU) == 100


def test_groups_of_version_1(system: Path) -> None:
    (system / "cgroup").write_text("4:memory:/box\n0::/\n")
    limit(system / "memory" / "box", limit_in_bytes="3000", usage_in_bytes="1000")
    assert free_bytes(CPU) == 2000


def test_a_system_that_tells_nothing_has_no_room(system: Path) -> None:
    (system / "meminfo").unlink()
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize(("integrated", "expected"), [(False, 800 + 30), (True, 1000 * 1024 + 30)])
def test_of_a_gpu_torchs_own_reserve_counts_as_free_and_a_shared_memory_as_the_machines(
    system: Path, monkeypatch: pytest.MonkeyPatch, integrated: bool, expected: int
) -> None:
    for name, value in (
        ("mem_get_info", (800, 10**9)),
        ("memory_reserved", 50),
        ("memory_allocated", 20),
        ("get_device_properties", SimpleNamespace(is_integrated=integrated)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_bytes(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    "shape",
    [
        "qwen3-vl-2b",
        "gemma-3-1b,probes=512,tokens=32",
        "gemma-3-270m,probes=512,tokens=32,epilogue=logits",
        "qwen3-vl-2b,weight=int8,rescored=8",
        "gemma-3-1b,weight=int4,rescored=32,tokens=8",
    ],
)
def test_no_plans_scratch_takes_more_than_is_said(shape: str) -> None:
    problem, device, meta = parse_shape(shape), find_device("h100"), torch.device("meta")
    taken = {}
    for config in [default_config(problem, device), *known_good(problem, device)]:
        candidate = Candidate(problem, config, device)
        if candidate.why_invalid() is not None:
            continue
        if candidate.plan.builder == "cuda":
            blocks = candidate.launches[0].programs
            scratch: Any = CudaScratch.create(problem, blocks, meta)
        else:
            scratch = scratch_of(problem, load_source(candidate.source), meta)
        tensors = [getattr(scratch, each.name) for each in fields(scratch)]
        taken[candidate.plan.name] = sum(each.nbytes for each in tensors if each is not None)
    assert len(taken) > 1
    assert max(taken.values()) <= scratch_bytes(problem)
