"""Quantised rows that are multiplied as they are, by hidden states in digits of 8 bits.

A state is taken as whole multiples of a power of two, in four digits, and tensor cores of
integers multiply these by rows of int8 or by the numbers of int4 (templates/triton/_digits.py.j2,
_dot_digits.py.j2). A launch of its own makes the digits. Sums of int8 are exact.
"""

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.kernels.plans.parts.tile import BASE_REGISTERS, tile_bytes
from flashtune.templates.render import Value
from flashtune.tuning_db.problem import Problem

COLUMNS = 4  # that a token has in a product, one for each of its digits
LEAST_ROWS = 16  # that a warp multiplies at once
LEAST_BLOCK = {"int8": 64, "int4": 64}  # numbers of a row: 64 bytes, or two groups of 32
DIGIT_WARPS = 8  # of the programs that make the digits
MOST_SUMMED = 2**17  # products of a digit and a number of int8 that surely fit 32 bits
_MOST_SUMS_PER_THREAD = 64  # int32 and float32 accumulators beside what is being loaded
_MOST_BYTES_PER_THREAD = 128  # of a tile that no stage in shared memory takes


def multiplies(stage: str, candidate: Candidate) -> bool:
    """Whether a stage multiplies by digits."""
    return candidate.config.widen == "digits" and _format(stage, candidate.problem) in LEAST_BLOCK


def digit_launches(candidate: Candidate) -> tuple[KernelUse, ...]:
    """The launch before all others, if rows are multiplied by digits."""
    if candidate.config.widen != "digits":
        return ()
    lanes = _lanes(candidate.problem)
    return (
        KernelUse(
            kernel="digits",
            programs=candidate.problem.n_tokens,
            warps=DIGIT_WARPS,
            registers=BASE_REGISTERS + 2 * lanes // (candidate.lanes * DIGIT_WARPS),
            shared_bytes=0,
        ),
    )


def digit_values(candidate: Candidate) -> dict[str, Value]:
    """The sizes of digits in memory: each is as wide as its blocks."""
    problem, config = candidate.problem, candidate.config
    if config.widen != "digits":
        return {}
    blocks = [getattr(config, f"{stage}_block", 1) for stage in ("score", "gather")]
    widest = max(*blocks, LEAST_BLOCK["int4"])
    return {
        "digits_width": -(-problem.hidden_size // widest) * widest,
        "digits_lanes": _lanes(problem),
        "digit_warps": DIGIT_WARPS,
        "token_slots": next_power_of_2(problem.n_tokens),
    }


def why_not_multiplied(candidate: Candidate) -> str | None:
    """Why rows cannot be multiplied by digits, or None."""
    problem = candidate.problem
    if candidate.config.widen != "digits":
        return None
    if not any(multiplies(stage, candidate) for stage in ("score", "gather")):
        return "digits need rows in int8 or int4"
    if problem.hidden_size > MOST_SUMMED:
        return f"sums of {problem.hidden_size} products of a digit may overflow 32 bits"
    return None


def why_not_digit_tiled(stage: str, warps: int, slots: int, candidate: Candidate) -> str | None:
    """Why a stage's tile does not fit its warps or shared memory, or None.

    slots: of tokens, as many as the tile is multiplied by, rounded up.
    """
    problem, device, config = candidate.problem, candidate.device, candidate.config
    rows, block = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_block")
    stages, unroll = getattr(config, f"{stage}_stages"), getattr(config, f"{stage}_unroll", 1)
    format_, threads = _format(stage, problem), warps * candidate.lanes
    if rows < LEAST_ROWS * warps:
        return f"the {stage} tile has less than {LEAST_ROWS} rows for each of {warps} warps"
    if block > max(LEAST_BLOCK["int4"], next_power_of_2(problem.hidden_size)):
        return f"{stage}_block {block} is wider than the hidden size {problem.hidden_size}"
    if block < LEAST_BLOCK[format_]:
        return f"digits multiply {LEAST_BLOCK[format_]} numbers of {format_} at a time"
    if _sums(format_, rows, block, slots) > _MOST_SUMS_PER_THREAD * threads:
        return f"the sums of the {stage} tile do not fit the registers of {warps} warps"
    tile = tile_bytes(stage, rows * block, problem)
    if stages == 1 and tile > _MOST_BYTES_PER_THREAD * threads:
        return f"the {stage} tile {rows}x{block} does not fit the registers of {warps} warps"
    if stages > 1 and block >= problem.hidden_size:
        return f"{stage}_stages needs a loop over the hidden size"
    if unroll > 1:
        return f"{stage}_unroll needs rows that are widened"
    if stages * _staged_bytes(stage, candidate, slots) > device.limits.shared_per_block:
        return f"the {stage} stages do not fit in shared memory"
    return None


def expected_digit_pass(
    stage: str, candidate: Candidate, warps: int, programs: int, slots: int
) -> KernelUse:
    """A pass's kernel: registers for its sums, and for its rows if no stage holds them."""
    problem, config, threads = candidate.problem, candidate.config, warps * candidate.lanes
    rows, block, stages = (
        getattr(config, f"{stage}_{each}") for each in ("rows", "block", "stages")
    )
    held = _sums(_format(stage, problem), rows, block, slots)
    held += 0 if stages > 1 else tile_bytes(stage, rows * block, problem) // 4
    return KernelUse(
        kernel=stage,
        programs=programs,
        warps=warps,
        registers=2 * BASE_REGISTERS + held // threads,
        shared_bytes=stages * _staged_bytes(stage, candidate, slots),
    )


def digit_columns(stage: str, candidate: Candidate, slots: int) -> int:
    """Columns of digits that each of a tile's numbers is multiplied by.

    Those of int4 are there twice: the columns of one group have zeros where another's rows are.
    """
    twice = _format(stage, candidate.problem) == "int4"
    return COLUMNS * slots * (2 if twice else 1)


def _staged_bytes(stage: str, candidate: Candidate, slots: int) -> int:
    rows, block = (int(getattr(candidate.config, f"{stage}_{each}")) for each in ("rows", "block"))
    states = block * digit_columns(stage, candidate, slots)
    return tile_bytes(stage, rows * block, candidate.problem) + states


def _sums(format_: str, rows: int, block: int, slots: int) -> int:
    """Accumulators of a tile: of int4 those of all its groups, and their totals."""
    columns = COLUMNS * slots
    return rows * columns if format_ == "int8" else 2 * rows * columns * 2 * (block // 64)


def _format(stage: str, problem: Problem) -> str:
    return problem.centroid_dtype if stage == "score" else problem.weight_dtype


def _lanes(problem: Problem) -> int:
    return max(LEAST_BLOCK["int4"], next_power_of_2(problem.hidden_size))
