"""The forms in which a head can be read: clusters, number formats, and their cost in bytes.

Usage:
    forms = forms_of("bf16", screens)            # FlashHeads, heads without clusters, dense heads
    form.read_bytes(problem, vocab_size)         # of a step
    rounded("int4", weight)                      # the numbers that a format keeps of a weight

A dense head has no clusters, and nothing of it is re-scored. `q6_k` is a format only of dense
heads, for comparison: no kernel here reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.formats.screen import Screen
from flashtune.tuner.clustering import six_bits
from flashtune.tuning_db.problem import Problem

USUAL_SCREENS = ("int8", "int4/int8", "int4", "int8:0", "int4/int8:0", "int4:0")
_DENSE = ("int8", "int4", six_bits.NAME)
_ROWS_AT_ONCE = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadForm:
    """rows, centroids: their formats' names; centroids: empty for a head without clusters.

    n_rescored: how many of the best tokens are re-scored from the model's own rows.
    """

    rows: str
    centroids: str = ""
    n_rescored: int = 0

    @property
    def clustered(self) -> bool:
        """Whether it probes clusters."""
        return bool(self.centroids)

    @property
    def screen(self) -> Screen | None:
        """Its screen; None for plain numbers and for dense heads."""
        if self.clustered and not format_of(self.rows).quantised:
            return None
        if not self.clustered and not self.n_rescored:
            return None
        centroids = self.centroids or self.rows
        return Screen(centroids=centroids, rows=self.rows, n_rescored=self.n_rescored)

    def read_bytes(self, problem: Problem, vocab_size: int) -> int:
        """The fewest bytes that a step of one token reads.

        problem: that of the plain head with clusters; vocab_size: the model's, which the problem
        may round up.
        """
        if self.clustered:
            screen = self.screen
            return (problem if screen is None else screen.problem(problem)).read_bytes
        again = format_of(problem.state_dtype).bytes_of(self.n_rescored, problem.hidden_size)
        return stored_bytes(self.rows, vocab_size, problem.hidden_size) + again

    def added_bytes(self, problem: Problem, vocab_size: int) -> int:
        """Bytes that it keeps in memory besides the model's weight; arguments as in `read_bytes`.

        Does not count the clusters that many special tokens need.
        """
        width, ids = problem.hidden_size, 4 * problem.vocab_size
        if self.clustered:
            centroids = stored_bytes(self.centroids, problem.n_clusters, width)
            return stored_bytes(self.rows, problem.vocab_size, width) + centroids + ids
        if self.rows == problem.state_dtype:
            return 0
        rows = stored_bytes(self.rows, vocab_size, width)
        return rows if self.screen is None else rows + ids

    def __str__(self) -> str:
        """Its name in tables: `bf16`, `int4/int8:8`, `no clusters int4:32`, `dense int8`."""
        if self.clustered:
            return self.rows if self.screen is None else str(self.screen)
        return f"dense {self.rows}" if self.screen is None else f"no clusters {self.screen}"


def with_clusters(dtype: str, screen: Screen | None) -> HeadForm:
    """A FlashHead's form; without a screen, plain numbers in that dtype."""
    if screen is None:
        return HeadForm(rows=dtype, centroids=dtype)
    return HeadForm(rows=screen.rows, centroids=screen.centroids, n_rescored=screen.n_rescored)


def forms_of(dtype: str, screens: Sequence[Screen]) -> list[HeadForm]:
    """The FlashHeads in that dtype and behind each screen, then the heads without clusters.

    The latter are each screen's rows over the whole vocabulary, and the quantised dense heads that
    a user might choose instead. Without screens there are none to compare.
    """
    forms = [with_clusters(dtype, screen) for screen in (None, *screens)]
    whole = [HeadForm(rows=each.rows, n_rescored=each.n_rescored) for each in screens]
    forms += [form for form in whole if form.n_rescored]
    if screens:
        forms += [form for form in whole if not form.n_rescored]
        forms += [HeadForm(rows=rows) for rows in _DENSE]
    return list(dict.fromkeys(forms))


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a format keeps of a weight `[rows, width]`, in float32."""
    parts = torch.split(weight, _ROWS_AT_ONCE)
    if name == six_bits.NAME:
        return torch.cat([six_bits.rounded(part) for part in parts])
    kept = format_of(name)
    if not kept.quantised:
        return weight.float()
    width = weight.shape[1]
    return torch.cat([kept.unpack(kept.pack(part), width, torch.float32) for part in parts])


def stored_bytes(name: str, rows: int, width: int) -> int:
    """Bytes of a matrix in a format, scales included."""
    if name == six_bits.NAME:
        return six_bits.bytes_of(rows, width)
    return format_of(name).bytes_of(rows, width)
