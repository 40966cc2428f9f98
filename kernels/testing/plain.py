"""What a decode step must do for a head in 16 bits, whatever its plan."""

from dataclasses import replace

import pytest
import torch

from flashtune.kernels.epilogues.epilogue import new_out, poisoned_out
from flashtune.kernels.formats.format import format_of
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
    tokens_of,
    why_wrong,
)
from flashtune.tuning_db.problem import Problem


class PlainHeads(Contract):
    """Right answers, exact ties, states that are not finite, and nothing left behind."""

    @pytest.mark.parametrize(
        ("clusters_of", "probes"),
        [("twelve", "some"), ("twelve", "all"), ("sixteen", "one"), ("sixteen", "some")],
    )
    def test_what_comes_out_is_right(
        self, runner: Runner, config: Config, clusters_of: str, probes: str, epilogue: str
    ) -> None:
        problem = probed(replace(runner.problems[clusters_of], epilogue=epilogue), probes)
        step = runner.make(problem, config)
        workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
        assert why_wrong(workload, step, config) is None

    def test_each_token_probes_clusters_of_its_own(
        self, runner: Runner, config: Config, problem: Problem
    ) -> None:
        problem = replace(problem, n_tokens=3)
        step = runner.make(problem, config)
        weights, hidden = random_weights(problem, runner), random_states(problem, runner, seed=1)
        scores = hidden.float() @ weights.centroids.float().T
        probed = scores.topk(problem.n_probes, dim=1).indices.tolist()
        assert len({frozenset(clusters) for clusters in probed}) == 3
        tokens = run(step, problem, weights, hidden)
        judge = judge_of(config, weights, problem)
        assert judge.why_wrong(tokens, hidden, slack_of(config)) is None
        assert len(set(tokens_of(tokens).tolist())) > 1

    def test_negative_logits_are_compared_as_numbers(
        self, runner: Runner, config: Config, token_problem: Problem
    ) -> None:
        step = runner.make(token_problem, config)
        weights = random_weights(token_problem, runner)
        weights = replace(weights, weight=-weights.weight.abs())
        hidden = random_states(token_problem, runner, seed=2).abs()
        assert bool((weights.weight.float() @ hidden[0].float() < 0).all())
        tokens = run(step, token_problem, weights, hidden)
        assert (
            judge_of(config, weights, token_problem).why_wrong(tokens, hidden, slack_of(config))
            is None
        )

    def test_rows_that_pad_a_cluster_change_nothing(
        self, runner: Runner, config: Config, token_problem: Problem
    ) -> None:
        """A cluster with fewer tokens repeats its last one, here with the best logits of all."""
        step = runner.make(token_problem, config)
        for sign in (1, -1):
            weights = random_weights(token_problem, runner)
            rows = (sign * weights.weight.abs()).view(
                token_problem.n_clusters, -1, token_problem.hidden_size
            )
            ids = weights.ids.view(token_problem.n_clusters, -1).clone()
            hidden = random_states(token_problem, runner, seed=2).abs()
            rows[:, -1] = rows.amax(dim=1)
            rows[:, -2], ids[:, -2] = rows[:, -1], ids[:, -1]
            weights = replace(weights, weight=rows.flatten(0, 1), ids=ids.flatten())
            tokens = run(step, token_problem, weights, hidden)
            assert int(tokens) in ids[:, -1]
            judge = judge_of(config, weights, token_problem)
            assert judge.why_wrong(tokens, hidden, slack_of(config)) is None

    def test_the_smallest_of_tied_tokens_wins(
        self, runner: Runner, config: Config, token_problem: Problem
    ) -> None:
        step = runner.make(token_problem, config)
        for seed in range(2):
            weights = random_weights(token_problem, runner, seed, whole=True)
            rows = weights.weight.view(token_problem.n_clusters, -1, token_problem.hidden_size)
            rows[:, :] = rows[:1, :1]  # all tokens tie
            if seed:
                rows[:, ::2] += 1  # half of each cluster's do, the others lie above or below
            hidden = torch.ones(1, token_problem.hidden_size).bfloat16().to(runner.torch_device)
            judge = judge_of(config, weights, token_problem, exact=True)
            out = run(step, token_problem, weights, hidden)
            assert judge.why_wrong(out, hidden, slack_of(config)) is None

    def test_whole_numbers_give_the_exact_token(
        self, runner: Runner, config: Config, problem: Problem
    ) -> None:
        step = runner.make(problem, config)
        for seed in range(2):
            weights = random_weights(problem, runner, seed, whole=True)
            hidden = random_states(problem, runner, seed).sign()
            judge = judge_of(config, weights, problem, exact=True)
            out = run(step, problem, weights, hidden)
            assert judge.why_wrong(out, hidden, slack_of(config)) is None

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_logits_are_rounded_to_nearest(
        self, runner: Runner, config: Config, dtype: str
    ) -> None:
        """For whole numbers beyond the dtype's exact range: many lie midway between two values."""
        problem = replace(
            runner.problems["twelve"], epilogue="logits", weight_dtype=dtype, centroid_dtype=dtype
        )
        step = runner.make(problem, config)
        weights = random_weights(problem, runner, whole=True)
        generator = torch.Generator().manual_seed(1)
        shape = (problem.vocab_size, problem.hidden_size)
        drawn = torch.randint(-60, 61, shape, generator=generator).to(runner.torch_device)
        weights = replace(
            weights,
            weight=drawn.to(format_of(dtype).torch_dtype),
            centroids=weights.centroids.to(format_of(dtype).torch_dtype),
        )
        hidden = 32 * random_states(problem, runner, seed=2).sign().to(
            format_of(dtype).torch_dtype
        )
        judge = judge_of(config, weights, problem, exact=True)
        assert (
            judge.why_wrong(run(step, problem, weights, hidden), hidden, slack_of(config)) is None
        )

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_a_state_of_zeros_ties_everything(
        self, runner: Runner, config: Config, problem: Problem, zero: float
    ) -> None:
        step = runner.make(problem, config)
        weights = random_weights(problem, runner)
        hidden = torch.full((1, problem.hidden_size), zero).bfloat16().to(runner.torch_device)
        tokens = run(step, problem, weights, hidden)
        judge = judge_of(config, weights, problem, exact=True)
        assert judge.why_wrong(tokens, hidden, slack_of(config)) is None

    def test_signed_zeros_tie(
        self, runner: Runner, config: Config, token_problem: Problem
    ) -> None:
        problem = replace(token_problem, n_probes=token_problem.n_clusters)
        step = runner.make(problem, config)
        weights = random_weights(problem, runner)
        weights.weight[:] = torch.where(weights.ids % 2 == 0, -0.0, 0.0)[:, None]
        hidden = random_states(token_problem, runner, seed=4).abs()
        assert run(step, problem, weights, hidden).tolist() == [0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_state_that_is_not_finite_leaves_nothing_unwritten(
        self, runner: Runner, config: Config, problem: Problem, value: float
    ) -> None:
        step = runner.make(problem, config)
        weights = random_weights(problem, runner)
        hidden = random_states(problem, runner, seed=5)
        bad = hidden.clone()
        bad[0, 7] = value
        runner.spoil(step)
        out = new_out(problem, hidden.device).fill_(-7)  # NaN may be right here
        step(weights, bad, out)
        assert not bool((out == -7).any())
        assert 0 <= tokens_of(out).item() < problem.vocab_size
        if value != value:  # as plain torch has it: a row of NaN, whose argmax is 0
            assert out.tolist() == [0] if out.dim() == 1 else bool(out.isnan().all())
        tokens = run(step, problem, weights, hidden)  # and the next call is right again
        assert (
            judge_of(config, weights, problem).why_wrong(tokens, hidden, slack_of(config)) is None
        )

    @pytest.mark.parametrize("rows", [1, 3])
    def test_the_last_row_stands_for_those_that_are_missing(
        self, runner: Runner, config: Config, problem: Problem, rows: int
    ) -> None:
        problem = replace(problem, n_tokens=4)
        step = runner.make(problem, config)
        weights = random_weights(problem, runner)
        hidden = random_states(problem, runner, seed=6)
        whole = torch.cat([hidden[:rows], hidden[rows - 1 :][:1].expand(4 - rows, -1)])
        few = hidden.clone()
        few[rows:] = float("nan")  # what lies behind is not read
        out = poisoned_out(problem, hidden.device)
        step(weights, few[:rows], out)
        assert judge_of(config, weights, problem).why_wrong(out, whole, slack_of(config)) is None

    def test_calls_leave_nothing_behind_for_the_next(
        self, runner: Runner, config: Config, problem: Problem
    ) -> None:
        """Each call has lower logits than the one before, and finds its scratch spoiled."""
        step = runner.make(problem, config)
        weights = random_weights(problem, runner)
        before = runner.kept(step)
        judge = judge_of(config, weights, problem)
        for call in range(3):
            hidden = random_states(problem, runner, seed=call) * 2.0 ** (-8 * call)
            tokens = run(step, problem, weights, hidden)
            assert judge.why_wrong(tokens, hidden, slack_of(config)) is None
            after = runner.kept(step)
            assert before is None or (after is not None and torch.equal(after, before))
            runner.spoil(step)
