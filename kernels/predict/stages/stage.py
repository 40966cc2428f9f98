"""What a stage of a step requires of a device, in counts, which the cost model turns into time.

They contain no constant of the model. Code shared by the stages of several plans is here, too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashtune.kernels.plans.candidate import Candidate, KernelUse, resident_programs
from flashtune.kernels.plans.parts.digits import DIGIT_WARPS, digit_columns, multiplies
from flashtune.kernels.plans.parts.size import next_power_of_2
from flashtune.kernels.plans.parts.tensor_tile import padded_tokens
from flashtune.kernels.predict.rounds import mean_rounds
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import FORMATS, Problem

REFERENCE_HZ = 1.98e9  # clock that on-chip costs are stated at: the H200's
_LANES_PER_CYCLE = 128  # float32 operations that a multiprocessor starts in a cycle
_SLOW_LANES = {80: 64}  # of the architectures with fewer
_SECTOR = 32  # bytes that are written where a number is stored apart from others
_WARPS = 16  # crossings and rounds are counted in programs of that many warps

# What a stored number takes of the instructions that a multiprocessor can issue before it is a
# float, counted in what Triton 3.6 compiles (docs/cost-model.md). A conversion counts 8: a
# multiprocessor converts 16 numbers in a cycle, where it issues 128 instructions.
_ISSUED_PER_CYCLE = 128
_WIDENED_BY_ROWS = {"int8": 8.0, "int4": 8.5}
_WIDENED_FOR_TENSORS = {"int8": 8.0, "int4": 9.0}
_WIDENED_ON_SM_90 = {"int8": 4.5, "int4": 8.0}  # of sm_90 and later, for tensor cores
# Where a config widens int8 by bits: of permutes and logical operations 64 issue in a cycle
_ROWS_BY_BITS = {"int8": 3.5}
_TENSORS_BY_BITS = {"int8": 4.0}
# Where it multiplies by digits: int8 as it is; int4's masks, and for each token its groups' sums
_BY_DIGITS = {"int8": (0.0, 0.0), "int4": (0.75, 0.5)}
_DIGITS_AT_ONCE = 4  # numbers or digits that one instruction of the 16-bit passes would be for
_DIGITS_MADE = 8.0  # elements of a 16-bit pass for whose instructions one number's digits are made


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Counts of one stage of a step: a launch, or a part of one.

    clock: the reference clock over the device's; bandwidth: published, in bytes/s.
    The fields up to `scores` are of the whole stage; those from `loads` on are of one program,
    one after another, and happen once a wave. Docs: docs/cost-model.md.
    """

    clock: float
    bandwidth: float
    launches: float = 0.0  # kernels that start when the one before has ended
    overlapped: float = 0.0  # kernels that start by programmatic dependent launch
    barriers: float = 0.0  # of the whole grid
    ends: float = 0.0  # 1 where the step's token is written
    arrivals: float = 0.0  # thousands of programs that meet at one address
    sorts: float = 0.0  # calls of torch.topk
    scores: float = 0.0  # ten thousands of scores that it reads
    moved: float = 0.0  # bytes from memory
    scattered: float = 0.0  # bytes of the sectors in which single numbers are stored
    prefetched: float = 0.0  # 1 where a stage before has asked for these bytes
    work: float = 0.0  # thousands of cycles of arithmetic on each multiprocessor
    widening: float = 0.0  # thousands of its cycles in which quantised numbers become floats
    waves: float = 1.0  # programs over those that are resident at once
    tail: float = 0.0  # the part of the last wave that has no program
    loads: float = 0.0  # memory accesses that wait for one another
    repeats: float = 0.0  # further steps of a loop over the hidden size, without stages
    trips: float = 1.0  # how many steps that loop has
    ragged: float = 0.0  # 1 where its last step is masked
    turns: float = 0.0  # further tiles of a program that loops over tiles
    crossings: float = 0.0  # sums across warps, by warps
    elements: float = 0.0  # of the matrix, for a thread
    rounds: float = 0.0  # reductions of the search for the threshold
    round_warps: float = 0.0  # the same, by warps
    scans: float = 0.0  # scores that a thread looks at, by the warps that share the multiprocessor


def scales(device: Device) -> dict[str, float]:
    """The fields of a stage that are the device's own. An unknown clock counts as the H200's."""
    clock = REFERENCE_HZ / device.clock_hz if device.clock_hz else 1.0
    return {"clock": clock, "bandwidth": device.memory_bandwidth}


def starts(candidate: Candidate, kernels: float) -> dict[str, float]:
    """How that many kernels start: overlapped with the one before, or not."""
    return {"overlapped" if candidate.config.pdl else "launches": float(kernels)}


def score_moved(problem: Problem) -> int:
    """Bytes that the score pass moves: the centroids, and what it fills the output with."""
    return problem.centroid_bytes + problem.written_bytes


def scattered(problem: Problem, logits: float) -> float:
    """Bytes of the sectors in which so many logits are stored, each at its token's id."""
    return _SECTOR * logits if problem.epilogue == "logits" else 0.0


def sharing(use: KernelUse, device: Device) -> int:
    """Programs that share a multiprocessor."""
    return max(1, min(resident_programs(use, device), math.ceil(use.programs / device.sm_count)))


def gather(candidate: Candidate, use: KernelUse, lists: bool) -> Stage:
    """The pass over the selected rows, up to the token.

    lists: whether programs are given a list of clusters, else each finds out which are its own.
    """
    problem, config, device = candidate.problem, candidate.config, candidate.device
    probed = problem.n_probes + candidate.slack / 2 + problem.n_pinned
    parts = max(1, use.programs // problem.n_tokens)
    tiles = math.ceil(probed * problem.cluster_size / parts / config.gather_rows)
    values = row_pass("gather", candidate, use, tiles)
    if problem.in_place:
        values["loads"] += tiles  # the ids before the rows
    if lists:
        values["loads"] += 2 * tiles  # the list and the cluster's number before the rows
    else:
        # ranks are looked up among all scores, for each cluster that a tile may touch
        rows = config.gather_rows
        touched = (rows - 2) // problem.cluster_size + 2 if rows > 1 else 1
        scores = problem.n_clusters / (candidate.lanes * use.warps)
        values["crossings"] += tiles * touched * use.warps / _WARPS
        values["scans"] = tiles * touched * scores * _crowding(use.warps, sharing(use, device))
    return Stage(
        **scales(device),
        **values,
        moved=problem.n_tokens * probed * problem.cluster_bytes,
        scattered=scattered(problem, problem.n_tokens * probed * problem.cluster_size),
        prefetched=float(getattr(config, "prefetch_margin", -1) >= 0),
        ends=1.0,
        arrivals=use.programs / 1000,
    )


def row_pass(stage: str, candidate: Candidate, use: KernelUse, tiles: int) -> dict[str, float]:
    """The counts of a pass over rows of a matrix, `tiles` of them a program."""
    problem, config = candidate.problem, candidate.config
    if multiplies(stage, candidate):
        slots = next_power_of_2(problem.n_tokens) if stage == "score" else 1
        turns = float(tiles - 1) if stage == "score" else 0.0
        return {**digit_pass(stage, candidate, use, tiles, slots), "turns": turns}
    knob: Callable[[str], Any] = lambda name: getattr(config, f"{stage}_{name}")  # noqa: E731
    rows, block, stages = knob("rows"), knob("block"), knob("stages")
    block = min(block, next_power_of_2(problem.hidden_size))
    trips = -(-problem.hidden_size // block)
    sums = problem.n_tokens if stage == "score" else 1
    threads = candidate.lanes * use.warps
    # of each column: rows are loaded, hidden states too, and every pair is multiplied
    elements = tiles * trips * block * (rows * (1 + sums) / 2 + sums) / threads
    elements *= 1 + use.spilled / 64
    across = min(use.warps, max(1, block // 256)) if stage == "score" else use.warps
    staged = (trips - 1) / (stages - 1) if stages > 1 else 0.0
    return {
        **_shared_out(use, candidate, elements),
        "widening": _widening(
            _WIDENED_BY_ROWS | (_ROWS_BY_BITS if config.widen == "bits" else {}),
            stage,
            candidate,
            use.programs * tiles * rows * trips * block,
        ),
        "loads": tiles * (1 + staged),
        "repeats": 0.0 if stages > 1 else float(tiles * (trips - 1)),
        "trips": float(trips),
        "ragged": float(problem.hidden_size % block != 0 and trips > 1),
        "turns": float(tiles - 1) if stage == "score" else 0.0,
        "crossings": tiles * across / _WARPS,
    }


def row_stream(stage: str, candidate: Candidate, use: KernelUse, rows: float) -> dict[str, float]:
    """The counts of a pass whose warps each stream whole rows through a ring in shared memory."""
    problem, lanes = candidate.problem, candidate.lanes
    dtype = problem.centroid_dtype if stage == "score" else problem.weight_dtype
    of_warp = rows / (use.programs * use.warps)
    numbers = 4 if dtype == "int8" else 1  # that an instruction multiplies
    elements = of_warp * problem.hidden_size / lanes / numbers
    return {
        **_shared_out(use, candidate, elements),
        "loads": 1 + of_warp / getattr(candidate.config, f"{stage}_stages"),
        "crossings": of_warp / _WARPS,
    }


def tensor_pass(
    stage: str, candidate: Candidate, use: KernelUse, share: float
) -> dict[str, float]:
    """The counts of a pass on tensor cores, of which a share of the programs has anything to do.

    A thread only brings elements to the tensor cores: rows, and hidden states of all tokens.
    """
    problem, config = candidate.problem, candidate.config
    if multiplies(stage, candidate):
        return digit_pass(stage, candidate, use, share, padded_tokens(candidate))
    rows, block, stages = (
        getattr(config, f"{stage}_{name}") for name in ("rows", "block", "stages")
    )
    block = min(block, max(16, next_power_of_2(problem.hidden_size)))
    trips = -(-problem.hidden_size // block)
    threads = candidate.lanes * use.warps
    elements = share * trips * block * (rows + padded_tokens(candidate)) / threads
    widened = _WIDENED_ON_SM_90 if candidate.device.capability >= 90 else _WIDENED_FOR_TENSORS
    return {
        **_shared_out(use, candidate, elements * (1 + use.spilled / 64)),
        "widening": _widening(
            widened | (_TENSORS_BY_BITS if config.widen == "bits" else {}),
            stage,
            candidate,
            use.programs * share * rows * trips * block,
        ),
        "loads": share * (1 + ((trips - 1) / (stages - 1) if stages > 1 else 0.0)),
        "repeats": 0.0 if stages > 1 else share * (trips - 1),
        "trips": float(trips),
        "ragged": float(problem.hidden_size % block != 0 and trips > 1),
        "crossings": share * use.warps / _WARPS,
    }


def digit_pass(
    stage: str, candidate: Candidate, use: KernelUse, tiles: float, slots: int
) -> dict[str, float]:
    """The counts of a pass that multiplies by digits, `tiles` of them a program, on tensor cores.

    slots: of tokens, that a tile is multiplied by. Rows and digits are four to an instruction.
    Without stages a step's loads begin when the step before has left shared memory.
    """
    problem, config = candidate.problem, candidate.config
    dtype = problem.centroid_dtype if stage == "score" else problem.weight_dtype
    rows, block, stages = (
        getattr(config, f"{stage}_{name}") for name in ("rows", "block", "stages")
    )
    trips, threads = -(-problem.hidden_size // block), candidate.lanes * use.warps
    numbers = tiles * trips * block * rows
    states = tiles * trips * block * digit_columns(stage, candidate, slots)
    elements = (numbers + states) / _DIGITS_AT_ONCE / threads * (1 + use.spilled / 64)
    masked, summed = _BY_DIGITS[dtype]
    issued = {dtype: masked + slots * summed}
    return {
        **_shared_out(use, candidate, elements),
        "widening": _widening(issued, stage, candidate, use.programs * numbers),
        "loads": tiles * (1 + (trips - 1) / max(1, stages - 1)),
        "crossings": tiles * use.warps / _WARPS,
    }


def made_digits(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """The launch that makes the hidden states' digits, if rows are multiplied by these."""
    if "digits" not in needs:
        return []
    use = needs["digits"]
    numbers = candidate.problem.hidden_size / (candidate.lanes * use.warps)
    return [
        Stage(
            **scales(candidate.device),
            **_shared_out(use, candidate, _DIGITS_MADE * numbers),
            loads=1.0,
            crossings=DIGIT_WARPS / _WARPS,
        )
    ]


def _shared_out(use: KernelUse, candidate: Candidate, elements: float) -> dict[str, float]:
    """How a launch's programs divide into waves, and their total arithmetic."""
    device, threads = candidate.device, candidate.lanes * use.warps
    waves = use.programs / min(use.programs, resident_programs(use, device) * device.sm_count)
    lanes = _SLOW_LANES.get(device.capability, _LANES_PER_CYCLE)
    return {
        "waves": waves,
        "tail": math.ceil(waves) - waves if waves > 1 else 0.0,
        "elements": elements,
        "work": use.programs * threads * elements / lanes / device.sm_count / 1000,
    }


def _widening(
    issued: Mapping[str, float], stage: str, candidate: Candidate, numbers: float
) -> float:
    """Thousands of cycles of each multiprocessor that widening so many stored numbers takes."""
    problem = candidate.problem
    dtype = problem.centroid_dtype if stage == "score" else problem.weight_dtype
    cycles = issued.get(dtype, 0.0) * numbers / _ISSUED_PER_CYCLE
    return cycles / candidate.device.sm_count / 1000


def search(candidate: Candidate, warps: int, programs: int) -> dict[str, float]:
    """The counts of the search for the threshold; so many programs to a multiprocessor do it."""
    problem = candidate.problem
    # and besides its rounds: mean and deviation, the count of each lane, and ranks
    rounds = 3 + mean_rounds(problem.n_clusters, problem.n_probes, candidate.config.slack)
    scores = problem.n_clusters / (candidate.lanes * warps)
    return {
        "loads": 1.0,
        "rounds": rounds,
        "round_warps": rounds * warps / _WARPS,
        "scans": (rounds + 1) * scores * _crowding(warps, programs),
    }


def _crowding(warps: int, programs: int) -> float:
    """How much slower a thread's own arithmetic is among all the warps of a multiprocessor."""
    return 1 + programs * warps / _WARPS


def decision(candidate: Candidate, use: KernelUse, maxima: int, warps: int) -> list[Stage]:
    """The pass that decides the best candidates by the model's own rows, if any are.

    warps: of its programs that search so many maxima of a token for a bound first; 0 where a
    launch of its own has searched.
    """
    problem, device = candidate.problem, candidate.device
    if not problem.n_rescored:
        return []
    row = FORMATS[problem.state_dtype].bytes_of(1, problem.hidden_size)
    decided = 1.5 * problem.n_rescored  # as many as the search aims at
    resident = resident_programs(use, device) * device.sm_count
    values = bound_search(candidate, maxima, warps, sharing(use, device)) if warps else {}
    # the bound, the screened logits, ids, then rows
    values["loads"] = values.get("loads", 0.0) + 3.0
    return [
        Stage(
            **scales(device),
            **values,
            waves=use.programs / min(use.programs, resident),
            moved=problem.n_tokens * decided * row,
            crossings=use.warps / _WARPS,
        )
    ]


def decided_singly(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """The same after a pass over tiles of several tokens: its programs find the bound, too."""
    if not candidate.problem.n_rescored:
        return []
    use = needs["decide"]
    return decision(candidate, use, needs["gather"].programs, use.warps)


def one_decides(candidate: Candidate, use: KernelUse) -> list[Stage]:
    """The same by one block of a launch, which reads what the others have sent and then rows."""
    problem = candidate.problem
    if not problem.n_rescored:
        return []
    row = FORMATS[problem.state_dtype].bytes_of(1, problem.hidden_size)
    rows = math.ceil(problem.n_rescored / use.warps)
    return [
        Stage(
            **scales(candidate.device),
            loads=2.0 + rows,
            crossings=rows * use.warps / _WARPS,
            moved=problem.n_rescored * row,
        )
    ]


def bound_search(candidate: Candidate, maxima: int, warps: int, programs: int) -> dict[str, float]:
    """The counts of the search for what n_rescored maxima of a token reach."""
    wanted = candidate.problem.n_rescored
    rounds = 1 + mean_rounds(max(maxima, 2 * wanted), wanted, wanted)
    held = maxima / (candidate.lanes * warps)
    return {
        "loads": 1.0,
        "rounds": rounds,
        "round_warps": rounds * warps / _WARPS,
        "scans": rounds * held * _crowding(warps, programs),
    }


def sorting(problem: Problem) -> dict[str, float]:
    """The counts of `torch.topk` over the scores of a step."""
    return {"sorts": math.sqrt(problem.n_tokens), "scores": problem.n_clusters / 1e4}
