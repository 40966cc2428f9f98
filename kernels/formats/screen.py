"""A screen: the formats in which candidates are found, and how many are decided again.

Usage:
    Screen.parse("int8")              # int8 centroids, int8 rows, the best 8 decided again
    Screen.parse("int4/int8:16")      # int4 centroids, int8 rows, the best 16 decided again
    Screen.parse("int8").problem(problem)
    screen_of(given)                  # a Screen, its text, "none" or None
"""

import re
from dataclasses import dataclass, replace

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import FORMATS, Problem

_ENOUGH = {"int8": 8, "int4": 32}
"""How many candidates to decide again: without clusters, that gave the dense head's token in all
of 5,433 steps of SmolLM2 with int8 rows, in all but one with int4 (docs/formats-quality.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Screen:
    """Centroids and rows in quantised formats; the model's own rows decide the best n_rescored.

    With n_rescored 0 nothing is decided again: the quantised logits are the answer.
    Raises FlashtuneError unless both are quantised formats.
    """

    centroids: str
    rows: str
    n_rescored: int

    def __post_init__(self) -> None:
        """Reject formats that screen nothing."""
        quantised = [name for name, each in FORMATS.items() if each.quantised]
        for name in (self.centroids, self.rows):
            if name not in quantised:
                raise FlashtuneError(
                    f"a screen's formats must be among {', '.join(quantised)}, not {name!r}"
                )
        if type(self.n_rescored) is not int or self.n_rescored < 0:
            raise FlashtuneError(
                "the tokens that a screen decides again must be a whole number, not "
                f"{self.n_rescored!r}"
            )

    @classmethod
    def parse(cls, text: str) -> "Screen":
        """From `FORMAT`, `CENTROIDS/ROWS`, and `:NUMBER` of tokens to decide again after either.

        Raises FlashtuneError for any other text.
        """
        found = re.fullmatch(r"(\w+)(?:/(\w+))?(?::(\d{1,9}))?", text)
        if not found:
            raise FlashtuneError(
                "a screen must have the form int8, int4/int8 (centroids/rows) or int4:32 "
                f"(tokens to decide again), not {text!r}"
            )
        centroids, rows, number = found[1], found[2] or found[1], found[3]
        enough = _ENOUGH.get(rows, 0) if number is None else int(number)
        return cls(centroids=centroids, rows=rows, n_rescored=enough)

    def problem(self, problem: Problem) -> Problem:
        """A problem of plain weights, screened."""
        return replace(
            problem,
            weight_dtype=self.rows,
            centroid_dtype=self.centroids,
            model_dtype=problem.state_dtype,
            n_rescored=min(self.n_rescored, problem.vocab_size),
        )

    def __str__(self) -> str:
        """As `parse` reads it."""
        formats = self.rows if self.centroids == self.rows else f"{self.centroids}/{self.rows}"
        return f"{formats}:{self.n_rescored}"


NO_SCREEN = "none"


def screen_of(given: Screen | str | None) -> Screen | None:
    """The screen, given as a Screen or as text; None and `none` mean no screen.

    Raises FlashtuneError for anything else.
    """
    if given is None or isinstance(given, Screen):
        return given
    if not isinstance(given, str):
        raise FlashtuneError(f"a screen must be a Screen or a string such as int8, not {given!r}")
    return None if given == NO_SCREEN else Screen.parse(given)
