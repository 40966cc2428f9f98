"""The sizes that every template is filled in with."""

from flashtune.kernels.epilogues.epilogue import FILL, epilogue_of
from flashtune.kernels.plans.candidate import KernelUse
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


def epilogue_values(problem: Problem, first: KernelUse) -> dict[str, Value]:
    """What the epilogue asks of the first launch."""
    return {**epilogue_of(problem.epilogue).values(problem, first)}
