"""The plan in CUDA C++ that streams whole rows through shared memory, for one token at a time."""

from dataclasses import dataclass
from typing import ClassVar

from flashtune.kernels.plans.knob import Rule, knob
from flashtune.kernels.plans.tensor_config import SLACKS
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

MOST_SCORES_PER_THREAD = 64  # of the threshold search: a thread marks its own in a 64-bit number
BASE_REGISTERS = 40  # of a thread, beside the hidden state
RESERVED = 1024  # bytes of shared memory that the driver keeps of each block


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedConfig:
    """Score and gather in two launches, a block a multiprocessor each, which overlap.

    A warp has `stages` rows in flight, copied to shared memory by the bulk copy engine.
    prefetch_margin: how far below the expected threshold, in hundredths of a standard deviation
    of the scores, a cluster's rows are prefetched to L2; where negative, how far above.
    early: centroids are asked for before the launch before has ended. Only what that launch
    writes is waited for, which must not be the centroids.
    """

    plan: ClassVar[str] = "streamed"
    template: ClassVar[str] = "cuda/streamed.cu.j2"

    score_warps: int = knob(8, (4, 8, 12, 16))
    score_stages: int = knob(3, (1, 2, 3, 4, 6, 8))
    gather_warps: int = knob(16, (8, 12, 16, 24))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    slack: int = knob(16, SLACKS)
    prefetch: bool = knob(True, (False, True))
    prefetch_margin: int = knob(-10, (-40, -20, -10, 0, 5, 20), {"prefetch": (True,)})
    early: bool = knob(True, (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One of the plan's launches; shared memory in bytes: what is asked for beside `fixed`."""

    kernel: str
    blocks: int
    warps: int
    ring_bytes: int
    fixed_bytes: int

    @property
    def shared_bytes(self) -> int:
        """All that a block takes."""
        return self.ring_bytes + self.fixed_bytes


# Where searches begin, valid or not: what was found by hand on one H200.
STARTS = (
    StreamedConfig(),
    StreamedConfig(gather_warps=8, gather_stages=2),
    StreamedConfig(score_stages=2),  # rows of 6 KB
)


def launches_of(problem: Problem, config: StreamedConfig, device: Device) -> list[Launch]:
    """The launches, in order.

    Shared memory is rounded up so that a multiprocessor holds one block of either launch, but not
    two of one: where a block's neighbour ends early, two would share what one should have.
    """
    whole = device.limits.shared_per_sm
    least = {"score": whole // 2 + RESERVED, "gather": whole // 4 + RESERVED}
    listed = -(-problem.n_clusters // device.sm_count) + 2
    launches = []
    for kernel, warps, stages in (
        ("score", config.score_warps, config.score_stages),
        ("gather", config.gather_warps, config.gather_stages),
    ):
        row = 2 * problem.hidden_size
        # the hidden state, barriers, and what warps tell each other
        fixed = row + 8 * (warps * stages + 1) + 16 * warps + 4 * listed + 256
        ring = max(warps * stages * row, least[kernel] - fixed)
        launches.append(
            Launch(
                kernel=kernel,
                blocks=device.sm_count,
                warps=warps,
                ring_bytes=-(-ring // 128) * 128,
                fixed_bytes=fixed,
            )
        )
    return launches


def _why_not_streamed(config: StreamedConfig, problem: Problem, device: Device) -> str | None:
    if problem.n_tokens > 1:
        return f"streamed decodes one token at a time, not {problem.n_tokens}"
    if device.capability < 90:
        return "bulk copies to shared memory need sm_90 or later"
    dtypes = {problem.weight_dtype, problem.centroid_dtype}
    if dtypes - {"bf16", "fp16"}:
        return f"streamed is for weights of 16 bits, not {', '.join(sorted(dtypes))}"
    if problem.hidden_size % 8:
        return f"bulk copies need a hidden size of a multiple of 8, not {problem.hidden_size}"
    return None


def _why_not_searched(config: StreamedConfig, problem: Problem, device: Device) -> str | None:
    if problem.n_clusters > MOST_SCORES_PER_THREAD * 32 * config.gather_warps:
        return f"{problem.n_clusters} scores are too many for {config.gather_warps} warps"
    return None


def _why_not_held(config: StreamedConfig, problem: Problem, device: Device) -> str | None:
    held = 4 * -(-problem.hidden_size // 256)  # registers of a lane's share of a hidden state
    for stage, warps in (("score", config.score_warps), ("gather", config.gather_warps)):
        if BASE_REGISTERS + held > device.limits.registers_per_sm // (32 * warps):
            return f"the hidden state does not fit the registers of {warps} warps in the {stage}"
    return None


def _why_not_beside(config: StreamedConfig, problem: Problem, device: Device) -> str | None:
    launches = launches_of(problem, config, device)
    for launch in launches:
        if launch.shared_bytes > device.limits.shared_per_block:
            return f"the rows in flight of the {launch.kernel} do not fit in shared memory"
    if sum(each.shared_bytes + RESERVED for each in launches) > device.limits.shared_per_sm:
        return "the rows in flight of score and gather do not fit on one multiprocessor"
    return None


_RINGS = frozenset(["score_warps", "score_stages", "gather_warps", "gather_stages"])
RULES = tuple(
    Rule(find, names, plans=(StreamedConfig,))
    for find, names in (
        (_why_not_streamed, frozenset[str]()),
        (_why_not_searched, frozenset(["gather_warps"])),
        (_why_not_held, frozenset(["score_warps", "gather_warps"])),
        (_why_not_beside, _RINGS),
    )
)
