"""Tiles of the Triton plans that score or gather row by row, without tensor cores."""

from dataclasses import replace
from typing import Any

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.kernels.plans.parts.threshold import lanes
from flashtune.tuning_db.problem import FORMATS, Problem

MAX_TILE_PER_THREAD = 128  # float32 accumulators a thread can hold without spilling
PREFETCH_MARGINS = (-1, 0, 5, 10, 20)
SLACKS = (0, 8, 16, 32, 64)
MOST_MEMBERS = 32  # scores per lane of a search
BASE_REGISTERS = 24  # of a thread, for addresses and loops
TILE = ("rows", "block", "warps", "stages", "unroll")


def why_not_tiled(stage: str, warps: int, candidate: Candidate) -> str | None:
    """Why a stage's tile does not fit its warps, or None."""
    problem, device, config = candidate.problem, candidate.device, candidate.config
    threads = warps * candidate.lanes
    widest = max(64, next_power_of_2(problem.hidden_size))
    rows, block = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_block")
    stages, unroll = getattr(config, f"{stage}_stages"), getattr(config, f"{stage}_unroll")
    sums = problem.n_tokens if stage == "score" else 1
    if block > widest:
        return f"{stage}_block {block} is wider than the hidden size {problem.hidden_size}"
    if rows * block * sums > MAX_TILE_PER_THREAD * threads:
        return f"the {stage} tile {rows}x{block} does not fit the registers of {warps} warps"
    if rows * block < threads:
        return f"the {stage} tile {rows}x{block} has less than one element per thread"
    if block >= problem.hidden_size and (stages, unroll) != (1, 1):
        return f"{stage}_stages and {stage}_unroll need a loop over the hidden size"
    if stages > 1 and unroll > 1:
        return f"{stage}_stages and {stage}_unroll exclude each other"
    if stages * tile_bytes(stage, rows * block, problem) > device.limits.shared_per_block:
        return f"the {stage} stages do not fit in shared memory"
    return None


def tile_bytes(stage: str, elements: int, problem: Problem) -> int:
    """Bytes of a tile of centroids in the score pass, of weight rows in the gather."""
    dtype = problem.centroid_dtype if stage == "score" else problem.weight_dtype
    return FORMATS[dtype].bytes_of(1, elements)


def expected_pass(
    stage: str, candidate: Candidate, warps: int, programs: int, searches: bool
) -> KernelUse:
    """A pass's kernel: about two registers for each element of a thread's tile, and its scores.

    searches: whether its programs search for the threshold themselves.
    """
    problem, config, threads = candidate.problem, candidate.config, candidate.lanes * warps
    rows, block, stages = (
        getattr(config, f"{stage}_{each}") for each in ("rows", "block", "stages")
    )
    sums = problem.n_tokens if stage == "score" else 1
    registers = BASE_REGISTERS + (1 + sums) * rows * block // threads
    if searches:
        registers = max(registers, BASE_REGISTERS + 2 * problem.n_clusters // threads)
    return KernelUse(
        kernel=stage,
        programs=programs,
        warps=warps,
        registers=registers,
        shared_bytes=stages * tile_bytes(stage, rows * block, problem) if stages > 1 else 0,
    )


def expected_search(candidate: Candidate, warps: int) -> KernelUse:
    """The kernel that searches for the threshold, one program per token."""
    problem = candidate.problem
    return KernelUse(
        kernel="select",
        programs=problem.n_tokens,
        warps=warps,
        registers=BASE_REGISTERS + problem.n_clusters // (candidate.lanes * warps),
        shared_bytes=0,
    )


def why_not_overlapped(candidate: Candidate) -> str | None:
    """Programmatic dependent launch needs sm_90 or later."""
    if candidate.config.pdl and candidate.device.capability < 90:
        return "programmatic dependent launch needs sm_90 or later"
    return None


def why_not_selected(problem: Problem, warps: int) -> str | None:
    """Why these warps cannot hold all scores; 0 warps mean that a library selects."""
    if warps and -(-problem.n_clusters // lanes(problem.n_clusters, warps)) > MOST_MEMBERS:
        return f"{problem.n_clusters} scores do not fit the registers of {warps} warps"
    return None


def why_not_prefetched(candidate: Candidate) -> str | None:
    """Whole clusters are prefetched by one instruction of sm_90, in pieces of 16 bytes."""
    problem = candidate.problem
    if candidate.config.prefetch_margin < 0:
        return None
    if candidate.device.capability < 90:
        return "prefetch of whole clusters needs sm_90 or later"
    if problem.in_place:
        return "prefetch needs clusters whose rows are adjacent, not rows in place"
    if format_of(problem.weight_dtype).quantised:
        return f"prefetch needs clusters in 16 or 32 bits, not in {problem.weight_dtype}"
    if problem.cluster_bytes % 16:
        return f"prefetch needs clusters of a multiple of 16 bytes, not {problem.cluster_bytes}"
    return None


def narrowed(starts: Any, problem: Problem) -> list[Any]:
    """The configs with no block wider than the hidden size, valid or not."""
    widest = max(64, next_power_of_2(problem.hidden_size))
    found = []
    for config in starts:
        blocks = {
            name: min(getattr(config, name), widest)
            for name in ("score_block", "gather_block")
            if hasattr(config, name)
        }
        found.append(replace(config, **blocks))
    return found
