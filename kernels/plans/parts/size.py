"""The sizes that every template is filled in with."""

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


def why_not_plain(candidate: Candidate) -> str | None:
    """For plans whose templates read plain numbers, and probe what scores best alone."""
    problem, plan = candidate.problem, candidate.config.plan
    for name in (problem.weight_dtype, problem.centroid_dtype):
        if format_of(name).quantised:
            return f"plan {plan} does not read {name}"
    return f"plan {plan} pins no clusters" if problem.n_pinned else None


PLAIN = Rule(why_not_plain)


def stored_values(problem: Problem) -> dict[str, Value]:
    """How matrices are stored, which candidates are decided again, and what is pinned."""
    return {
        "weight_format": problem.weight_dtype,
        "centroid_format": problem.centroid_dtype,
        "state_format": problem.state_dtype,
        "rescored": problem.n_rescored,
        "pinned": problem.n_pinned,
    }


def epilogue_values(problem: Problem, first: KernelUse) -> dict[str, Value]:
    """What the epilogue asks of the first launch."""
    return {**epilogue_of(problem.epilogue).values(problem, first)}
