"""The plans whose times are predicted, and the stages of a candidate.

Usage:
    for stage in stages_of(candidate, uses):
        stage.moved, stage.waves, stage.loads
"""

from collections.abc import Callable, Mapping, Sequence

from flashtune.kernels.plans import BATCHED, DENSE, PERSISTENT, STAGED, STREAMED
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.predict.stages.batched import batched_stages
from flashtune.kernels.predict.stages.dense import dense_stages
from flashtune.kernels.predict.stages.persistent import persistent_stages
from flashtune.kernels.predict.stages.stage import Stage
from flashtune.kernels.predict.stages.staged import staged_stages
from flashtune.kernels.predict.stages.streamed import streamed_stages
from flashtune.tuning_db.errors import FlashtuneError

StagesOf = Callable[[Candidate, Mapping[str, KernelUse]], list[Stage]]
PLAN_STAGES: dict[str, StagesOf] = {
    STAGED.name: staged_stages,
    PERSISTENT.name: persistent_stages,
    BATCHED.name: batched_stages,
    DENSE.name: dense_stages,
    STREAMED.name: streamed_stages,
}


def stages_of(candidate: Candidate, uses: Sequence[KernelUse]) -> list[Stage]:
    """The stages of one step. `uses` are the compiled kernels' needs, or the plan's estimates.

    Raises FlashtuneError for a plan that the cost model does not know, and where it is not said
    what one of the candidate's kernels needs.
    """
    stages = PLAN_STAGES.get(candidate.plan.name)
    if stages is None:
        raise FlashtuneError(
            f"times of plan {candidate.plan.name} cannot be predicted: search on the machine "
            "itself"
        )
    needs = {use.kernel: use for use in uses}
    unsaid = [use.kernel for use in candidate.launches if use.kernel not in needs]
    if unsaid:
        raise FlashtuneError(f"the needs of the kernel {unsaid[0]} are not known")
    return stages(candidate, needs)
