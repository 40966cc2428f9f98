"""The sizes that every template is filled in with, and who fills the output of `logits` in."""

from flashtune.kernels.plans.candidate import KernelUse
from flashtune.kernels.weights import FILL
from flashtune.templates.render import Value
from flashtune.tuning_db.problem import Problem


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def shape_values(problem: Problem) -> dict[str, Value]:
    """The sizes of the problem, and what comes out."""
    return {
        "vocab": problem.vocab_size,
        "hidden": problem.hidden_size,
        "clusters": problem.n_clusters,
        "cluster_size": problem.cluster_size,
        "probes": problem.n_probes,
        "tokens": problem.n_tokens,
        "epilogue": problem.epilogue,
        "fill": FILL,
    }


def fill_values(problem: Problem, first: KernelUse) -> dict[str, Value]:
    """How the output is shared out to be filled in by the first launch: in lines of 128 bytes."""
    if problem.epilogue != "logits":
        return {}
    elements = problem.n_tokens * problem.vocab_size
    share = -(-elements // (64 * first.programs)) * 64
    return {"fill_share": share, "fill_block": min(next_power_of_2(share), 256 * first.warps)}
