"""What each stage of a step asks of a device, in counts: what the cost model turns into time.

Usage:
    for stage in stages_of(problem, config, device, uses):
        stage.moved, stage.waves, stage.loads      # no constant of the model is in them

Each plan has a function that lists its stages, registered in `PLAN_STAGES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashtune.kernels.backends.backend import KernelUse, resident_programs
from flashtune.kernels.plans.config import Config, slack_of
from flashtune.kernels.plans.tensor_config import BatchedConfig, DenseConfig, padded_tokens
from flashtune.kernels.plans.triton_config import (
    PersistentConfig,
    StagedConfig,
    next_power_of_2,
    select_warps,
)
from flashtune.tuner.predict.rounds import mean_rounds
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

REFERENCE_HZ = 1.98e9  # clock that on-chip costs are stated at: the H200's
_LANES_PER_CYCLE = 128  # float32 operations that a multiprocessor starts in a cycle
_SLOW_LANES = {80: 64}  # of the architectures with fewer
_WARPS = 16  # crossings and rounds are counted in programs of that many warps


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
    prefetched: float = 0.0  # 1 where a stage before has asked for these bytes
    work: float = 0.0  # thousands of cycles of arithmetic on each multiprocessor
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


def stages_of(
    problem: Problem, config: Config, device: Device, uses: Sequence[KernelUse]
) -> list[Stage]:
    """The stages of one step. `uses` are the compiled kernels' needs.

    Raises FlashtuneError for configs of plans that the cost model does not know.
    """
    stages = PLAN_STAGES.get(type(config))
    if stages is None:
        raise FlashtuneError(
            f"times of plan {config.plan} are not predicted: search on the machine itself"
        )
    return stages(problem, config, device, {use.kernel: use for use in uses})


def scales(device: Device) -> dict[str, float]:
    """The fields of a stage that are the device's own. An unknown clock counts as the H200's."""
    clock = REFERENCE_HZ / device.clock_hz if device.clock_hz else 1.0
    return {"clock": clock, "bandwidth": device.memory_bandwidth}


def _staged(
    problem: Problem, config: StagedConfig, device: Device, needs: Mapping[str, KernelUse]
) -> list[Stage]:
    kernels = len(needs)
    starts = {"overlapped": kernels} if config.pdl else {"launches": kernels}
    score, gather = needs["score"], needs["gather"]
    tiles = -(-problem.n_clusters // config.score_rows) / score.programs
    stages = [
        Stage(
            **scales(device),
            **starts,
            **_pass("score", problem, config, device, score, math.ceil(tiles)),
            moved=problem.centroid_bytes + problem.written_bytes,
        )
    ]
    if config.selection == "torch_topk":
        stages.append(Stage(**scales(device), launches=1.0, **sorting(problem)))
    elif config.selection == "threshold":
        stages.append(Stage(**scales(device), **_search(problem, config, 1)))
    else:
        stages.append(
            Stage(**scales(device), **_search(problem, config, _sharing(gather, device)))
        )
    return [*stages, _gather(problem, config, device, gather)]


def _persistent(
    problem: Problem, config: PersistentConfig, device: Device, needs: Mapping[str, KernelUse]
) -> list[Stage]:
    use = needs["decode"]
    starts = {"overlapped": 1.0} if config.pdl else {"launches": 1.0}
    tiles = math.ceil(math.ceil(problem.n_clusters / use.programs) / config.score_rows)
    score = _pass("score", problem, config, device, use, tiles)
    ahead = max(1, config.slab_stages - 1)  # tiles whose loads are under way
    score |= {name: score[name] / ahead for name in ("loads", "repeats", "turns")}
    return [
        Stage(
            **scales(device),
            **starts,
            **score,
            moved=problem.centroid_bytes + problem.written_bytes,
            barriers=1.0,
        ),
        Stage(**scales(device), **_search(problem, config, _sharing(use, device))),
        _gather(problem, config, device, use),
    ]


def _batched(
    problem: Problem, config: BatchedConfig, device: Device, needs: Mapping[str, KernelUse]
) -> list[Stage]:
    """Every tile of the gather asks whether a token wants any of its clusters; few go on."""
    starts = {"overlapped": 3.0} if config.pdl else {"launches": 3.0}
    gather = needs["gather"]
    probed = (problem.n_probes + config.slack / 2) / problem.n_clusters
    wanted = 1 - (1 - min(1.0, probed)) ** problem.n_tokens  # the share of the clusters
    clusters = config.gather_rows // problem.cluster_size
    going_on = 1 - (1 - wanted) ** clusters  # the share of the tiles
    tiles = _tensor_pass("gather", problem, config, device, gather, going_on)
    tiles["loads"] += 2  # thresholds and scores
    return [
        Stage(
            **scales(device),
            **starts,
            **_tensor_pass("score", problem, config, device, needs["score"], 1.0),
            moved=problem.centroid_bytes + problem.written_bytes,
        ),
        Stage(**scales(device), **_search(problem, config, 1)),
        Stage(
            **scales(device),
            **tiles,
            moved=wanted * problem.n_clusters * problem.cluster_bytes,
            ends=1.0,
            arrivals=gather.programs / 1000,
        ),
    ]


def _dense(
    problem: Problem, config: DenseConfig, device: Device, needs: Mapping[str, KernelUse]
) -> list[Stage]:
    use = needs["gather"]
    return [
        Stage(
            **scales(device),
            **({"overlapped": 1.0} if config.pdl else {"launches": 1.0}),
            **_tensor_pass("gather", problem, config, device, use, 1.0),
            moved=problem.n_clusters * problem.cluster_bytes + problem.written_bytes,
            ends=1.0,
            arrivals=use.programs / 1000,
        )
    ]


PLAN_STAGES: dict[type[Config], Callable[..., list[Stage]]] = {
    StagedConfig: _staged,
    PersistentConfig: _persistent,
    BatchedConfig: _batched,
    DenseConfig: _dense,
}


def _sharing(use: KernelUse, device: Device) -> int:
    """Programs that share a multiprocessor."""
    return max(1, min(resident_programs(use, device), math.ceil(use.programs / device.sm_count)))


def _gather(
    problem: Problem, config: StagedConfig | PersistentConfig, device: Device, use: KernelUse
) -> Stage:
    """The pass over the selected rows, up to the token."""
    probed = problem.n_probes + slack_of(config) / 2  # as many as the search aims at
    parts = max(1, use.programs // problem.n_tokens)
    lists = isinstance(config, StagedConfig) and config.selection != "in_gather"
    tiles = math.ceil(probed * problem.cluster_size / parts / config.gather_rows)
    values = _pass("gather", problem, config, device, use, tiles)
    if lists:
        values["loads"] += 2 * tiles  # the list and the cluster's number before the rows
    else:
        # ranks are looked up among all scores, for each cluster that a tile may touch
        rows = config.gather_rows
        touched = (rows - 2) // problem.cluster_size + 2 if rows > 1 else 1
        scores = problem.n_clusters / (32 * use.warps)
        values["crossings"] += tiles * touched * use.warps / _WARPS
        values["scans"] = tiles * touched * scores * _crowding(use.warps, _sharing(use, device))
    return Stage(
        **scales(device),
        **values,
        moved=problem.n_tokens * probed * problem.cluster_bytes,
        prefetched=float(getattr(config, "prefetch_margin", -1) >= 0),
        ends=1.0,
        arrivals=use.programs / 1000,
    )


def _pass(
    stage: str,
    problem: Problem,
    config: StagedConfig | PersistentConfig,
    device: Device,
    use: KernelUse,
    tiles: int,
) -> dict[str, float]:
    """The counts of a pass over rows of a matrix, `tiles` of them a program."""
    knob: Callable[[str], Any] = lambda name: getattr(config, f"{stage}_{name}")  # noqa: E731
    rows, block, stages = knob("rows"), knob("block"), knob("stages")
    block = min(block, next_power_of_2(problem.hidden_size))
    trips = -(-problem.hidden_size // block)
    sums = problem.n_tokens if stage == "score" else 1
    # of each column: rows are loaded, hidden states too, and every pair is multiplied
    elements = tiles * trips * block * (rows * (1 + sums) / 2 + sums) / (32 * use.warps)
    elements *= 1 + use.spilled / 64
    across = min(use.warps, max(1, block // 256)) if stage == "score" else use.warps
    staged = (trips - 1) / (stages - 1) if stages > 1 else 0.0
    return {
        **_shared_out(use, device, elements),
        "loads": tiles * (1 + staged),
        "repeats": 0.0 if stages > 1 else float(tiles * (trips - 1)),
        "trips": float(trips),
        "ragged": float(problem.hidden_size % block != 0 and trips > 1),
        "turns": float(tiles - 1) if stage == "score" else 0.0,
        "crossings": tiles * across / _WARPS,
    }


def _tensor_pass(
    stage: str,
    problem: Problem,
    config: BatchedConfig | DenseConfig,
    device: Device,
    use: KernelUse,
    share: float,
) -> dict[str, float]:
    """The counts of a pass on tensor cores, of which a share of the programs has anything to do.

    A thread only brings elements to the tensor cores: rows, and hidden states of all tokens.
    """
    rows, block, stages = (
        getattr(config, f"{stage}_{name}") for name in ("rows", "block", "stages")
    )
    block = min(block, max(16, next_power_of_2(problem.hidden_size)))
    trips = -(-problem.hidden_size // block)
    elements = share * trips * block * (rows + padded_tokens(problem)) / (32 * use.warps)
    return {
        **_shared_out(use, device, elements * (1 + use.spilled / 64)),
        "loads": share * (1 + ((trips - 1) / (stages - 1) if stages > 1 else 0.0)),
        "repeats": 0.0 if stages > 1 else share * (trips - 1),
        "trips": float(trips),
        "ragged": float(problem.hidden_size % block != 0 and trips > 1),
        "crossings": share * use.warps / _WARPS,
    }


def _shared_out(use: KernelUse, device: Device, elements: float) -> dict[str, float]:
    """How a launch's programs come in waves, and what their arithmetic adds up to."""
    waves = use.programs / min(use.programs, resident_programs(use, device) * device.sm_count)
    lanes = _SLOW_LANES.get(device.capability, _LANES_PER_CYCLE)
    return {
        "waves": waves,
        "tail": math.ceil(waves) - waves if waves > 1 else 0.0,
        "elements": elements,
        "work": use.programs * 32 * use.warps * elements / lanes / device.sm_count / 1000,
    }


def _search(
    problem: Problem, config: StagedConfig | PersistentConfig | BatchedConfig, sharing: int
) -> dict[str, float]:
    """The counts of the search for the threshold; `sharing` programs to a multiprocessor do it."""
    warps = select_warps(config)
    # and besides its rounds: mean and deviation, the count of each lane, and ranks
    rounds = 3 + mean_rounds(problem.n_clusters, problem.n_probes, config.slack)
    scores = problem.n_clusters / (32 * warps)
    return {
        "loads": 1.0,
        "rounds": rounds,
        "round_warps": rounds * warps / _WARPS,
        "scans": (rounds + 1) * scores * _crowding(warps, sharing),
    }


def _crowding(warps: int, sharing: int) -> float:
    """How much slower a thread's own arithmetic is among all the warps of a multiprocessor."""
    return 1 + sharing * warps / _WARPS


def sorting(problem: Problem) -> dict[str, float]:
    """The counts of `torch.topk` over the scores of a step."""
    return {"sorts": math.sqrt(problem.n_tokens), "scores": problem.n_clusters / 1e4}
