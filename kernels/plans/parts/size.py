"""The sizes that every template takes."""

from flashtune.kernels.epilogues.epilogue import FILL, epilogue_of
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans.candidate import Candidate, KernelUse, Rule
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


def read_by(language: str) -> Rule:
    """For plans whose templates read every format that has a name in their language."""

    def why_not_read(candidate: Candidate) -> str | None:
        problem, plan = candidate.problem, candidate.config.plan
        for name in (problem.weight_dtype, problem.centroid_dtype):
            if not getattr(format_of(name), language):
                return f"plan {plan} does not read {name}"
        return None

    return Rule(why_not_read)


def stored_values(problem: Problem) -> dict[str, Value]:
    """How matrices are stored, where rows are, what is rescored, and what is pinned."""
    return {
        "weight_format": problem.weight_dtype,
        "centroid_format": problem.centroid_dtype,
        "state_format": problem.state_dtype,
        "rescored": problem.n_rescored,
        "pinned": problem.n_pinned,
        "in_place": problem.in_place,
    }


def epilogue_values(problem: Problem, first: KernelUse) -> dict[str, Value]:
    """What the epilogue requires of the first launch."""
    return {**epilogue_of(problem.epilogue).values(problem, first)}
