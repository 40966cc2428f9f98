"""How the Triton plans convert int8 numbers to the dtype that they multiply in.

`cast` is the conversion instruction, of which a multiprocessor does 16 per cycle: for int8 rows it
can take longer than the memory. `bits` takes two to three instructions of a kind of which it does
64 per cycle (templates/triton/_widen.py.j2). Both are exact.
"""

from flashtune.kernels.plans.candidate import Candidate, Rule

WIDENED = ("cast", "bits")


def _why_not_widened(candidate: Candidate) -> str | None:
    problem = candidate.problem
    if candidate.config.widen == "cast":
        return None
    if "int8" not in (problem.weight_dtype, problem.centroid_dtype):
        return "widen is about rows in int8, of which there are none"
    return None


BY_BITS = Rule(_why_not_widened, frozenset(["widen"]))
