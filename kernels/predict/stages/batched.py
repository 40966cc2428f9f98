"""The stages of the plan `batched`."""

from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.stage import (
    Stage,
    decided_singly,
    made_digits,
    scales,
    scattered,
    score_moved,
    search,
    starts,
    tensor_pass,
)


def batched_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """Every tile of the gather asks whether a token wants any of its clusters; few go on.

    With a list, all of its tiles go on, and the programs that select must write it first.
    """
    problem, config, device = candidate.problem, candidate.config, candidate.device
    gather = needs["gather"]
    clusters = problem.n_probes + config.slack / 2 + problem.n_pinned
    probed = clusters / problem.n_clusters
    wanted = 1 - (1 - min(1.0, probed)) ** problem.n_tokens  # the share of the clusters
    selection = search(candidate, config.select_warps, 1)
    if config.visit == "listed":
        listed = wanted * problem.vocab_size / config.gather_rows
        going_on = min(1.0, listed / gather.programs)  # the share of the tiles
        selection["loads"] += 4  # a token's own list there and back, marks, places in the list
    else:
        going_on = 1 - (1 - wanted) ** (config.gather_rows // problem.cluster_size)
    tiles = tensor_pass("gather", candidate, gather, going_on)
    tiles["loads"] += 2 + 2 * (config.visit == "listed")  # thresholds and scores; a list before
    return [
        *made_digits(candidate, needs),
        Stage(
            **scales(device),
            **starts(candidate, len(needs)),
            **tensor_pass("score", candidate, needs["score"], 1.0),
            moved=score_moved(problem),
        ),
        Stage(**scales(device), **selection),
        Stage(
            **scales(device),
            **tiles,
            moved=wanted * problem.n_clusters * problem.cluster_bytes,
            scattered=scattered(problem, problem.n_tokens * clusters * problem.cluster_size),
            ends=1.0,
            arrivals=gather.programs / 1000,
        ),
        *decided_singly(candidate, needs),
    ]
