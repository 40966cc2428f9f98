"""The stages of the plan `streamed`."""

from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.stage import (
    Stage,
    one_decides,
    row_stream,
    scales,
    scattered,
    score_moved,
    search,
)


def streamed_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """Score, the search in every block, then the rows; the block that decides is one of them."""
    problem, config, device = candidate.problem, candidate.config, candidate.device
    gather = needs["gather"]
    probed = problem.n_probes + config.slack / 2 + problem.n_pinned
    rows = row_stream("gather", candidate, gather, probed * problem.cluster_size)
    rows["loads"] += 1  # the scores that a block lists its clusters by
    return [
        Stage(
            **scales(device),
            overlapped=float(len(needs)),  # always by programmatic dependent launch
            **row_stream("score", candidate, needs["score"], problem.n_clusters),
            moved=score_moved(problem),
        ),
        Stage(**scales(device), **search(candidate, gather.warps, 1)),
        Stage(
            **scales(device),
            **rows,
            moved=probed * problem.cluster_bytes,
            scattered=scattered(problem, probed * problem.cluster_size),
            prefetched=float(config.prefetch),
            ends=1.0,
            arrivals=gather.programs / 1000,
        ),
        *one_decides(candidate, gather),
    ]
