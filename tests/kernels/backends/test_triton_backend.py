"""Compiling candidates for architectures that are not here, and what goes wrong with that."""

import inspect
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError

from flashtune.kernels.backends.triton import backend as triton_backend
from flashtune.kernels.backends.triton.backend import (
    Scratch,
    TritonBackend,
    compile_module,
    load_source,
)
from flashtune.kernels.measure.failure import DoesNotFitError
from flashtune.kernels.plans import candidate as candidates
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.problem import EPILOGUES, Problem

PROBLEM = Problem(vocab_size=1536, hidden_size=320, n_clusters=128, n_probes=8)
CONFIGS: dict[str, Config] = {
    "torch_topk": StagedConfig(selection="torch_topk", score_block=128, gather_block=128),
    "threshold": StagedConfig(score_block=256, gather_block=512),
    "in_gather": StagedConfig(selection="in_gather", score_block=512, gather_block=64),
    "persistent": PersistentConfig(score_block=128, gather_block=128),
}
KERNELS = {
    "torch_topk": ["score", "gather"],
    "threshold": ["score", "select", "gather"],
    "in_gather": ["score", "gather"],
    "persistent": ["decode"],
}
ORIN, H200, RTX_5090 = (find_device(name) for name in ("orin", "h200", "rtx-5090"))


@pytest.fixture(autouse=True)
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def load(config: Config, device: Device = ORIN) -> ModuleType:
    return load_source(Candidate(PROBLEM, config, device).source)


@pytest.mark.parametrize("device", [ORIN, H200, RTX_5090], ids=lambda device: device.arch)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_each_plan_compiles_without_a_gpu(name: str, device: Device, epilogue: str) -> None:
    config = CONFIGS[name]
    uses = TritonBackend().compile(Candidate(replace(PROBLEM, epilogue=epilogue), config, device))
    assert [use.kernel for use in uses] == KERNELS[name]
    for use in uses:
        assert 16 <= use.registers <= 255
        assert use.programs >= 1
        assert use.warps in (config.warps,) if name == "persistent" else (4, 16)
        assert 0 <= use.shared_bytes <= device.limits.shared_per_block
        assert use.spilled == 0


DIGITS = StagedConfig(
    widen="digits",
    score_rows=64,
    score_block=256,
    score_stages=3,
    gather_rows=32,
    gather_block=256,
    gather_warps=2,
    gather_stages=3,
)


@pytest.mark.parametrize("device", [ORIN, H200, RTX_5090], ids=lambda device: device.arch)
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (StagedConfig(score_block=256, gather_block=512), {"weight_dtype": "int8"}),
        (StagedConfig(score_block=256, gather_block=512), {"weight_dtype": "int4"}),
        (BatchedConfig(), {"weight_dtype": "int8", "n_tokens": 8, "centroid_dtype": "int8"}),
        (BatchedConfig(), {"weight_dtype": "int4", "n_tokens": 8, "epilogue": "logits"}),
        (DenseConfig(), {"weight_dtype": "int8", "n_tokens": 8}),
        (StagedConfig(score_block=256, gather_block=512, widen="bits"), {"weight_dtype": "int8"}),
        (BatchedConfig(widen="bits", visit="listed"), {"weight_dtype": "int8", "n_tokens": 8}),
        (DIGITS, {"weight_dtype": "int8", "centroid_dtype": "int8"}),
        (DIGITS, {"weight_dtype": "int4", "centroid_dtype": "int4"}),
        (
            BatchedConfig(widen="digits", visit="listed", gather_rows=32, gather_warps=2),
            {"weight_dtype": "int8", "centroid_dtype": "int8", "n_tokens": 8},
        ),
        (
            DenseConfig(widen="digits", gather_rows=32, gather_block=64, gather_warps=2),
            {"weight_dtype": "int4", "centroid_dtype": "int4", "n_tokens": 4},
        ),
    ],
    ids=[
        *["staged-int8", "staged-int4", "batched-int8", "batched-int4", "dense-int8"],
        *["staged-int8-bits", "batched-int8-bits-listed"],
        *["staged-int8-digits", "staged-int4-digits"],
        *["batched-int8-digits", "dense-int4-digits"],
    ],
)
def test_quantised_rows_compile_without_spills(
    config: Config, changes: dict[str, Any], device: Device
) -> None:
    problem = replace(PROBLEM, model_dtype="bf16", n_rescored=8, n_pinned=2, **changes)
    candidate = Candidate(problem, config, device)
    uses = TritonBackend().compile(candidate)
    assert [use.kernel for use in uses] == [launch.kernel for launch in candidate.launches]
    assert [use.programs for use in uses] == [launch.programs for launch in candidate.launches]
    assert all(use.spilled == 0 for use in uses)


@pytest.mark.parametrize("device", [ORIN, H200, RTX_5090], ids=lambda device: device.arch)
def test_digits_are_multiplied_by_rows_as_they_are(device: Device) -> None:
    """On tensor cores of integers, by rows that copies bring to shared memory."""
    problem = replace(PROBLEM, weight_dtype="int8", centroid_dtype="int8", model_dtype="bf16")
    candidate = Candidate(problem, DIGITS, device)
    kernels = compile_module(load_source(candidate.source), candidate)
    for name in ("score", "gather"):
        ptx = kernels[name].asm["ptx"]
        assert "mma.sync.aligned.m16n8k32.row.col" in ptx
        assert "cp.async.cg.shared.global" in ptx
        assert "cvt.rn.f32.s8" not in ptx and "cvt.rn.f32.s16" not in ptx


def test_source_from_elsewhere_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["in_gather"]
    source = Candidate(PROBLEM, config, ORIN).source
    monkeypatch.setattr(candidates, "render", None)  # as where there are no templates
    candidate, place = Candidate(PROBLEM, config, ORIN), torch.device("cuda")
    assert callable(TritonBackend().loader(candidate, place, source))
    with pytest.raises(SyntaxError):
        TritonBackend().loader(candidate, place, "def step(:")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_leave_in_the_weights_dtype_rounded_to_nearest(name: str) -> None:
    problem = replace(PROBLEM, epilogue="logits")
    module = load_source(Candidate(problem, CONFIGS[name], H200).source)
    kernels = compile_module(module, Candidate(problem, CONFIGS[name], H200))
    last = kernels[module.LAUNCHES[-1]["kernel"]].asm["ptx"]
    assert "cvt.rn.bf16" in last
    assert "atom" not in last or name == "persistent"  # its barrier


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pdl", [False, True])
def test_launch_attributes_reach_the_binary(name: str, pdl: bool) -> None:
    config = replace(CONFIGS[name], pdl=pdl)
    kernels = compile_module(load(config, H200), Candidate(PROBLEM, config, H200))
    for kernel in kernels.values():
        assert kernel.metadata.launch_pdl is pdl
        assert kernel.metadata.launch_cooperative_grid is (name == "persistent")
        assert ("griddepcontrol.wait" in kernel.asm["ptx"]) is pdl
        assert ("griddepcontrol.launch_dependents" in kernel.asm["ptx"]) is pdl


@pytest.mark.parametrize("name", ["in_gather", "persistent"])
def test_prefetch_compiles_to_bulk_prefetches(name: str) -> None:
    for margin in (-1, 5):
        config = replace(CONFIGS[name], prefetch_margin=margin)
        kernels = compile_module(load(config, H200), Candidate(PROBLEM, config, H200))
        asm = kernels[KERNELS[name][-1]].asm["ptx"]
        assert ("cp.async.bulk.prefetch.L2" in asm) is (margin >= 0)


def test_the_eviction_hint_reaches_the_loads_of_weights() -> None:
    for evict in ("evict_first", "no_hint"):
        config = replace(CONFIGS["threshold"], evict=evict)
        asm = compile_module(load(config), Candidate(PROBLEM, config, ORIN))["gather"].asm["ptx"]
        assert ("L1::evict_first" in asm) is (evict == "evict_first")


def test_a_source_that_is_not_python_raises() -> None:
    with pytest.raises(SyntaxError):
        load_source("def broken(:\n")


def test_a_kernel_that_triton_refuses_raises_what_can_be_caught() -> None:
    source = Candidate(PROBLEM, CONFIGS["threshold"], ORIN).source
    module = load_source(source.replace("tl.cumsum(in_lane, axis=0)", "tl.no_such_scan(in_lane)"))
    with pytest.raises(CompilationError, match="no_such_scan"):
        compile_module(module, Candidate(PROBLEM, StagedConfig(), ORIN))
    assert issubclass(CompilationError, Exception)


def test_a_kernel_that_needs_more_than_the_device_has_is_an_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use = KernelUse(
        kernel="score", programs=1, warps=4, registers=32, shared_bytes=2**20, spilled=0
    )
    monkeypatch.setattr(triton_backend, "_read_use", lambda *_: use)
    with pytest.raises(DoesNotFitError, match="score needs 1048576 bytes of shared memory"):
        TritonBackend().compile(Candidate(PROBLEM, CONFIGS["torch_topk"], ORIN))


def test_a_loaded_module_can_show_its_source() -> None:
    source = Candidate(PROBLEM, CONFIGS["threshold"], ORIN).source
    module = load_source(source)
    assert inspect.getsource(module.score.fn) in source
    assert load_source(source).__name__ == module.__name__
    assert load_source(source + "\n").__name__ != module.__name__


def test_scratch_starts_as_a_step_leaves_it() -> None:
    problem = replace(PROBLEM, n_tokens=3)
    scratch = Scratch.create(problem, library_topk=False, device=torch.device("cpu"))
    assert scratch.scores.shape == scratch.selected.shape == (3, 128)
    assert scratch.state.tolist() == [-(2**63)] * 3 + [0] * 7
    for_topk = Scratch.create(problem, library_topk=True, device=torch.device("cpu"))
    assert (for_topk.selected.shape, for_topk.selected.dtype) == ((3, 8), torch.int64)
