"""The plan `dense`: the dense head as a kernel, if tokens together probe most clusters."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from flashtune.kernels.plans.candidate import Candidate, KernelUse, Plan, Rule
from flashtune.kernels.plans.knob import Config, knob
from flashtune.kernels.plans.parts.digits import digit_launches, digit_values
from flashtune.kernels.plans.parts.screen import (
    DECIDE_WARPS,
    single_rows_passes,
    single_rows_values,
    why_not_bounded,
)
from flashtune.kernels.plans.parts.size import read_by, shape_values, stored_values
from flashtune.kernels.plans.parts.tensor_tile import (
    TENSOR_TILE,
    expected_tensor_pass,
    padded_tokens,
    why_not_tensor_tiled,
)
from flashtune.kernels.plans.parts.tile import narrowed, why_not_overlapped
from flashtune.kernels.plans.parts.widen import BY_BITS, BY_DIGITS, MULTIPLIED
from flashtune.templates.render import Value
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem

ALL_CLUSTERS = 2**31 - 1  # the slack of a step that probes every cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig(Config):
    """No retrieval: the logits of all rows and their best, in one launch.

    This is valid for a FlashHead, since probing more is always allowed, and faster if the tokens
    together probe most clusters.
    """

    plan: ClassVar[str] = "dense"

    widen: str = knob("cast", MULTIPLIED)
    gather_rows: int = knob(64, (16, 32, 64, 128, 256))
    gather_block: int = knob(128, (32, 64, 128, 256))
    gather_warps: int = knob(4, (1, 2, 4, 8))
    gather_stages: int = knob(3, (1, 2, 3, 4, 5))
    evict: str = knob("evict_first", ("evict_first", "no_hint"))
    pdl: bool = knob(False, (False, True))


_STARTS = (
    DenseConfig(gather_rows=128, gather_block=64, gather_stages=5, pdl=True),
    DenseConfig(),
)  # starting points of searches, found by hand on one H200


def _launches(candidate: Candidate) -> Sequence[KernelUse]:
    """One program per tile."""
    gather = expected_tensor_pass("gather", candidate, _tiles(candidate))
    return (*digit_launches(candidate), gather, *single_rows_passes(candidate, gather))


def _tiles(candidate: Candidate) -> int:
    return -(-candidate.problem.vocab_size // int(candidate.config.gather_rows))


def _values(candidate: Candidate) -> dict[str, Value]:
    problem, programs = candidate.problem, _tiles(candidate)
    return {
        **shape_values(problem),
        **stored_values(problem),
        **asdict(candidate.config),
        **digit_values(candidate),
        "tokens_padded": padded_tokens(candidate),
        "gather_programs": programs,
        **single_rows_values(problem, programs, programs),
    }


def _starts(problem: Problem, device: Device) -> Sequence[DenseConfig]:
    return narrowed(_STARTS, problem)


DENSE = Plan(
    config=DenseConfig,
    builder="triton",
    template="triton/dense.py.j2",
    rules=(
        read_by("triton"),
        Rule(why_not_overlapped, frozenset(["pdl"])),
        BY_BITS,
        BY_DIGITS,
        Rule(
            lambda each: why_not_tensor_tiled("gather", each),
            frozenset(["widen", *(f"gather_{each}" for each in TENSOR_TILE)]),
        ),
        Rule(
            lambda each: why_not_bounded(each.problem, _tiles(each), DECIDE_WARPS),
            frozenset(["gather_rows"]),
        ),
    ),
    launches=_launches,
    values=_values,
    slack=lambda config: ALL_CLUSTERS,
    starts=_starts,
    tensor_cores=True,
)
