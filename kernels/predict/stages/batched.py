"""The stages of the plan `batched`."""

from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.stage import (
    Stage,
    decided_singly,
    scales,
    score_moved,
    search,
    starts,
    tensor_pass,
)


def batched_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """Every tile of the gather asks whether a token wants any of its clusters; few go on."""
    problem, config, device = candidate.problem, candidate.config, candidate.device
    gather = needs["gather"]
    clusters = problem.n_probes + config.slack / 2 + problem.n_pinned
    probed = clusters / problem.n_clusters
    wanted = 1 - (1 - min(1.0, probed)) ** problem.n_tokens  # the share of the clusters
    in_tile = config.gather_rows // problem.cluster_size
    going_on = 1 - (1 - wanted) ** in_tile  # the share of the tiles
    tiles = tensor_pass("gather", candidate, gather, going_on)
    tiles["loads"] += 2  # thresholds and scores
    return [
        Stage(
            **scales(device),
            **starts(candidate, len(needs)),
            **tensor_pass("score", candidate, needs["score"], 1.0),
            moved=score_moved(problem),
        ),
        Stage(**scales(device), **search(candidate, config.select_warps, 1)),
        Stage(
            **scales(device),
            **tiles,
            moved=wanted * problem.n_clusters * problem.cluster_bytes,
            ends=1.0,
            arrivals=gather.programs / 1000,
        ),
        *decided_singly(candidate, gather, config.select_warps),
    ]
