"""How many programs each launch of a Triton config has.

Usage:
    launch_programs(problem, config, device)     # {"score": 4748, "gather": 132}

Rendering and whoever predicts without rendering both ask here.
"""

from flashtune.kernels.plans.tensor_config import BatchedConfig, DenseConfig
from flashtune.kernels.plans.triton_config import PersistentConfig, StagedConfig, TritonConfig
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


def launch_programs(problem: Problem, config: TritonConfig, device: Device) -> dict[str, int]:
    """Programs of each of the config's own kernels, by name, in the order of their launches."""
    if isinstance(config, PersistentConfig):
        return {"decode": device.sm_count * config.programs_per_sm}
    if isinstance(config, StagedConfig):
        return _staged_programs(problem, config, device)
    gather = {"gather": -(-problem.vocab_size // tile_share(problem, config))}
    if isinstance(config, DenseConfig):
        return gather
    return {"score": score_tiles(problem, config), "select": problem.n_tokens, **gather}


def score_tiles(problem: Problem, config: StagedConfig | BatchedConfig) -> int:
    """Tiles of centroids; a program takes one, or in `staged` may loop over some."""
    return -(-problem.n_clusters // config.score_rows)


def tile_share(problem: Problem, config: BatchedConfig | DenseConfig) -> int:
    """Rows that a tile of the gather is for: in `batched` those of whole clusters."""
    if isinstance(config, DenseConfig):
        return config.gather_rows
    return config.gather_rows // problem.cluster_size * problem.cluster_size


def _staged_programs(problem: Problem, config: StagedConfig, device: Device) -> dict[str, int]:
    """A program a tile, or a fixed number of programs that loop."""
    tiles = score_tiles(problem, config)
    looping = config.score_programs_per_sm * device.sm_count
    slack = 0 if config.selection == "torch_topk" else config.slack
    rows = (problem.n_probes + slack // 2) * problem.cluster_size
    parts = -(-rows // config.gather_rows)
    if config.selection == "in_gather":
        parts = max(1, config.gather_programs_per_sm * device.sm_count // problem.n_tokens)
    programs = {"score": min(looping, tiles) if looping else tiles}
    if config.selection == "threshold":
        programs["select"] = problem.n_tokens
    return {**programs, "gather": parts * problem.n_tokens}
