"""How the Triton plans multiply rows in int8 and int4.

`cast` converts int8 to the dtype that it is multiplied in by the conversion instruction, of which
a multiprocessor does 16 per cycle: for int8 rows it can take longer than the memory. `bits` takes
two to three instructions of a kind of which it does 64 per cycle (templates/triton/_widen.py.j2).
Both are exact. With `digits` nothing is widened: rows of int8 and int4 are multiplied as they are
(digits.py).
"""

from flashtune.kernels.plans.candidate import Candidate, Rule
from flashtune.kernels.plans.parts.digits import why_not_multiplied

WIDENED = ("cast", "bits")
MULTIPLIED = (*WIDENED, "digits")


def _why_not_widened(candidate: Candidate) -> str | None:
    problem = candidate.problem
    if candidate.config.widen != "bits":
        return None
    if "int8" not in (problem.weight_dtype, problem.centroid_dtype):
        return "widen needs rows in int8"
    return None


BY_BITS = Rule(_why_not_widened, frozenset(["widen"]))
BY_DIGITS = Rule(why_not_multiplied, frozenset(["widen"]))
