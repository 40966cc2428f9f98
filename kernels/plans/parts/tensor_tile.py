"""Tiles of the Triton plans that multiply on tensor cores, for several tokens at a time."""

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.parts.digits import (
    expected_digit_pass,
    multiplies,
    why_not_digit_tiled,
)
from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.kernels.plans.parts.tile import BASE_REGISTERS, tile_bytes
from flashtune.tuning_db.problem import FORMATS, Problem

LEAST_TILE = 16  # rows, columns and tokens of a product on tensor cores
MOST_SUMS_PER_THREAD = 64  # float32 accumulators beside what is being loaded
MOST_PER_THREAD = 128  # elements of a tile that no stage in shared memory takes
TENSOR_TILE = ("rows", "block", "warps", "stages")


def padded_tokens(candidate: Candidate) -> int:
    """The number of tokens, rounded up to a product on tensor cores.

    By digits a token has columns enough of its own.
    """
    slots = next_power_of_2(candidate.problem.n_tokens)
    return slots if candidate.config.widen == "digits" else max(LEAST_TILE, slots)


def why_not_tensor_tiled(stage: str, candidate: Candidate) -> str | None:
    """Why a stage's tile does not fit its warps or shared memory, or None."""
    problem, device, config = candidate.problem, candidate.device, candidate.config
    rows, block = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_block")
    warps, stages = getattr(config, f"{stage}_warps"), getattr(config, f"{stage}_stages")
    widest = max(LEAST_TILE, next_power_of_2(problem.hidden_size))
    tokens, threads = padded_tokens(candidate), warps * candidate.lanes
    if multiplies(stage, candidate):
        return why_not_digit_tiled(stage, warps, tokens, candidate)
    if block > widest:
        return f"{stage}_block {block} is wider than the hidden size {problem.hidden_size}"
    if rows * tokens > MOST_SUMS_PER_THREAD * threads:
        return f"{rows}x{tokens} sums do not fit the registers of {warps} warps"
    if stages == 1 and rows * block > MOST_PER_THREAD * threads:
        return f"the {stage} tile {rows}x{block} does not fit the registers of {warps} warps"
    if stages > 1 and block >= problem.hidden_size:
        return f"{stage}_stages needs a loop over the hidden size"
    if (
        stages * _staged_bytes(stage, rows, tokens, block, problem)
        > device.limits.shared_per_block
    ):
        return f"the {stage} stages do not fit in shared memory"
    return None


def _staged_bytes(stage: str, rows: int, tokens: int, block: int, problem: Problem) -> int:
    """Bytes per step of the loop over the hidden size: a tile of rows, and of hidden states."""
    states = FORMATS[problem.state_dtype].bytes_of(tokens, block)
    return tile_bytes(stage, rows * block, problem) + states


def expected_tensor_pass(stage: str, candidate: Candidate, programs: int) -> KernelUse:
    """A pass's kernel: registers for its sums, and for its rows if no stage holds them."""
    problem, config = candidate.problem, candidate.config
    rows, block, warps, stages = (getattr(config, f"{stage}_{each}") for each in TENSOR_TILE)
    tokens = padded_tokens(candidate)
    if multiplies(stage, candidate):
        return expected_digit_pass(stage, candidate, warps, programs, tokens)
    elements = rows * tokens + (0 if stages > 1 else rows * block)
    staged = _staged_bytes(stage, rows, tokens, block, problem)
    return KernelUse(
        kernel=stage,
        programs=programs,
        warps=warps,
        registers=BASE_REGISTERS + elements // (candidate.lanes * warps),
        shared_bytes=stages * staged if stages > 1 else 0,
    )
