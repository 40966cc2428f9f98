"""The stages of the plan `persistent`."""

import math
from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.stage import (
    Stage,
    gather,
    row_pass,
    scales,
    score_moved,
    search,
    sharing,
    starts,
)


def persistent_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """Score up to the barrier, select, gather: all by the same programs."""
    problem, config, device = candidate.problem, candidate.config, candidate.device
    use = needs["decode"]
    tiles = math.ceil(math.ceil(problem.n_clusters / use.programs) / config.score_rows)
    score = row_pass("score", candidate, use, tiles)
    ahead = max(1, config.slab_stages - 1)  # tiles whose loads are under way
    score |= {name: score[name] / ahead for name in ("loads", "repeats", "turns")}
    return [
        Stage(
            **scales(device),
            **starts(candidate, 1),
            **score,
            moved=score_moved(problem),
            barriers=1.0,
        ),
        Stage(**scales(device), **search(candidate, config.warps, sharing(use, device))),
        gather(candidate, use, lists=False),
    ]
