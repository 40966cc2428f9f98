"""Hidden states in digits: what they stand for, and what their products are."""

from dataclasses import replace

import pytest
import torch
from toys.interpreted import InterpretedStep

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.testing.runner import run
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.problem import Problem

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN and infinities
]
CONFIG = BatchedConfig(
    widen="digits", score_rows=16, score_block=64, score_warps=1, score_stages=1,
    gather_rows=16, gather_block=64, gather_stages=1, slack=0,
)  # fmt: skip
PROBLEM = Problem(
    vocab_size=144,
    hidden_size=200,
    n_clusters=9,
    n_probes=4,
    n_tokens=3,
    weight_dtype="int8",
    centroid_dtype="int8",
    model_dtype="fp32",
    epilogue="logits",
)


def digits_of(states: torch.Tensor, dtype: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Digits `[tokens, 4, width]` and units of these states, by the kernel of a step."""
    problem = replace(PROBLEM, n_tokens=len(states), model_dtype=dtype)
    step = InterpretedStep(Candidate(problem, CONFIG, find_device("orin")))
    weights = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3).sets[0]
    run(step, problem, weights, states.to(format_of(dtype).torch_dtype))
    assert step.scratch.digits is not None and step.scratch.units is not None
    return step.scratch.digits.view(len(states), 4, -1), step.scratch.units


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 3000.0])
def test_digits_stand_for_the_states(dtype: str, scale: float) -> None:
    """To within 2**-30 of the largest magnitude; each state has its own unit."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(3, PROBLEM.hidden_size, generator=generator) * scale
    states[1] *= 2.0**-5
    states[2, 7] *= 1000 / 2.0**8
    states = states.to(format_of(dtype).torch_dtype)
    digits, units = digits_of(states, dtype)
    places = torch.tensor([1, 2**8, 2**16, 2**24], dtype=torch.float64)
    values = torch.einsum("tpc,p->tc", digits.double(), places) * units.double()[:, None]
    off = (values[:, : PROBLEM.hidden_size] - states.double()).abs().amax(dim=1)
    largest = states.double().abs().amax(dim=1)
    assert bool((off <= 2.0**-30 * largest).all())
    assert bool((values[:, PROBLEM.hidden_size :] == 0).all())
    assert len(set(units.tolist())) > 1


def test_a_state_of_zeros_has_digits_of_zeros_and_one_that_is_not_finite_no_unit() -> None:
    states = torch.zeros(4, PROBLEM.hidden_size)
    states[1, 3], states[2, 3], states[3, 3] = torch.nan, -torch.inf, 1e-44
    digits, units = digits_of(states)
    assert not bool(digits[0].any())
    assert units.isnan().tolist() == [False, True, True, False]
    assert 0 < float(units[0]) < 2.0**-120


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_products_are_as_exact_as_float32(dtype: str) -> None:
    """Of numbers that are small beside the largest every digit counts."""
    problem = replace(PROBLEM, n_tokens=1, weight_dtype=dtype, centroid_dtype=dtype, n_probes=9)
    step = InterpretedStep(Candidate(problem, CONFIG, find_device("orin")))
    weights = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3).sets[0]
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, problem.hidden_size, generator=generator) * 2.0**-10
    states[0, 5] = 1.0
    for row in range(problem.vocab_size):
        values = weights.rows(problem, slice(row, row + 1), torch.float32)[0]
        values[5] = 0
        weights.put(problem, row, values)
    out = run(step, problem, weights, states)[0, weights.ids.long()].double()
    rows = weights.rows(problem, slice(None), torch.float64)
    expected, sums = (rows @ states[0].double()), rows.abs() @ states[0].double().abs()
    assert bool(((out - expected).abs() <= 2.0**-18 * sums).all())
