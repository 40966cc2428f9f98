"""Screens: texts that name one, and the problems that they make."""

import pytest

from flashtune.kernels.formats.screen import Screen
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

PLAIN = Problem(vocab_size=20, hidden_size=64, n_clusters=5, n_probes=2, weight_dtype="fp16",
                centroid_dtype="fp16")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "centroids", "rows", "n_rescored"),
    [
        ("int8", "int8", "int8", 8),
        ("int4", "int4", "int4", 32),
        ("int4/int8", "int4", "int8", 8),
        ("int8/int4:5", "int8", "int4", 5),
        ("int8:0", "int8", "int8", 0),
    ],
)
def test_texts(text: str, centroids: str, rows: str, n_rescored: int) -> None:
    screen = Screen.parse(text)
    assert screen == Screen(centroids=centroids, rows=rows, n_rescored=n_rescored)
    assert Screen.parse(str(screen)) == screen


@pytest.mark.parametrize("text", ["", "bf16", "int8/", "int8/fp32", "int9", "int8:-1", "int8:x"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(FlashtuneError, match="a screen"):
        Screen.parse(text)


def test_a_problem_is_screened() -> None:
    problem = Screen.parse("int4/int8").problem(PLAIN)
    assert (problem.centroid_dtype, problem.weight_dtype) == ("int4", "int8")
    assert (problem.model_dtype, problem.n_rescored) == ("fp16", 8)
    assert Screen.parse("int4").problem(PLAIN).n_rescored == 20  # all that there are
