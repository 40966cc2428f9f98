"""From problem, config and device to the Python source of a decode step."""

from collections.abc import Mapping
from dataclasses import asdict

from flashtune.kernels.plans.config import Config, why_invalid
from flashtune.kernels.plans.tensor_config import BatchedConfig, DenseConfig, padded_tokens
from flashtune.kernels.plans.threshold import (
    prefetch_spread,
    shape_values,
    threshold_quantile,
    threshold_values,
)
from flashtune.kernels.plans.triton_config import (
    PersistentConfig,
    StagedConfig,
    TritonConfig,
    lanes,
    next_power_of_2,
    select_warps,
)
from flashtune.kernels.plans.triton_grid import launch_programs, score_tiles, tile_share
from flashtune.templates.render import Value, render
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


def render_triton(problem: Problem, config: Config, device: Device) -> str:
    """The candidate's Python source; raises FlashtuneError when the config is not valid for it."""
    reason = why_invalid(config, problem, device)
    if reason or not isinstance(config, TritonConfig):
        raise FlashtuneError(f"{config.plan} config not valid for {problem.describe()}: {reason}")
    values: dict[str, Value] = {
        **shape_values(problem),
        **asdict(config),
    }
    if isinstance(config, BatchedConfig | DenseConfig):
        values |= _tensor_values(problem, config, device)
    else:
        values |= _scalar_values(problem, config, device)
    if problem.epilogue == "logits" and not isinstance(config, DenseConfig):
        values |= _fill_values(problem, values)
    return render(config.template, values)


def _tensor_values(
    problem: Problem, config: BatchedConfig | DenseConfig, device: Device
) -> dict[str, Value]:
    """Grids of a program a tile, and the threshold search of `batched`."""
    programs = launch_programs(problem, config, device)
    values: dict[str, Value] = {
        "tokens_padded": padded_tokens(problem),
        "gather_programs": programs["gather"],
    }
    if isinstance(config, BatchedConfig):
        values |= {
            "share": tile_share(problem, config),
            "score_programs": programs["score"],
            **_threshold_values(problem, config),
        }
    return values


def _scalar_values(
    problem: Problem, config: StagedConfig | PersistentConfig, device: Device
) -> dict[str, Value]:
    """What the plans without tensor cores need."""
    if isinstance(config, PersistentConfig):
        values = _persistent_values(problem, config, device)
    else:
        values = _staged_values(problem, config, device)
    if select_warps(config):
        values |= _threshold_values(problem, config)
        values |= _prefetch_values(problem, config)
        values |= _share_values(problem, config, int(values["parts"]))
    return values


def _staged_values(problem: Problem, config: StagedConfig, device: Device) -> dict[str, Value]:
    """The grids."""
    programs = launch_programs(problem, config, device)
    return {
        "score_tiles": score_tiles(problem, config),
        "score_programs": programs["score"],
        "parts": programs["gather"] // problem.n_tokens,
    }


def _fill_values(problem: Problem, values: Mapping[str, Value]) -> dict[str, Value]:
    """How the output is shared out to be filled in: in whole lines of 128 bytes."""
    programs = int(values["programs" if "programs" in values else "score_programs"])
    warps = int(values["warps" if "warps" in values else "score_warps"])
    elements = problem.n_tokens * problem.vocab_size
    share = -(-elements // (64 * programs)) * 64
    return {"fill_share": share, "fill_block": min(next_power_of_2(share), 256 * warps)}


def _persistent_values(
    problem: Problem, config: PersistentConfig, device: Device
) -> dict[str, Value]:
    programs = launch_programs(problem, config, device)["decode"]
    return {
        "programs": programs,
        "slab": -(-problem.n_clusters // programs),
        "parts": programs // problem.n_tokens,
    }


def _threshold_values(
    problem: Problem, config: StagedConfig | PersistentConfig | BatchedConfig
) -> dict[str, Value]:
    """The threshold search: where it starts, how scores lie in lanes."""
    width = lanes(problem, select_warps(config))
    return {
        **threshold_values(problem, config.slack),
        "lanes": width,
        "members": -(-problem.n_clusters // width),
        "prefetch": False,
    }


def _prefetch_values(
    problem: Problem, config: StagedConfig | PersistentConfig
) -> dict[str, Value]:
    """Which clusters' rows are asked for before it is known whether they are selected."""
    least = threshold_quantile(problem, config.slack) - config.prefetch_margin / 100
    return {"prefetch": config.prefetch_margin >= 0, "prefetch_quantile": round(least, 6)}


def _share_values(
    problem: Problem, config: StagedConfig | PersistentConfig, parts: int
) -> dict[str, Value]:
    """How the selected rows, and the clusters to prefetch from, are shared out among programs."""
    touched = (config.gather_rows - 2) // problem.cluster_size + 2 if config.gather_rows > 1 else 1
    spread = prefetch_spread(problem, parts)
    stripe = -(-problem.n_clusters // (parts // spread))
    stripe_padded = next_power_of_2(stripe)
    pieces = max(1, select_warps(config) * 32 // stripe_padded)
    while pieces > 1 and problem.cluster_bytes % (pieces * spread * 16):
        pieces //= 2
    return {
        "spread": spread,
        "touched": touched,
        "stripe": stripe,
        "stripe_padded": stripe_padded,
        "pieces": pieces,
        "piece_bytes": problem.cluster_bytes // (pieces * spread),
    }
