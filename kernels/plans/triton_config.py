"""The plans of Triton kernels, and which of their configs are valid."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from flashtune.kernels.plans import tensor_config
from flashtune.kernels.plans.knob import Rule, knob, why_broken
from flashtune.kernels.plans.tensor_config import TENSOR_PLANS, BatchedConfig, DenseConfig
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

BATCHED_FROM = 8  # tokens: with fewer, the plan for one token was as fast on an H200
MAX_TILE_PER_THREAD = 128  # float32 accumulators a thread can hold without spilling
PREFETCH_MARGINS = (-1, 0, 5, 10, 20)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedConfig:
    """Score, select and gather in launches of their own.

    selection: `torch_topk` (the baseline), `threshold` (one program a token, a launch of its
    own) or `in_gather` (every gather program finds the threshold itself, no launch).
    prefetch_margin: how far below the expected threshold, in hundredths of a standard deviation
    of the scores, a cluster's rows are still prefetched to L2; -1 prefetches nothing.
    """

    plan: ClassVar[str] = "staged"
    template: ClassVar[str] = "triton/staged.py.j2"

    selection: str = knob("threshold", ("torch_topk", "threshold", "in_gather"))
    score_rows: int = knob(2, (1, 2, 4, 8, 16))
    score_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    score_warps: int = knob(4, (1, 2, 4, 8))
    score_stages: int = knob(1, (1, 2, 3, 4))
    score_unroll: int = knob(1, (1, 2, 4))
    score_programs_per_sm: int = knob(0, (0, 2, 4, 8, 16))
    select_warps: int = knob(16, (4, 8, 16, 32), {"selection": ("threshold",)})
    slack: int = knob(16, (0, 8, 16, 32, 64), {"selection": ("threshold", "in_gather")})
    gather_rows: int = knob(4, (1, 2, 4, 8, 16, 32))
    gather_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    gather_warps: int = knob(4, (1, 2, 4, 8, 16, 32))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    gather_unroll: int = knob(1, (1, 2, 4))
    gather_programs_per_sm: int = knob(1, (1, 2, 4), {"selection": ("in_gather",)})
    prefetch_margin: int = knob(-1, PREFETCH_MARGINS, {"selection": ("in_gather",)})
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class PersistentConfig:
    """One cooperative launch with a barrier between score and gather; knobs as in StagedConfig."""

    plan: ClassVar[str] = "persistent"
    template: ClassVar[str] = "triton/persistent.py.j2"

    programs_per_sm: int = knob(1, (1, 2, 3, 4))
    warps: int = knob(8, (4, 8, 16))
    score_rows: int = knob(4, (1, 2, 4, 8, 16))
    score_block: int = knob(1024, (64, 128, 256, 512, 1024, 2048, 4096))
    score_stages: int = knob(1, (1, 2, 3, 4))
    score_unroll: int = knob(1, (1, 2, 4))
    slab_stages: int = knob(1, (1, 2, 3, 4))
    slack: int = knob(16, (0, 8, 16, 32, 64))
    gather_rows: int = knob(16, (4, 8, 16, 32))
    gather_block: int = knob(256, (64, 128, 256, 512, 1024, 2048, 4096))
    gather_stages: int = knob(1, (1, 2, 3, 4))
    gather_unroll: int = knob(1, (1, 2, 4))
    prefetch_margin: int = knob(-1, PREFETCH_MARGINS)
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


SCALAR_PLANS = (StagedConfig, PersistentConfig)
TRITON_PLANS = (*SCALAR_PLANS, *TENSOR_PLANS)
TritonConfig = StagedConfig | PersistentConfig | BatchedConfig | DenseConfig
ALL_CLUSTERS = 2**31 - 1  # the slack of a step that probes every cluster

# Where a search of each family begins: what was found by hand on one H200, with and without what
# only sm_90 has. What is not valid for a problem and device is left out there.
STARTS: tuple[TritonConfig, ...] = (
    StagedConfig(pdl=True),
    StagedConfig(),
    StagedConfig(
        selection="in_gather",
        score_unroll=2,
        slack=8,
        gather_rows=32,
        gather_block=512,
        gather_warps=8,
        prefetch_margin=5,
        pdl=True,
    ),
    StagedConfig(selection="in_gather", gather_rows=32, gather_block=512, gather_warps=8),
    PersistentConfig(
        score_rows=8,
        score_block=2048,
        slab_stages=3,
        gather_block=1024,
        gather_unroll=2,
        prefetch_margin=10,
        pdl=True,
    ),
    PersistentConfig(score_rows=8, gather_block=512),
    BatchedConfig(),
    BatchedConfig(
        score_block=256,
        score_warps=1,
        score_stages=4,
        select_warps=8,
        slack=64,
        gather_block=256,
    ),
    BatchedConfig(score_warps=1, gather_rows=64, gather_warps=4, pdl=True),
    BatchedConfig(score_warps=1, gather_rows=64, gather_warps=4),
    DenseConfig(gather_rows=128, gather_block=64, gather_stages=5, pdl=True),
    DenseConfig(),
)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def select_warps(config: TritonConfig) -> int:
    """Warps of the programs that search for the threshold; 0 where a library selects."""
    if isinstance(config, PersistentConfig):
        return config.warps
    if isinstance(config, BatchedConfig):
        return config.select_warps
    if isinstance(config, DenseConfig):
        return 0
    return {"threshold": config.select_warps, "in_gather": config.gather_warps}.get(
        config.selection, 0
    )


def lanes(problem: Problem, warps: int) -> int:
    """Scores side by side in the threshold search: four a thread, as one 16-byte load."""
    return min(128 * warps, max(64, next_power_of_2(problem.n_clusters)))


def _why_not_scored(config: TritonConfig, problem: Problem, device: Device) -> str | None:
    return _why_not_tiled("score", config, problem, device)


def _why_not_gathered(config: TritonConfig, problem: Problem, device: Device) -> str | None:
    return _why_not_tiled("gather", config, problem, device)


def _why_not_tiled(
    stage: str, config: TritonConfig, problem: Problem, device: Device
) -> str | None:
    widest = max(64, next_power_of_2(problem.hidden_size))
    own = isinstance(config, StagedConfig)  # a launch of its own, with its own warps
    warps = getattr(config, f"{stage}_warps" if own else "warps")
    rows, block = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_block")
    stages, unroll = getattr(config, f"{stage}_stages"), getattr(config, f"{stage}_unroll")
    sums = problem.n_tokens if stage == "score" else 1
    if block > widest:
        return f"{stage}_block {block} is wider than the hidden size {problem.hidden_size}"
    if rows * block * sums > MAX_TILE_PER_THREAD * warps * 32:
        return f"the {stage} tile {rows}x{block} does not fit the registers of {warps} warps"
    if rows * block < warps * 32:
        return f"the {stage} tile {rows}x{block} has less than one element a thread"
    if block >= problem.hidden_size and (stages, unroll) != (1, 1):
        return f"{stage}_stages and {stage}_unroll need a loop over the hidden size"
    if stages > 1 and unroll > 1:
        return f"{stage}_stages and {stage}_unroll exclude each other"
    if stages * rows * block * 2 > device.limits.shared_per_block:
        return f"the {stage} stages do not fit in shared memory"
    return None


def _why_not_overlapped(config: TritonConfig, problem: Problem, device: Device) -> str | None:
    if config.pdl and device.capability < 90:
        return "programmatic dependent launch needs sm_90 or later"
    return None


def _why_not_selected(config: TritonConfig, problem: Problem, device: Device) -> str | None:
    warps = select_warps(config)
    if warps and -(-problem.n_clusters // lanes(problem, warps)) > 32:
        return f"{problem.n_clusters} scores do not fit the registers of {warps} warps"
    return None


def _why_not_prefetched(
    config: StagedConfig | PersistentConfig, problem: Problem, device: Device
) -> str | None:
    if config.prefetch_margin < 0:
        return None
    if device.capability < 90:
        return "prefetch of whole clusters needs sm_90 or later"
    if problem.cluster_bytes % 16:
        return f"prefetch needs clusters of a multiple of 16 bytes, not {problem.cluster_bytes}"
    return None


def _why_not_resident(config: PersistentConfig, problem: Problem, device: Device) -> str | None:
    programs = device.sm_count * config.programs_per_sm
    if problem.n_tokens > programs:
        return f"{problem.n_tokens} tokens are more than the {programs} programs"
    if config.programs_per_sm * config.warps * 32 > device.limits.threads_per_sm:
        return "the grid would not be resident: too many threads for a multiprocessor"
    return None


_TILE = ("rows", "block", "warps", "stages", "unroll")
RULES = (
    Rule(
        _why_not_scored,
        frozenset(["warps", *(f"score_{each}" for each in _TILE)]),
        plans=SCALAR_PLANS,
    ),
    Rule(
        _why_not_gathered,
        frozenset(["warps", *(f"gather_{each}" for each in _TILE)]),
        plans=SCALAR_PLANS,
    ),
    Rule(_why_not_overlapped, frozenset(["pdl"]), plans=TRITON_PLANS),
    Rule(
        _why_not_selected,
        frozenset(["selection", "select_warps", "gather_warps", "warps"]),
        plans=TRITON_PLANS,
    ),
    Rule(_why_not_prefetched, frozenset(["prefetch_margin"]), plans=SCALAR_PLANS),
    Rule(_why_not_resident, frozenset(["programs_per_sm", "warps"]), plans=(PersistentConfig,)),
    *tensor_config.RULES,
)


def known_good(problem: Problem, device: Device) -> list[TritonConfig]:
    """`STARTS` with no block wider than the hidden size, valid or not."""
    widest = max(64, next_power_of_2(problem.hidden_size))
    found = []
    for config in STARTS:
        blocks = {
            name: min(block, widest)
            for name, block in asdict(config).items()
            if name in ("score_block", "gather_block")
        }
        found.append(replace(config, **blocks))
    return found


def baseline_config(problem: Problem, device: Device) -> TritonConfig:
    """The pipeline every comparison is made with: `torch.topk`, one program a probed cluster."""
    rows = min(16, next_power_of_2(problem.cluster_size))
    return _fitted(StagedConfig(selection="torch_topk", gather_rows=rows), problem, device)


def default_config(problem: Problem, device: Device) -> TritonConfig:
    """A config that is valid for every problem, used where nothing better is known."""
    batched = BatchedConfig()
    if problem.n_tokens >= BATCHED_FROM and not why_broken(RULES, batched, problem, device):
        return batched
    return _fitted(StagedConfig(), problem, device)


def _fitted(config: StagedConfig, problem: Problem, device: Device) -> TritonConfig:
    """The config with tiles narrowed, then warps taken away, until it is valid."""
    data: dict[str, Any] = asdict(config)
    widest = max(64, next_power_of_2(problem.hidden_size))
    for stage, sums in (("score", problem.n_tokens), ("gather", 1)):
        data[f"{stage}_block"] = min(data[f"{stage}_block"], widest)
        room = MAX_TILE_PER_THREAD * data[f"{stage}_warps"] * 32
        while data[f"{stage}_rows"] * data[f"{stage}_block"] * sums > room:
            smaller = f"{stage}_rows" if data[f"{stage}_rows"] > 1 else f"{stage}_block"
            data[smaller] = data[smaller] // 2
        tile = data[f"{stage}_rows"] * data[f"{stage}_block"]
        data[f"{stage}_warps"] = min(data[f"{stage}_warps"], tile // 32)
    fitted = StagedConfig(**data)
    reason = why_broken(RULES, fitted, problem, device)
    if reason:
        raise FlashtuneError(f"no default kernel for {problem.describe()}: {reason}")
    return fitted


def slack_of(config: TritonConfig) -> int:
    """How many clusters more than asked a config may probe; none where a library selects."""
    if isinstance(config, DenseConfig):
        return ALL_CLUSTERS
    return config.slack if select_warps(config) else 0
