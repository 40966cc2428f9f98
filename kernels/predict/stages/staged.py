"""The stages of the plan `staged`."""

import math
from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.staged import select_warps
from flashtune.kernels.predict.stages.stage import (
    Stage,
    decision,
    gather,
    made_digits,
    row_pass,
    scales,
    score_moved,
    search,
    sharing,
    sorting,
    starts,
)


def staged_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """Score, select, gather; decide, where candidates are screened."""
    problem, config, device = candidate.problem, candidate.config, candidate.device
    score, gathering = needs["score"], needs["gather"]
    tiles = -(-problem.n_clusters // config.score_rows) / score.programs
    own, in_gather = scales(device), config.selection == "in_gather"
    stages = [
        *made_digits(candidate, needs),
        Stage(
            **own,
            **starts(candidate, len(needs)),
            **row_pass("score", candidate, score, math.ceil(tiles)),
            moved=score_moved(problem),
        ),
    ]
    if config.selection == "torch_topk":
        stages.append(Stage(**own, launches=1.0, **sorting(problem)))
    else:
        programs = sharing(gathering, device) if in_gather else 1
        stages.append(Stage(**own, **search(candidate, select_warps(config), programs)))
    stages.append(gather(candidate, gathering, lists=not in_gather))
    parts = gathering.programs // problem.n_tokens
    return [*stages, *decision(candidate, gathering, parts, gathering.warps)]
