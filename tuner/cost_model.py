"""How long a candidate should take on a device nobody has here: a roofline, by launch.

Each launch takes its overhead, then as long as its bytes need at the bandwidth that its bytes in
flight can draw, stretched by the last, partly filled wave; a threshold search adds its rounds.
The constants that are not a device's published figures are estimates after timings on one H200
(docs/cost-model.md) and scale with the clock. What comes out ranks candidates: it is a
prediction, and records say so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flashtune.kernels.backend import KernelUse, resident_programs
from flashtune.kernels.config import Config, slack_of
from flashtune.kernels.tensor_config import BatchedConfig, DenseConfig
from flashtune.kernels.triton_config import (
    PersistentConfig,
    StagedConfig,
    TritonConfig,
    lanes,
    select_warps,
)
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DTYPE_BYTES, Problem

VERSION = "roofline-1"
REFERENCE_HZ = 1.98e9  # clock of the H200 that the latencies are estimates for
MEMORY_LATENCY_S = 0.9e-6
REACHABLE = 0.92  # share of the published bandwidth that a copy reaches
LAUNCH_S = 1.5e-6  # from one kernel of a graph to the next
OVERLAPPED_LAUNCH_S = 0.7e-6  # the same with programmatic dependent launch
BARRIER_S = 1.3e-6
ARRIVAL_S = 1.2e-6  # two dependent atomics at the end of the step
ROUND_S = 0.35e-6  # one count of the scores in a program
ROUNDS = 3.0
TOPK_S = 36e-6  # torch.topk over 9496 scores


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass over a matrix: its bytes, its programs and the bytes each has in flight."""

    total_bytes: float
    programs: int
    in_flight: float


def predict_us(
    problem: Problem, config: Config, device: Device, uses: Sequence[KernelUse]
) -> float:
    """Microseconds a call. `uses` are the compiled kernels' needs, by kernel name.

    Raises FlashtuneError for configs of CPUs.
    """
    if not isinstance(config, TritonConfig):
        raise FlashtuneError("times on CPUs are not predicted: search on the machine itself")
    slower = REFERENCE_HZ / device.clock_hz if device.clock_hz else 1.0
    needs = {use.kernel: use for use in uses}
    if isinstance(config, PersistentConfig):
        use = needs["decode"]
        seconds = slower * (LAUNCH_S + BARRIER_S + _selection_s(problem, config))
        seconds += _stage_s(_score(problem, config, use.programs), use, device)
        seconds += _stage_s(_gather(problem, config, use.programs), use, device)
        return 1e6 * (seconds + slower * ARRIVAL_S)
    gather = needs["gather"]
    launch = OVERLAPPED_LAUNCH_S if config.pdl else LAUNCH_S
    seconds = slower * len(uses) * launch
    if not isinstance(config, DenseConfig):
        score = needs["score"]
        seconds += slower * _selection_s(problem, config)
        seconds += _stage_s(_score(problem, config, score.programs), score, device)
    seconds += _stage_s(_gather(problem, config, gather.programs), gather, device)
    return 1e6 * (seconds + slower * ARRIVAL_S)


def _score(
    problem: Problem, config: StagedConfig | PersistentConfig | BatchedConfig, programs: int
) -> Stage:
    tile = config.score_rows * min(config.score_block, problem.hidden_size)
    depth = max(config.score_stages, getattr(config, "score_unroll", 1))
    if isinstance(config, PersistentConfig):
        depth *= config.slab_stages
    width = DTYPE_BYTES[problem.centroid_dtype]
    return Stage(problem.centroid_bytes, programs, tile * width * depth)


def _gather(problem: Problem, config: TritonConfig, programs: int) -> Stage:
    tile = config.gather_rows * min(config.gather_block, problem.hidden_size)
    depth = max(config.gather_stages, getattr(config, "gather_unroll", 1))
    if isinstance(config, DenseConfig):
        clusters: float = problem.n_clusters
    elif isinstance(config, BatchedConfig):
        clusters = problem.distinct_clusters
    else:
        clusters = problem.n_tokens * (problem.n_probes + slack_of(config) / 2)
    total = clusters * problem.cluster_bytes
    return Stage(total, programs, tile * DTYPE_BYTES[problem.weight_dtype] * depth)


def _stage_s(stage: Stage, use: KernelUse, device: Device) -> float:
    """Seconds for a pass: bytes over the bandwidth drawn, the tail of waves, one latency."""
    at_once = min(stage.programs, resident_programs(use, device) * device.sm_count)
    bandwidth = REACHABLE * device.memory_bandwidth
    drawn = at_once * stage.in_flight / MEMORY_LATENCY_S
    drawn = bandwidth * drawn / (bandwidth + drawn)  # saturates smoothly
    waves = stage.programs / at_once
    tail = math.ceil(waves) / waves if waves < 8 else 1.0
    spilled = 1.0 + use.spilled / 1024
    return MEMORY_LATENCY_S + spilled * tail * stage.total_bytes / drawn


def _selection_s(
    problem: Problem, config: StagedConfig | PersistentConfig | BatchedConfig
) -> float:
    """Seconds of the search for the threshold at the reference clock, or of `torch.topk`."""
    if isinstance(config, StagedConfig) and config.selection == "torch_topk":
        return TOPK_S * math.sqrt(problem.n_tokens)
    warps = select_warps(config)
    per_thread = problem.n_clusters / (32 * warps)
    contention = config.programs_per_sm if isinstance(config, PersistentConfig) else 1
    if isinstance(config, StagedConfig) and config.selection == "in_gather":
        contention = config.gather_programs_per_sm
    members = -(-problem.n_clusters // lanes(problem, warps))
    work = members * warps * contention / 512  # passes over the scores, in rounds
    tries = ROUNDS if config.slack < 32 else ROUNDS - 1
    return MEMORY_LATENCY_S + ROUND_S * (tries + 2) * (1 + work) + per_thread * 1e-9
