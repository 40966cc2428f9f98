"""The plans of Triton kernels that multiply on tensor cores, for several tokens at a time."""

from dataclasses import dataclass
from typing import ClassVar

from flashtune.kernels.plans.knob import Rule, knob
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import DTYPE_BYTES, Problem

LEAST_TILE = 16  # rows, columns and tokens of a product on tensor cores
MOST_SUMS_PER_THREAD = 64  # float32 accumulators beside what is being loaded
MOST_PER_THREAD = 128  # elements of a tile that no stage in shared memory takes
SLACKS = (0, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchedConfig:
    """Score, a threshold for each token, then one pass over the clusters that any token wants.

    A cluster that several tokens probe is read once. A tile of the gather holds as many whole
    clusters as fit `gather_rows`; rows that no token wants are not read. Knobs as in StagedConfig.
    """

    plan: ClassVar[str] = "batched"
    template: ClassVar[str] = "triton/batched.py.j2"

    score_rows: int = knob(32, (16, 32, 64, 128))
    score_block: int = knob(128, (32, 64, 128, 256))
    score_warps: int = knob(2, (1, 2, 4, 8))
    score_stages: int = knob(3, (1, 2, 3, 4, 5))
    select_warps: int = knob(16, (4, 8, 16, 32))
    slack: int = knob(16, SLACKS)
    gather_rows: int = knob(16, (16, 32, 64, 128, 256))
    gather_block: int = knob(128, (32, 64, 128, 256))
    gather_warps: int = knob(1, (1, 2, 4, 8))
    gather_stages: int = knob(3, (1, 2, 3, 4, 5))
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig:
    """No retrieval: the logits of all rows and their best, in one launch.

    What is right for a FlashHead, since probing more is always allowed, and faster where the
    tokens together want most clusters.
    """

    plan: ClassVar[str] = "dense"
    template: ClassVar[str] = "triton/dense.py.j2"

    gather_rows: int = knob(64, (16, 32, 64, 128, 256))
    gather_block: int = knob(128, (32, 64, 128, 256))
    gather_warps: int = knob(4, (1, 2, 4, 8))
    gather_stages: int = knob(3, (1, 2, 3, 4, 5))
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


TensorConfig = BatchedConfig | DenseConfig
TENSOR_PLANS = (BatchedConfig, DenseConfig)


def padded_tokens(problem: Problem) -> int:
    """Tokens as wide as a product on tensor cores is."""
    return max(LEAST_TILE, 1 << (problem.n_tokens - 1).bit_length())


def _why_not_tile(
    stage: str, config: TensorConfig, problem: Problem, device: Device
) -> str | None:
    rows, block = getattr(config, f"{stage}_rows"), getattr(config, f"{stage}_block")
    warps, stages = getattr(config, f"{stage}_warps"), getattr(config, f"{stage}_stages")
    widest = max(LEAST_TILE, 1 << (problem.hidden_size - 1).bit_length())
    tokens, threads = padded_tokens(problem), warps * 32
    if block > widest:
        return f"{stage}_block {block} is wider than the hidden size {problem.hidden_size}"
    if rows * tokens > MOST_SUMS_PER_THREAD * threads:
        return f"{rows}x{tokens} sums do not fit the registers of {warps} warps"
    if stages == 1 and rows * block > MOST_PER_THREAD * threads:
        return f"the {stage} tile {rows}x{block} does not fit the registers of {warps} warps"
    if stages > 1 and block >= problem.hidden_size:
        return f"{stage}_stages needs a loop over the hidden size"
    staged = stages * (rows + tokens) * block * DTYPE_BYTES[problem.weight_dtype]
    if staged > device.limits.shared_per_block:
        return f"the {stage} stages do not fit in shared memory"
    return None


def _why_not_scored(config: BatchedConfig, problem: Problem, device: Device) -> str | None:
    return _why_not_tile("score", config, problem, device)


def _why_not_gathered(config: TensorConfig, problem: Problem, device: Device) -> str | None:
    return _why_not_tile("gather", config, problem, device)


def _why_not_whole(config: BatchedConfig, problem: Problem, device: Device) -> str | None:
    if config.gather_rows < problem.cluster_size:
        return f"a cluster of {problem.cluster_size} does not fit {config.gather_rows} rows"
    return None


def _why_not_multiplied(config: BatchedConfig, problem: Problem, device: Device) -> str | None:
    if problem.weight_dtype != problem.centroid_dtype:
        return (
            f"tensor cores take one dtype, not weights in {problem.weight_dtype} "
            f"and centroids in {problem.centroid_dtype}"
        )
    return None


_TILE = ("rows", "block", "warps", "stages")
RULES = (
    Rule(_why_not_scored, frozenset(f"score_{each}" for each in _TILE), plans=(BatchedConfig,)),
    Rule(_why_not_gathered, frozenset(f"gather_{each}" for each in _TILE), plans=TENSOR_PLANS),
    Rule(_why_not_whole, frozenset(["gather_rows"]), plans=(BatchedConfig,)),
    Rule(_why_not_multiplied, frozenset(["slack"]), plans=(BatchedConfig,)),
)
