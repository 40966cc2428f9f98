"""The inputs that candidates are verified and timed on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.torch import TorchStep, decode
from flashtune.kernels.formats.format import format_of, plain_formats
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.measure.workload import Workload, _sets_for
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

PROBLEM = Problem(vocab_size=384, hidden_size=64, n_clusters=32, n_probes=8, n_tokens=3)
CPU = torch.device("cpu")


def make(problem: Problem = PROBLEM, cold_bytes: int = 1, seed: int = 0) -> Workload:
    return Workload.create(problem, CPU, cold_bytes=cold_bytes, seed=seed)


def step_with(n_probes: int) -> Step:
    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(decode(weights, hidden, n_probes))

    return step


@pytest.mark.parametrize("n_probes", [1, 2, 8, 31, 32])
def test_a_right_step_passes(n_probes: int) -> None:
    workload = make(replace(PROBLEM, n_probes=n_probes))
    assert workload.why_wrong(step_with(n_probes), slack=0) is None


@pytest.mark.parametrize("n_probes", [2, 8, 31, 32])
def test_a_step_that_probes_one_cluster_too_few_is_caught(n_probes: int) -> None:
    workload = make(replace(PROBLEM, n_probes=n_probes))
    reason = workload.why_wrong(step_with(n_probes - 1), slack=0)
    assert reason is not None
    assert "but the best has" in reason


@pytest.mark.parametrize("n_probes", [1, 8, 27])
def test_a_step_that_probes_all_clusters_is_caught(n_probes: int) -> None:
    workload = make(replace(PROBLEM, n_probes=n_probes))
    reason = workload.why_wrong(step_with(32), slack=4)
    assert reason is not None
    assert "is in the cluster ranked" in reason


LOGITS = replace(PROBLEM, epilogue="logits")
Spoil = Callable[[Weights, torch.Tensor], torch.Tensor]


def logits_step(n_probes: int, spoil: Spoil = lambda _, logits: logits) -> Step:
    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(spoil(weights, decode(weights, hidden, n_probes, "logits")))

    return step


@pytest.mark.parametrize("n_probes", [1, 8, 32])
@pytest.mark.parametrize("dtype", [each.name for each in plain_formats()])
def test_right_logits_pass(n_probes: int, dtype: str) -> None:
    workload = make(replace(LOGITS, n_probes=n_probes, weight_dtype=dtype))
    assert workload.why_wrong(logits_step(n_probes), slack=0) is None
    more = min(n_probes + 2, 32)
    assert workload.why_wrong(logits_step(more), slack=2) is None


@pytest.mark.parametrize(
    ("n_probes", "spoil", "message"),
    [
        (7, lambda _, logits: logits, "of a cluster that is probed has logit -9984, not"),
        (9, lambda _, logits: logits, "ranked 9, outside 8 probes, is not filled"),
        (32, lambda _, logits: logits, "outside 8 probes, is not filled"),
        (8, lambda _, logits: logits.roll(1, dims=1), "check 0, row 0"),
        (8, lambda _, logits: torch.where(logits < -9000, -9000, logits), "is not filled"),
        (8, lambda _, logits: torch.where(logits < -9000, torch.nan, logits), "not filled"),
        (8, lambda _, logits: torch.where(logits < -9000, logits, torch.nan), "has logit nan"),
        # the next number of the dtype, away from zero
        (8, lambda _, logits: (logits.view(torch.int16) + 1).view(torch.bfloat16), "check 0"),
        (
            8,  # one row of a cluster missing
            lambda weights, logits: logits.index_fill(1, weights.ids[::12].long(), -1e4),
            "has logit -9984, not",
        ),
    ],
)
def test_wrong_logits_are_caught(n_probes: int, spoil: Spoil, message: str) -> None:
    reason = make(LOGITS).why_wrong(logits_step(n_probes, spoil), slack=0)
    assert reason is not None
    assert message in reason


def test_only_tensor_cores_may_cut() -> None:
    workload = make(replace(LOGITS, weight_dtype="fp32"))
    cut = logits_step(
        8, lambda _, logits: torch.where(logits > -9000, logits * (1 - 2.0**-18), logits)
    )
    assert workload.why_wrong(cut, slack=0, tensor_cores=True) is None
    assert "has logit" in (workload.why_wrong(cut, slack=0) or "")


def test_clusters_that_tie_must_still_be_probed() -> None:
    workload = make(LOGITS)
    for weights in workload.sets:
        weights.centroids[:] = weights.centroids[0]
    assert workload.why_wrong(logits_step(8), slack=0) is None
    reason = workload.why_wrong(logits_step(7), slack=0)
    assert reason == "check 0, row 0: 7 clusters are probed, not 8"


def test_a_step_that_writes_nothing_is_caught() -> None:
    assert "is not filled" in (make(LOGITS).why_wrong(lambda *_: None, slack=0) or "")
    assert "not in the vocabulary" in (make().why_wrong(lambda *_: None, slack=0) or "")


def test_a_step_that_is_right_only_once_is_caught() -> None:
    calls = []

    def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        calls.append(out)
        if len(calls) % 2:
            out.copy_(decode(weights, hidden, PROBLEM.n_probes))

    assert make().why_wrong(step, slack=0) is not None
    assert len(calls) == 2


def test_sets_are_larger_than_what_must_stay_cold() -> None:
    cold = 10 * PROBLEM.minimum_bytes
    workload = make(cold_bytes=cold)
    assert len(workload.sets) == len(workload.states)
    assert len(workload.sets) * PROBLEM.minimum_bytes > 2 * cold
    assert len({weights.centroids.data_ptr() for weights in workload.sets}) == len(workload.sets)
    assert len(make().sets) > 1


def test_a_seed_gives_one_workload_and_another_gives_another() -> None:
    first, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(first.sets[0].weight, same.sets[0].weight)
    assert torch.equal(first.checks[0], same.checks[0])
    assert not torch.equal(first.sets[0].weight, other.sets[0].weight)
    assert not torch.equal(first.checks[0], other.checks[0])


@pytest.mark.parametrize("dtype", [each.name for each in plain_formats()])
def test_tensors_are_as_the_problem_says(dtype: str) -> None:
    workload = make(replace(PROBLEM, weight_dtype=dtype, centroid_dtype="fp32"))
    weights = workload.sets[0]
    assert weights.weight.shape == (384, 64)
    assert weights.weight.dtype is workload.states[0].dtype is format_of(dtype).torch_dtype
    assert weights.centroids.shape == (32, 64)
    assert weights.centroids.dtype is torch.float32
    torch.testing.assert_close(weights.centroids.norm(dim=1), torch.ones(32))
    ids = weights.ids.view(32, 12)
    assert ids.dtype is torch.int32
    assert ids.flatten().sort().values.tolist() == list(range(384))
    assert bool((ids.diff(dim=1) > 0).all())
    assert all(state.shape == (3, 64) for state in (*workload.states, *workload.checks))


def test_what_was_right_with_much_slack_is_judged_again_with_less() -> None:
    workload = make()
    assert workload.why_wrong(step_with(32), slack=24) is None
    assert "is in the cluster ranked" in (workload.why_wrong(step_with(32), slack=4) or "")
    assert workload.why_wrong(step_with(32), slack=24) is None


def test_an_answer_that_was_judged_right_is_not_judged_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload, judged = make(), []
    judge = Judge.why_wrong

    def watched(self: Judge, *arguments: Any) -> str | None:
        judged.append(arguments)
        return judge(self, *arguments)

    monkeypatch.setattr(Judge, "why_wrong", watched)
    for slack in (0, 0, 16):
        assert workload.why_wrong(step_with(8), slack=slack) is None
    assert len(judged) == len(workload.checks)


N_SETS = _sets_for(PROBLEM, 10 * PROBLEM.minimum_bytes)
JUDGED = 8 * (3 * 64 * 4096 + 8 * 384) + 8 * (N_SETS + 2) * PROBLEM.n_tokens * 64  # bytes needed


def around(free_bytes: int) -> tuple[Weights, Workload]:
    """A workload around a head's weights, of many sets if they fit."""
    weights = make().sets[0]
    cold = 10 * PROBLEM.minimum_bytes
    return weights, Workload.around(weights, PROBLEM, cold, free_bytes=free_bytes, seed=1)


def test_a_head_s_own_weights_are_used_and_left_as_they_are() -> None:
    weights, workload = around(2**30)
    before = weights.weight.clone(), weights.centroids.clone()
    assert workload.sets[0] is weights
    assert {each.weight.data_ptr() for each in workload.sets} == {weights.weight.data_ptr()}
    assert workload.is_cold
    assert len({each.centroids.data_ptr() for each in workload.sets}) == len(workload.sets) > 20
    assert workload.why_wrong(step_with(8), slack=0) is None
    assert workload.why_wrong(step_with(32), slack=0) is not None
    assert torch.equal(weights.weight, before[0]) and torch.equal(weights.centroids, before[1])
    states = torch.stack([*workload.states, *workload.checks])
    assert len(states.flatten(1).unique(dim=0)) == len(states)


def test_every_state_is_aligned_as_kernels_expect() -> None:
    odd = replace(PROBLEM, hidden_size=33)
    workload = Workload.around(make(odd).sets[0], odd, 1, free_bytes=2**30, seed=1)
    assert all(state.data_ptr() % 16 == 0 for state in (*workload.states, *workload.checks))


def test_without_room_for_copies_all_sets_share_the_centroids() -> None:
    weights, workload = around(2 * JUDGED + 2**14)
    assert not workload.is_cold
    assert {each.centroids.data_ptr() for each in workload.sets} == {weights.centroids.data_ptr()}
    assert len(workload.states) == len(workload.sets) > 20


def test_without_room_for_the_judge_there_is_no_workload() -> None:
    with pytest.raises(FlashtuneError, match=r"12 MiB are free on cpu, but .* takes 6"):
        around(2 * JUDGED - 1)


def test_a_head_that_probes_everything_is_judged_a_few_rows_at_a_time() -> None:
    """Its 2**15 rows are not all in float64 at once, which would take 48 MiB."""
    every = replace(PROBLEM, vocab_size=2**15, n_clusters=2**11, n_probes=2**11, n_tokens=1)
    screened = Screen.parse("int8").problem(replace(every, epilogue="logits"))
    weights = Workload.create(screened, CPU, cold_bytes=1, seed=0).sets[0]
    workload = Workload.around(weights, screened, 1, free_bytes=2**26, seed=1)
    assert workload.why_wrong(TorchStep(screened), slack=0) is None
