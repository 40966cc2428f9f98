"""Which head to take: the rule that `flashtune bench` and `flashtune cluster` share.

Usage:
    verdict = judge(heads)       # each with the time of a step and the answers that it keeps
    verdict.pick                 # the one to take
    verdict.describe()           # why

With fewer probes a head changes more answers, and the head is only a part of a step. So answers
are traded for time only if that is known to save enough of a whole step. Among the heads whose
step takes less than 5 % longer than the fastest one's, or cannot be told apart from it, the rule
takes the one that keeps the most answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashtune.kernels.measure.timing import Timing
from flashtune.tuner.clustering.quality_report import fastest

LEAST_SAME = 0.95  # of the answers: from here on a head counts as keeping them
MOST_COST = 0.05  # of a step's time


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A head: the model's step with it, and how many of how many answers stay the same.

    step: relative to the dense head's steps of the same rounds, with the spread of the median;
    speed: tokens/s as a multiple of the dense head's; added_bytes: in memory. dense: whether it is
    the dense head.
    """

    name: str
    step: Timing
    speed: float
    same: int
    answers: int
    added_bytes: int
    dense: bool = False

    @property
    def keeps(self) -> bool:
        """Whether enough answers stay the same."""
        return self.same >= LEAST_SAME * self.answers - 1e-9

    def __str__(self) -> str:
        """Name and figures."""
        if self.dense:
            return self.name
        return (
            f"{self.name} ({self.speed:.2f} x the dense head's tokens/s, "
            f"{self.same} of {self.answers} answers the same)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The head to take, the fastest, and the fastest of those that keep the answers."""

    pick: Judged
    quickest: Judged
    keeper: Judged | None

    def describe(self) -> str:
        """Which head to take, and why, in a sentence or two."""
        pick, quickest, keeper = self.pick, self.quickest, self.keeper
        gained = _longer(pick, quickest)
        noise = " (within the spread)" if gained >= MOST_COST else ""
        if pick is quickest:
            why = "the fastest"
        elif quickest.same < pick.same:
            why = (
                f"{quickest} takes {gained:.1%} less time per step{noise} but keeps fewer answers"
            )
        elif pick.dense:
            why = f"{quickest} takes {gained:.1%} less time per step{noise} but needs more memory"
        else:
            why = f"as fast as {quickest}, within the spread, and adds less memory"
        text = f"{pick}: {why}"
        if pick.keeps:
            return text
        if keeper is None:
            return f"{text}; none keeps {LEAST_SAME:.0%} of the answers"
        return (
            f"{text}; to keep {LEAST_SAME:.0%} of the answers, use {keeper}, whose step takes "
            f"{_longer(keeper, pick, of=pick):.0%} longer"
        )


def judge(heads: Sequence[Judged]) -> Verdict:
    """The head to take of several."""
    quickest = min(heads, key=lambda head: head.step.median_us)
    near = [head for head in heads if _is_near(head, quickest)]
    most = max(head.same / head.answers for head in near)
    keeping = [head for head in heads if head.keeps]
    return Verdict(
        pick=fastest(
            {head: head.step for head in near if head.same / head.answers >= most},
            lambda head: head.added_bytes,
        ),
        quickest=quickest,
        keeper=min(keeping, key=lambda head: head.step.median_us, default=None),
    )


def _is_near(head: Judged, quickest: Judged) -> bool:
    """Whether a step takes less than 5 % longer, as far as the spreads can tell."""
    longer = head.step.median_us - quickest.step.median_us
    spread = max(head.step.spread_us, quickest.step.spread_us)
    return longer < MOST_COST * quickest.step.median_us + spread


def _longer(head: Judged, other: Judged, of: Judged | None = None) -> float:
    """How much longer a head's step takes than another's, as a share of its own or `of`'s."""
    step = (of or head).step.median_us
    return (head.step.median_us - other.step.median_us) / step
