"""The stage of the plan `dense`."""

from collections.abc import Mapping

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.stage import (
    Stage,
    decided_singly,
    made_digits,
    scales,
    scattered,
    starts,
    tensor_pass,
)


def dense_stages(candidate: Candidate, needs: Mapping[str, KernelUse]) -> list[Stage]:
    """One pass over all rows."""
    problem, use = candidate.problem, needs["gather"]
    return [
        *made_digits(candidate, needs),
        Stage(
            **scales(candidate.device),
            **starts(candidate, len(needs)),
            **tensor_pass("gather", candidate, use, 1.0),
            moved=problem.n_clusters * problem.cluster_bytes + problem.written_bytes,
            scattered=scattered(problem, problem.n_tokens * problem.vocab_size),
            ends=1.0,
            arrivals=use.programs / 1000,
        ),
        *decided_singly(candidate, needs),
    ]
