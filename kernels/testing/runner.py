"""Where the contract's steps run, and what its checks share.

Usage:
    runner = Runner(device=DEVICE)
    step = runner.make(problem, config)
    weights, states = random_weights(problem, runner), random_states(problem, runner, seed=1)
    out = run(step, problem, weights, states)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.epilogues.epilogue import poisoned_out
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.knob import Config
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import EPILOGUES, Problem

SMALL = {
    "twelve": Problem(vocab_size=132, hidden_size=33, n_clusters=11, n_probes=3),
    "sixteen": Problem(vocab_size=144, hidden_size=96, n_clusters=9, n_probes=4),
}


@dataclass(frozen=True)
class Runner:
    """A device on which the contract runs. Subclasses say what is different there.

    problems: `twelve`, whose clusters have 12 tokens, and `sixteen`, with 16: large enough that
    every part of a kernel has work, small enough that a step takes no longer than a second.
    """

    device: Device
    problems: Mapping[str, Problem] = field(default_factory=lambda: SMALL)

    @property
    def torch_device(self) -> torch.device:
        """The device of tensors."""
        return torch.device(target_of(self.device).torch_device)

    def make(self, problem: Problem, config: Config) -> Step:
        """A step for a config; raises FlashtuneError if the plan's rules refuse it."""
        candidate = Candidate(problem, config, self.device)
        if reason := candidate.why_invalid():
            raise FlashtuneError(reason)
        return backend_of(candidate).loader(candidate, self.torch_device)()

    def kept(self, step: Step) -> torch.Tensor | None:
        """A copy of the scratch that a step must leave as it found it; None if it has none."""
        return None

    def spoil(self, step: Step) -> None:
        """Overwrite with nonsense the scratch that a step writes before it reads it."""


class Contract:
    """Fixtures of the checks. A subclass gives `runner` and `config`."""

    # The reasons for which the rules of a plan may refuse a problem: a regular expression. A check
    # for whose problem a config is refused so is skipped; any other refusal fails.
    may_refuse: ClassVar[str] = r"(?!)"

    @pytest.fixture
    def runner(self) -> Runner:
        """Where steps run."""
        raise NotImplementedError("override the fixture `runner`")

    @pytest.fixture
    def config(self) -> Config:
        """The config under test; usually a fixture with params."""
        raise NotImplementedError("override the fixture `config`")

    @pytest.fixture(params=list(EPILOGUES))
    def epilogue(self, request: pytest.FixtureRequest) -> str:
        """Every epilogue in turn."""
        return str(request.param)

    @pytest.fixture
    def problem(self, runner: Runner, epilogue: str) -> Problem:
        """The problem `twelve` with that epilogue."""
        return replace(runner.problems["twelve"], epilogue=epilogue)

    @pytest.fixture
    def token_problem(self, runner: Runner) -> Problem:
        """The problem `twelve`, whose output is token ids."""
        return runner.problems["twelve"]

    def step_or_skip(self, runner: Runner, problem: Problem, config: Config) -> Step:
        """A step; skips the check if a rule refuses the problem for a reason that it may give."""
        try:
            return runner.make(problem, config)
        except FlashtuneError as error:
            if not re.search(self.may_refuse, str(error)):
                raise
            pytest.skip(str(error))


def judge_of(config: Config, weights: Weights, problem: Problem, *, exact: bool = False) -> Judge:
    """The judge of what a config's kernels write, which knows how its plan multiplies."""
    return Judge(weights, problem, exact, tensor_cores=PLANS[config.plan].tensor_cores)


def why_wrong(workload: Workload, step: Step, config: Config) -> str | None:
    """None if a config's step is right on a workload's checks, else why not."""
    return workload.why_wrong(step, **PLANS[config.plan].leeway(config))


def probed(problem: Problem, how_many: str) -> Problem:
    """The problem with one cluster probed, with some, or with all."""
    numbers = {"one": 1, "some": problem.n_probes, "all": problem.n_clusters}
    return replace(problem, n_probes=numbers[how_many])


def random_weights(
    problem: Problem, runner: Runner, seed: int = 0, whole: bool = False
) -> Weights:
    """Random weights, of small whole numbers if `whole`, for exact sums and many ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        shape = (rows, problem.hidden_size)
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).bfloat16()
        return torch.randn(shape, generator=generator).bfloat16()

    order = torch.randperm(problem.vocab_size, generator=generator).view(problem.n_clusters, -1)
    return Weights(
        weight=draw(problem.vocab_size).to(runner.torch_device),
        centroids=draw(problem.n_clusters).to(runner.torch_device),
        ids=order.sort(dim=1).values.flatten().int().to(runner.torch_device),
    )


def random_states(problem: Problem, runner: Runner, seed: int) -> torch.Tensor:
    """Random hidden states, bf16 `[tokens, hidden]`."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(problem.n_tokens, problem.hidden_size, generator=generator)
    return states.bfloat16().to(runner.torch_device)


def run(step: Step, problem: Problem, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """The output of a step that was given a poisoned output tensor."""
    out = poisoned_out(problem, hidden.device)
    step(weights, hidden, out)
    return out


def tokens_of(out: torch.Tensor) -> torch.Tensor:
    """The tokens of an output: token ids, or the best of each row of logits."""
    return out if out.dim() == 1 else out.argmax(dim=1)
