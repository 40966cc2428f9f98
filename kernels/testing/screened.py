"""What a decode step must do for heads in fewer bits, pinned clusters, and rows in place."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.config import slack_of
from flashtune.kernels.plans.knob import Config
from flashtune.kernels.testing.runner import (
    Contract,
    Runner,
    judge_of,
    probed,
    random_states,
    random_weights,
    run,
    why_wrong,
)
from flashtune.kernels.weights import Weights, packed, stored_weights, token_order
from flashtune.tuning_db.problem import Problem

QUANTISED = [
    ("int8", "twelve", "argmax", "some"),
    ("int8", "sixteen", "logits", "one"),
    ("int8-decided", "twelve", "argmax", "some"),
    ("int8-decided", "sixteen", "logits", "some"),
    ("int4", "twelve", "logits", "some"),
    ("int4", "sixteen", "argmax", "all"),
    ("int4-decided", "sixteen", "argmax", "one"),
    ("int4-decided", "twelve", "logits", "all"),
    ("decided-by-many", "twelve", "argmax", "some"),
    ("pinned", "twelve", "argmax", "one"),
    ("pinned", "sixteen", "logits", "some"),
    ("int4-pinned", "twelve", "logits", "one"),
    ("int4-pinned", "twelve", "argmax", "some"),
]
IN_PLACE = [
    ("twelve", "argmax", "some", 1),
    ("twelve", "logits", "all", 1),
    ("sixteen", "argmax", "one", 1),
    ("sixteen", "logits", "some", 3),
    ("twelve", "argmax", "all", 3),
]


def quantised(problem: Problem, case: str) -> Problem:
    """A problem whose matrices are quantised, its candidates decided again, clusters pinned."""
    cases: dict[str, dict[str, Any]] = {
        "int8": {"weight_dtype": "int8", "centroid_dtype": "int8"},
        "int8-decided": {"weight_dtype": "int8", "n_rescored": 4, "n_tokens": 2},
        "int4": {"weight_dtype": "int4", "centroid_dtype": "int4", "model_dtype": "fp16"},
        "int4-decided": {"weight_dtype": "int4", "centroid_dtype": "int8", "n_rescored": 4},
        "decided-by-many": {"weight_dtype": "int8", "centroid_dtype": "int4", "n_rescored": 40},
        "pinned": {"n_pinned": 2},
        "int4-pinned": {"weight_dtype": "int4", "n_pinned": 2, "n_rescored": 4, "n_tokens": 2},
    }
    model = {} if case == "pinned" else {"model_dtype": "bf16"}
    return replace(problem, **{**model, **cases[case]})


def stored_head(problem: Problem, model: torch.Tensor) -> Weights:
    """A head of these rows, by token id, in a problem's formats, with random centroids."""
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randn(problem.n_clusters, problem.hidden_size, generator=generator)
    centroids = packed(problem.centroid_dtype, drawn.to(model.device))
    order = torch.randperm(problem.vocab_size, generator=generator).view(problem.n_clusters, -1)
    ids = order.sort(dim=1).values.flatten().to(model.device)
    return stored_weights(problem, model, centroids, ids)


class ScreenedHeads(Contract):
    """Formats of few bits, candidates decided again, pinned clusters, and rows in place."""

    @pytest.mark.parametrize(("formats", "clusters_of", "epilogue", "probes"), QUANTISED)
    def test_quantised_heads_answer_right(
        self,
        runner: Runner,
        config: Config,
        formats: str,
        clusters_of: str,
        epilogue: str,
        probes: str,
    ) -> None:
        problem = quantised(runner.problems[clusters_of], formats)
        problem = probed(replace(problem, epilogue=epilogue), probes)
        step = self.step_or_skip(runner, problem, config)
        workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
        judge = judge_of(config, workload.sets[0], problem)
        for states in workload.checks[:3]:
            out = run(step, problem, workload.sets[0], states)
            assert judge.why_wrong(out, states, slack_of(config)) is None

    def test_the_smallest_of_tied_tokens_wins_among_the_decided(
        self, runner: Runner, config: Config, token_problem: Problem
    ) -> None:
        """All candidates are decided, their logits are negative, and half of them tie."""
        problem = quantised(token_problem, "decided-by-many")
        problem = replace(problem, n_rescored=problem.vocab_size)
        step = self.step_or_skip(runner, problem, config)
        shape = problem.vocab_size, problem.hidden_size
        model = torch.full(shape, -2.0).bfloat16().to(runner.torch_device)
        model[::2] = -1
        weights = stored_head(problem, model)
        hidden = torch.ones(1, problem.hidden_size).bfloat16().to(runner.torch_device)
        out = run(step, problem, weights, hidden)
        assert judge_of(config, weights, problem).why_wrong(out, hidden, slack_of(config)) is None

    @pytest.mark.parametrize(("clusters_of", "epilogue", "probes", "tokens"), IN_PLACE)
    def test_rows_in_place_give_the_right_answer(
        self,
        runner: Runner,
        config: Config,
        clusters_of: str,
        epilogue: str,
        probes: str,
        tokens: int,
    ) -> None:
        problem = replace(
            runner.problems[clusters_of], epilogue=epilogue, n_tokens=tokens, in_place=True
        )
        problem = probed(problem, probes)
        step = self.step_or_skip(runner, problem, config)
        workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
        assert why_wrong(workload, step, config) is None
        if epilogue == "logits" and probes == "all":  # bit for bit what rows in order give
            weights, states = workload.sets[0], workload.checks[3]
            ordered = replace(weights, weight=weights.weight[weights.ids.long()])
            other = self.step_or_skip(runner, replace(problem, in_place=False), config)
            found = run(step, problem, weights, states)
            assert torch.equal(found, run(other, problem, ordered, states))

    def test_rows_in_place_tie_and_fill_up_clusters(
        self, runner: Runner, config: Config, epilogue: str
    ) -> None:
        """The model has fewer rows than the clusters have slots: some tokens are repeated."""
        problem = replace(runner.problems["twelve"], epilogue=epilogue, in_place=True)
        step = self.step_or_skip(runner, problem, config)
        for seed in range(2):
            drawn = random_weights(problem, runner, seed, whole=True)
            vocab = problem.vocab_size - 5
            mixed = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
            ids = token_order(mixed % problem.n_clusters, problem.n_clusters)
            weights = replace(
                drawn, weight=drawn.weight[:vocab].contiguous(), ids=ids.int().to(drawn.ids.device)
            )
            hidden = random_states(problem, runner, seed).sign()
            judge = judge_of(config, weights, problem, exact=True)
            out = run(step, problem, weights, hidden)
            assert judge.why_wrong(out, hidden, slack_of(config)) is None

    def test_any_of_the_best_screened_can_win(
        self, runner: Runner, config: Config, epilogue: str
    ) -> None:
        """The model's rows are unrelated to the screened ones: any may win."""
        problem = quantised(replace(runner.problems["sixteen"], epilogue=epilogue), "int8-decided")
        problem = replace(problem, n_rescored=6, n_tokens=4)
        step = self.step_or_skip(runner, problem, config)
        weights = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=11).sets[0]
        assert weights.model_weight is not None
        weights = replace(weights, model_weight=weights.model_weight.flip(0).contiguous())
        hidden = random_states(problem, runner, seed=12)
        out = run(step, problem, weights, hidden)
        assert judge_of(config, weights, problem).why_wrong(out, hidden, slack_of(config)) is None

    @pytest.mark.parametrize("formats", ["int8-decided", "int4-pinned"])
    def test_rows_of_zeros_and_outliers_are_screened(
        self, runner: Runner, config: Config, formats: str, epilogue: str
    ) -> None:
        problem = quantised(replace(runner.problems["twelve"], epilogue=epilogue), formats)
        step = self.step_or_skip(runner, problem, config)
        shape = problem.vocab_size, problem.hidden_size
        model = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
        model[::5], model[1::5, 3] = 0, 3000
        hidden = random_states(problem, runner, seed=8)
        hidden[1, 3] = 1000
        weights = stored_head(problem, model.to(runner.torch_device))
        out = run(step, problem, weights, hidden)
        assert judge_of(config, weights, problem).why_wrong(out, hidden, slack_of(config)) is None

    @pytest.mark.parametrize("formats", ["int8-decided", "int4-pinned"])
    def test_a_state_of_nan_spoils_its_own_row_alone(
        self, runner: Runner, config: Config, formats: str, epilogue: str
    ) -> None:
        problem = quantised(replace(runner.problems["twelve"], epilogue=epilogue), formats)
        step = self.step_or_skip(runner, problem, config)
        weights = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=9).sets[0]
        hidden = random_states(problem, runner, seed=10)
        hidden[0, 7] = float("nan")
        out = run(step, problem, weights, hidden)
        assert int(out[0]) == 0 if out.dim() == 1 else bool(out[0].isnan().all())
        assert (
            judge_of(config, weights, problem).why_wrong(out[1:], hidden[1:], slack_of(config))
            is None
        )
