"""C++ kernels for ARM: cross-compiled here, and run by QEMU's user mode."""

import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.kernels.backends.states import wide

from flashtune.kernels.backends.cpp.compiler import FLAGS, SIMD_FLAGS
from flashtune.kernels.backends.cpp.this_cpu import describe_cpu
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.cpp_fused import CppFusedConfig
from flashtune.kernels.plans.parts.simd import useful_levels
from flashtune.kernels.weights import Weights
from flashtune.tuning_db.problem import Problem

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM = replace(describe_cpu(), name="some-arm", arch="aarch64-neon_bf16", sm_count=2)
PROBLEM = Problem(vocab_size=240, hidden_size=99, n_clusters=20, n_probes=4, epilogue="logits")
SCREENED = replace(PROBLEM, weight_dtype="int8", model_dtype="bf16", n_rescored=3)
PROBLEMS = {
    "plain": PROBLEM,
    "int8": replace(SCREENED, centroid_dtype="int8"),
    "int4": replace(SCREENED, weight_dtype="int4", centroid_dtype="int4"),
    "int4-int8-fp16": replace(SCREENED, centroid_dtype="int4", model_dtype="fp16", n_tokens=2),
    "int4-fp32": replace(SCREENED, weight_dtype="int4", model_dtype="fp32", hidden_size=64),
}
CASES = [
    (name, simd) for name, problem in PROBLEMS.items() for simd in useful_levels(problem, ARM)
]
# Reads one file an argument, runs the step, and writes what it left in the fifth.
MAIN = """
#include <cstdio>
#include <cstdlib>

static void* read(const char* path, size_t* size) {
    std::FILE* file = std::fopen(path, "rb");
    if (!file) return nullptr;
    std::fseek(file, 0, SEEK_END);
    *size = std::ftell(file);
    std::rewind(file);
    void* bytes = std::aligned_alloc(64, (*size + 63) / 64 * 64);
    if (std::fread(bytes, 1, *size, file) != *size) std::abort();
    std::fclose(file);
    return bytes;
}

int main(int count, char** paths) {
    void* given[9] = {};
    size_t size = 0, out_size = 0;
    for (int i = 1; i < count; ++i) given[i] = read(paths[i], i == 5 ? &out_size : &size);
    void* step = flashtune_open();
    flashtune_decode(step, given[1], given[2], given[3], given[4], given[5]%s);
    flashtune_close(step);
    std::FILE* out = std::fopen(paths[5], "wb");
    return std::fwrite(given[5], 1, out_size, out) != out_size || std::fclose(out);
}
"""
BESIDE = ", given[6], given[7], given[8]"

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="all other tests run these here"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"no {COMPILER} or no {EMULATOR}: install g++-aarch64-linux-gnu and qemu-user",
    ),
]


class EmulatedStep:
    """A candidate's step in a program of its own, for another processor."""

    def __init__(self, candidate: Candidate, folder: Path) -> None:
        self._folder, self._program = folder, folder / "decode"
        source, text = candidate.source, folder / "decode.cpp"
        quantised = "centroid_scales" in source
        text.write_text(source + MAIN % (BESIDE if quantised else ""))
        flags = [each for each in FLAGS if each not in ("-shared", "-fPIC")]
        flags += ["-static", *SIMD_FLAGS[candidate.config.simd]]
        subprocess.run([COMPILER, *flags, str(text), "-o", str(self._program)], check=True)

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        tensors = (
            weights.centroids, weights.weight, weights.ids, hidden, out,
            weights.centroid_scales, weights.weight_scales, weights.model_weight,
        )  # fmt: skip
        paths = [self._write(number, each) for number, each in enumerate(tensors)]
        subprocess.run([EMULATOR, "-cpu", "max", str(self._program), *paths], check=True)
        found = torch.frombuffer(bytearray(Path(paths[4]).read_bytes()), dtype=out.dtype)
        out.copy_(found.view(out.shape))

    def _write(self, number: int, tensor: torch.Tensor | None) -> str:
        path = self._folder / str(number)
        if tensor is not None:
            path.write_bytes(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()))
        return str(path)


@pytest.mark.parametrize(("name", "simd"), CASES)
def test_all_instructions_give_right_logits(name: str, simd: str, tmp_path: Path) -> None:
    problem = PROBLEMS[name]
    config = CppFusedConfig(simd=simd, threads=2, slack=0, score_columns=1, gather_columns=1)
    step = EmulatedStep(Candidate(problem, config, ARM), tmp_path)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=0)
    judged = replace(workload, checks=(*workload.checks[:2], wide(workload.checks[0])))
    assert judged.why_wrong(step, slack=0) is None
