"""Generated source, as text: a change of a template shows as a change of these files.

`pytest --accept-golden` writes them.
"""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from flashtune.kernels.backends.target import baseline_config, default_config
from flashtune.kernels.backends.triton.backend import load_source
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.cpp_fused import CppFusedConfig
from flashtune.kernels.plans.cpp_staged import CppStagedConfig
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.problem import Problem, parse_shape

GOLDEN = Path(__file__).parents[1] / "golden"
ORIN, H200 = find_device("orin"), find_device("h200")
QWEN, GEMMA = parse_shape("qwen3-vl-2b"), parse_shape("gemma-3-1b")
ODD = Problem(vocab_size=384, hidden_size=33, n_clusters=32, n_probes=5, n_tokens=3)
HUGE = Problem(vocab_size=262144, hidden_size=8192, n_clusters=16384, n_probes=256)
X86 = Device(
    name="some-x86",
    title="Some x86",
    vendor="cpu",
    arch="x86_64-avx512_bf16",
    sm_count=4,
    memory_bandwidth=0.0,
    l2_bytes=2**25,
    clock_hz=0.0,
    source="nowhere",
)
ARM = replace(X86, name="some-arm", title="Some ARM", arch="aarch64-neon_bf16")
BATCH = replace(QWEN, n_tokens=8)
LOGITS = replace(QWEN, epilogue="logits")
FP16 = replace(QWEN, weight_dtype="fp16", centroid_dtype="fp16", n_tokens=2)
IN_PLACE = parse_shape("gemma-3-1b,rows=in_place")

INT8 = parse_shape("qwen3-vl-2b,weight=int8,rescored=8")
INT4 = parse_shape("gemma-3-1b,weight=int4,rescored=32,pinned=2,tokens=2,epilogue=logits")

LISTED = BatchedConfig(visit="listed", gather_rows=64, gather_warps=4)

CASES: dict[str, tuple[Problem, Config, Device]] = {
    "staged-torch_topk-orin": (QWEN, baseline_config(QWEN, ORIN), ORIN),
    "staged-threshold-orin": (QWEN, default_config(QWEN, ORIN), ORIN),
    "staged-threshold-pdl-looping": (
        QWEN,
        StagedConfig(score_programs_per_sm=4, score_stages=3, gather_unroll=2, pdl=True),
        H200,
    ),
    "staged-in_gather-orin": (QWEN, StagedConfig(selection="in_gather", gather_warps=16), ORIN),
    "staged-in_gather-prefetch-pdl": (
        QWEN,
        StagedConfig(selection="in_gather", gather_warps=16, prefetch_margin=5, pdl=True),
        H200,
    ),
    "staged-in_gather-odd": (
        ODD,
        StagedConfig(
            selection="in_gather", gather_rows=16, score_block=64, gather_block=64, evict="no_hint"
        ),
        ORIN,
    ),
    "staged-threshold-ragged": (GEMMA, default_config(GEMMA, ORIN), ORIN),
    "staged-threshold-int64": (HUGE, default_config(HUGE, H200), H200),
    "persistent-orin": (QWEN, PersistentConfig(), ORIN),
    "persistent-prefetch-pdl": (QWEN, PersistentConfig(prefetch_margin=0, pdl=True), H200),
    "persistent-odd": (ODD, PersistentConfig(score_block=64, gather_block=64), ORIN),
    "batched-orin": (BATCH, BatchedConfig(), ORIN),
    "batched-odd-pdl": (
        replace(ODD, n_tokens=17),
        BatchedConfig(score_block=32, gather_rows=32, gather_block=32, evict="no_hint", pdl=True),
        H200,
    ),
    "dense-pdl": (BATCH, DenseConfig(pdl=True), H200),
    "batched-logits": (replace(BATCH, epilogue="logits"), BatchedConfig(), H200),
    "dense-logits": (replace(BATCH, epilogue="logits"), DenseConfig(), H200),
    "staged-threshold-logits": (LOGITS, StagedConfig(pdl=True), H200),
    "staged-in_gather-logits-odd": (
        replace(ODD, epilogue="logits"),
        StagedConfig(selection="in_gather", score_block=64, gather_block=64),
        ORIN,
    ),
    "persistent-logits": (LOGITS, PersistentConfig(), ORIN),
    "staged-int8": (INT8, StagedConfig(pdl=True), H200),
    "staged-int4-pinned-logits": (INT4, default_config(INT4, ORIN), ORIN),
    "batched-int8": (replace(INT8, n_tokens=8), BatchedConfig(pdl=True), H200),
    "batched-listed-int8": (replace(INT8, n_tokens=8), LISTED, H200),
    "staged-int8-bits": (INT8, StagedConfig(widen="bits"), ORIN),
    "batched-int8-bits": (replace(INT8, n_tokens=8), BatchedConfig(widen="bits"), H200),
    "staged-int8-digits": (
        INT8,
        StagedConfig(
            widen="digits",
            score_rows=64,
            score_block=256,
            score_stages=3,
            gather_rows=32,
            gather_block=128,
            gather_warps=2,
        ),
        ORIN,
    ),
    "batched-int4-digits": (
        replace(INT4, epilogue="argmax"),
        BatchedConfig(widen="digits", visit="listed", gather_rows=32, gather_warps=2, pdl=True),
        H200,
    ),
    "batched-listed-odd": (ODD, replace(LISTED, score_block=32, gather_block=32), ORIN),
    "staged-in_place": (IN_PLACE, default_config(IN_PLACE, ORIN), ORIN),
    "cpp_fused-in_place": (IN_PLACE, default_config(IN_PLACE, X86), X86),
    "streamed-prefetch": (QWEN, StreamedConfig(), H200),
    "streamed-logits-ragged": (
        replace(GEMMA, epilogue="logits", weight_dtype="fp16"),
        StreamedConfig(gather_warps=8, prefetch=False, early=False),
        H200,
    ),
    "streamed-int8-pinned": (
        parse_shape("gemma-3-1b,weight=int8,centroids=int8,rescored=8,pinned=3"),
        StreamedConfig(),
        H200,
    ),
    "cpp_fused-logits-fp16": (
        replace(FP16, epilogue="logits"),
        CppFusedConfig(simd="avx2", threads=2),
        X86,
    ),
    "cpp_staged-logits": (LOGITS, baseline_config(LOGITS, X86), X86),
    "cpp_fused-x86": (QWEN, default_config(QWEN, X86), X86),
    "cpp_staged-x86": (QWEN, baseline_config(QWEN, X86), X86),
    "cpp_fused-arm": (QWEN, default_config(QWEN, ARM), ARM),
    "cpp_fused-histogram-odd": (
        ODD,
        CppFusedConfig(selection="histogram", score_prefetch=1, gather_rows=8),
        X86,
    ),
    "cpp_fused-int8": (INT8, default_config(INT8, X86), X86),
    "cpp_fused-int8-arm": (INT8, default_config(INT8, ARM), ARM),
    "cpp_staged-int4-logits": (INT4, CppStagedConfig(simd="avx2", threads=2), X86),
    "cpp_staged-int4-vnni": (INT4, CppStagedConfig(simd="avx512_vnni", threads=2), X86),
    "cpp_staged-int4-scalar": (INT4, CppStagedConfig(simd="scalar", threads=2), X86),
    "cpp_staged-fp16": (
        FP16,
        CppStagedConfig(simd="avx2", threads=2, score_rows=4, gather_columns=4, gather_unroll=2),
        X86,
    ),
}


def golden_path(name: str) -> Path:
    """Where a case's source is kept: Python, CUDA C++ or C++, as text."""
    _, config, device = CASES[name]
    language = "cpp" if device.vendor == "cpu" else "py"
    language = "cu" if isinstance(config, StreamedConfig) else language
    return GOLDEN / f"{name}.{language}.txt"


@pytest.mark.parametrize("name", CASES)
def test_generated_source_is_as_accepted(name: str, pytestconfig: pytest.Config) -> None:
    problem, config, device = CASES[name]
    path = golden_path(name)
    source = Candidate(problem, config, device).source
    if pytestconfig.getoption("--accept-golden"):
        path.write_text(source, "utf-8")
    assert path.exists(), f"no {path.name}: accept it with --accept-golden"
    assert source == path.read_text("utf-8"), f"{path.name} differs: see --accept-golden"


@pytest.mark.parametrize("name", [name for name in CASES if golden_path(name).match("*.py.txt")])
def test_accepted_source_parses_and_loads(name: str) -> None:
    source = golden_path(name).read_text("utf-8")
    ast.parse(source)
    module = load_source(source)
    kernels = [launch["kernel"] for launch in module.LAUNCHES]
    assert all(name == "torch_topk" or hasattr(module, name) for name in kernels)


def test_every_golden_file_has_a_case(pytestconfig: pytest.Config) -> None:
    orphans = set(GOLDEN.iterdir()) - {golden_path(name) for name in CASES}
    if pytestconfig.getoption("--accept-golden"):
        for path in orphans:
            path.unlink()
        orphans = set()
    assert not orphans
