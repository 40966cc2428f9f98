"""What a decode step must do, whatever its plan: interpreted, on a GPU, and on this CPU."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import triton
from toys.interpreted import InterpretedStep
from toys.plan import EverythingConfig
from toys.target import DEVICE as ABACUS_10

from flashtune.kernels.backends.cpp.this_cpu import describe_cpu
from flashtune.kernels.backends.cuda.backend import CudaStep
from flashtune.kernels.backends.host import device_of
from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.backends.torch import TorchStep
from flashtune.kernels.backends.triton.backend import DecodeStep
from flashtune.kernels.epilogues.epilogue import new_out, poisoned_out
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config, knobs, slack_of
from flashtune.kernels.plans.cpp_fused import CppFusedConfig
from flashtune.kernels.plans.cpp_staged import CppStagedConfig
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.parts.simd import simd_levels, useful_levels
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.weights import Step, Weights, stored_weights, token_order
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import EPILOGUES, Problem

# numpy, of NaN and infinities, where the interpreter computes
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IN_GATHER = StagedConfig(selection="in_gather", gather_rows=16, gather_programs_per_sm=2, slack=0)
# Without slack: with some, all of the interpreter's few clusters might be probed
CONFIGS: dict[str, Config] = {
    "torch_topk": StagedConfig(selection="torch_topk", gather_rows=16),
    "threshold": StagedConfig(score_rows=4, slack=0),
    "threshold_looping": StagedConfig(score_rows=4, score_programs_per_sm=2, select_warps=4),
    "in_gather": IN_GATHER,
    "persistent": PersistentConfig(slack=0),
    "batched": BatchedConfig(slack=0, score_stages=2),
    "batched_listed": BatchedConfig(slack=0, score_stages=2, visit="listed"),
    "dense": DenseConfig(gather_rows=32, gather_stages=2),
}
ON_SM_90: dict[str, Config] = {
    "torch_topk_pdl": replace(CONFIGS["torch_topk"], pdl=True),
    "threshold_pdl": replace(CONFIGS["threshold"], pdl=True),
    "in_gather_pdl": replace(IN_GATHER, pdl=True, slack=8),
    "in_gather_prefetch": replace(IN_GATHER, prefetch_margin=5, gather_warps=8),
    "persistent_pdl_prefetch": PersistentConfig(pdl=True, prefetch_margin=20),
    "batched_pdl": BatchedConfig(pdl=True, slack=8, gather_rows=16, gather_stages=4),
    "threshold_bits": replace(CONFIGS["threshold"], widen="bits"),
    "batched_bits": BatchedConfig(widen="bits", gather_rows=32, gather_warps=2),
    "dense_bits": DenseConfig(widen="bits", gather_rows=32, gather_warps=2),
    "batched_listed_pdl": BatchedConfig(
        pdl=True, slack=8, visit="listed", score_rows=64, gather_rows=64, gather_warps=4
    ),
    "dense_pdl": DenseConfig(pdl=True, gather_rows=128),
    "streamed": StreamedConfig(slack=0, gather_warps=8, gather_stages=2, prefetch=False),
    "streamed_prefetch": StreamedConfig(slack=8, score_stages=1, prefetch_margin=20),
    "streamed_late": StreamedConfig(score_warps=4, gather_warps=12, early=False),
}
CPU = describe_cpu()
THREADS = 2 if CPU.sm_count > 1 else 1
ON_CPU: dict[str, Config] = {
    "fused": CppFusedConfig(simd=simd_levels(CPU.arch)[-1], threads=THREADS, slack=0),
    "fused_histogram": CppFusedConfig(
        simd=simd_levels(CPU.arch)[-1],
        selection="histogram",
        slack=8,
        parts=1,
        score_rows=2,
        score_columns=1,
        gather_rows=8,
        gather_columns=1,
        gather_prefetch=1,
    ),
    "staged": CppStagedConfig(threads=THREADS, score_rows=4, score_prefetch=2, gather_rows=2),
    "staged_nth_element": CppStagedConfig(
        simd=simd_levels(CPU.arch)[min(1, len(simd_levels(CPU.arch)) - 1)],
        selection="nth_element",
        threads=THREADS,
        gather_parts=1,
        gather_unroll=2,
        gather_columns=1,
    ),
}
ON_ABACUS: dict[str, Config] = {
    "everything": EverythingConfig(rows=16),
    "plain_torch": FALLBACK.config(),
}
TRITON_STEPS = (DecodeStep, InterpretedStep)
CANNOT_LOOP = triton.__version__.startswith("3.6.")  # with numpy 2.4


@dataclass(frozen=True)
class Runner:
    """Where steps run, on which problems, and with tiles how wide."""

    device: Device
    torch_device: torch.device
    problems: dict[str, Problem]
    block: int
    step: Callable[[Problem, Config, Device], Step]

    def make(self, problem: Problem, config: Config) -> Step:
        """A step for a config, with tiles of this runner's width; skips what cannot run here."""
        if PLANS[config.plan].builder == "cuda":
            if problem.n_tokens > 1 or self.device.capability < 90:
                pytest.skip("streamed is for one token and sm_90")
            if "int4" in (problem.weight_dtype, problem.centroid_dtype):
                pytest.skip("streamed does not read int4")
            return self.step(problem, config, self.device)
        if PLANS[config.plan].builder == "cpp":
            return self.step(problem, _narrowed(config, problem), self.device)
        if PLANS[config.plan].builder != "triton":
            if reason := Candidate(problem, config, self.device).why_invalid():
                raise FlashtuneError(reason)
            return self.step(problem, config, self.device)
        block = self.block // 2 if isinstance(config, BatchedConfig | DenseConfig) else self.block
        blocks = {f"{stage}_block": block for stage in ("score", "gather")}
        fitted = replace(
            config, **{name: blocks[name] for name in blocks if hasattr(config, name)}
        )
        if getattr(config, "widen", "cast") == "bits" and "int8" not in (
            problem.weight_dtype,
            problem.centroid_dtype,
        ):
            pytest.skip("nothing is widened")
        prefetches = getattr(config, "prefetch_margin", -1) >= 0
        if (config.pdl or prefetches) and self.device.capability < 90:
            pytest.skip("needs sm_90")
        if isinstance(config, PersistentConfig) and problem.n_tokens > self.device.sm_count:
            pytest.skip("the interpreter runs one program at a time: no barrier between several")
        return self.step(problem, fitted, self.device)


def _interpreted_step(problem: Problem, config: Config, device: Device) -> Step:
    return InterpretedStep(Candidate(problem, config, device))


def _compiled_step(problem: Problem, config: Config, device: Device) -> Step:
    candidate = Candidate(problem, config, device)
    where = torch.device(target_of(device).torch_device)
    return backend_of(candidate).loader(candidate, where)()


def _narrowed(config: Config, problem: Problem) -> Config:
    """A config for CPUs with instructions that the problem has a use for, and tiles that fit."""
    useful = useful_levels(problem, CPU)
    if getattr(config, "simd", useful[-1]) not in useful:
        config = replace(config, simd=useful[-1])
    if problem.in_place:
        config = replace(config, gather_rows=1)
    narrow = {
        f"{stage}_{knob}": 1 for stage in ("score", "gather") for knob in ("columns", "unroll")
    }
    return replace(config, **narrow) if Candidate(problem, config, CPU).why_invalid() else config


ON_CUDA = pytest.mark.gpu
CASES = [pytest.param(("interpreter", name), id=f"interpreter-{name}") for name in CONFIGS]
CASES += [
    pytest.param(("cuda", name), id=f"cuda-{name}", marks=ON_CUDA)
    for name in (*CONFIGS, *ON_SM_90)
]
CASES += [pytest.param(("cpu", name), id=f"cpu-{name}") for name in ON_CPU]
CASES += [pytest.param(("abacus", name), id=f"abacus-{name}") for name in ON_ABACUS]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The names of a runner and of a config; inline assembly is not for the interpreter."""
    if request.param == ("interpreter", "threshold_looping") and CANNOT_LOOP:
        pytest.skip("this interpreter cannot loop from a program's number on")
    return request.param


@pytest.fixture
def config(case: tuple[str, str]) -> Config:
    return {**CONFIGS, **ON_SM_90, **ON_CPU, **ON_ABACUS}[case[1]]


@pytest.fixture
def runner(case: tuple[str, str], request: pytest.FixtureRequest) -> Runner:
    if case[0] == "interpreter":
        request.getfixturevalue("interpreted")
        return Runner(
            device=replace(find_device("orin"), sm_count=1),
            torch_device=torch.device("cpu"),
            problems={
                "twelve": Problem(vocab_size=132, hidden_size=33, n_clusters=11, n_probes=3),
                "sixteen": Problem(vocab_size=144, hidden_size=96, n_clusters=9, n_probes=4),
            },
            block=64,
            step=_interpreted_step,
        )
    if case[0] == "cpu":
        return Runner(
            device=CPU,
            torch_device=torch.device("cpu"),
            problems={
                "twelve": Problem(vocab_size=16380, hidden_size=99, n_clusters=1365, n_probes=64),
                "sixteen": Problem(vocab_size=40000, hidden_size=96, n_clusters=2500, n_probes=77),
            },
            block=0,
            step=_compiled_step,
        )
    if case[0] == "abacus":
        request.getfixturevalue("abacus")
        return Runner(
            device=ABACUS_10,
            torch_device=torch.device("cpu"),
            problems={
                "twelve": Problem(vocab_size=132, hidden_size=33, n_clusters=11, n_probes=3),
                "sixteen": Problem(vocab_size=144, hidden_size=96, n_clusters=9, n_probes=4),
            },
            block=0,
            step=_compiled_step,
        )
    device = device_of(torch.device("cuda"))
    assert device is not None
    return Runner(
        device=device,
        torch_device=torch.device("cuda"),
        problems={
            "twelve": Problem(vocab_size=16380, hidden_size=1152, n_clusters=1365, n_probes=64),
            "sixteen": Problem(vocab_size=40000, hidden_size=640, n_clusters=2500, n_probes=77),
        },
        block=256,
        step=_compiled_step,
    )


@pytest.fixture(params=EPILOGUES)
def epilogue(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def problem(runner: Runner, epilogue: str) -> Problem:
    return replace(runner.problems["twelve"], epilogue=epilogue)


@pytest.fixture
def token_problem(runner: Runner) -> Problem:
    return runner.problems["twelve"]


def make_weights(problem: Problem, runner: Runner, seed: int = 0, whole: bool = False) -> Weights:
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


def run(step: Step, problem: Problem, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    out = poisoned_out(problem, hidden.device)
    step(weights, hidden, out)
    return out


def tokens_of(out: torch.Tensor) -> torch.Tensor:
    return out if out.dim() == 1 else out.argmax(dim=1)


def random_states(problem: Problem, runner: Runner, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(problem.n_tokens, problem.hidden_size, generator=generator)
    return states.bfloat16().to(runner.torch_device)


@pytest.mark.parametrize(
    ("clusters_of", "probes"),
    [("twelve", "some"), ("twelve", "all"), ("sixteen", "one"), ("sixteen", "some")],
)
def test_what_comes_out_is_right(
    runner: Runner, config: Config, clusters_of: str, probes: str, epilogue: str
) -> None:
    problem = runner.problems[clusters_of]
    numbers = {"one": 1, "some": problem.n_probes, "all": problem.n_clusters}
    problem = replace(problem, n_probes=numbers[probes], epilogue=epilogue)
    step = runner.make(problem, config)
    workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
    assert workload.why_wrong(step, slack_of(config)) is None


def quantised(problem: Problem, case: str) -> Problem:
    """A problem whose matrices are quantised, its candidates decided again, clusters pinned."""
    changes = {
        "int8": {"weight_dtype": "int8", "centroid_dtype": "int8"},
        "int8-decided": {"weight_dtype": "int8", "n_rescored": 4, "n_tokens": 2},
        "int4": {"weight_dtype": "int4", "centroid_dtype": "int4", "model_dtype": "fp16"},
        "int4-decided": {"weight_dtype": "int4", "centroid_dtype": "int8", "n_rescored": 4},
        "decided-by-many": {"weight_dtype": "int8", "centroid_dtype": "int4", "n_rescored": 40},
        "pinned": {"n_pinned": 2},
        "int4-pinned": {"weight_dtype": "int4", "n_pinned": 2, "n_rescored": 4, "n_tokens": 2},
    }[case]
    model = {} if case == "pinned" else {"model_dtype": "bf16"}
    return replace(problem, **{**model, **changes})


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


REFUSED = re.compile(
    "has no launch that decides|in_gather writes no list|topk pins no|tensor cores take one dtype|"
    "prefetch knows clusters|streamed copies rows that adjoin"
)


def quantised_step(runner: Runner, problem: Problem, config: Config) -> Step:
    """A step; skips what a plan's rules refuse for these formats."""
    try:
        return runner.make(problem, config)
    except FlashtuneError as error:
        if not REFUSED.search(str(error)):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(("formats", "clusters_of", "epilogue", "probes"), QUANTISED)
def test_quantised_heads_answer_right(
    runner: Runner, config: Config, formats: str, clusters_of: str, epilogue: str, probes: str
) -> None:
    problem = quantised(runner.problems[clusters_of], formats)
    numbers = {"one": 1, "some": problem.n_probes, "all": problem.n_clusters}
    problem = replace(problem, n_probes=numbers[probes], epilogue=epilogue)
    step = quantised_step(runner, problem, config)
    workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
    judge = Judge(workload.sets[0], problem)
    for states in workload.checks[:3]:
        out = run(step, problem, workload.sets[0], states)
        assert judge.why_wrong(out, states, slack_of(config)) is None


def stored_head(problem: Problem, model: torch.Tensor) -> Weights:
    """A head of these rows, by token id, in a problem's formats, with random centroids."""
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randn(problem.n_clusters, problem.hidden_size, generator=generator)
    centroids = format_of(problem.centroid_dtype).pack(drawn.to(model.device))
    order = torch.randperm(problem.vocab_size, generator=generator).view(problem.n_clusters, -1)
    ids = order.sort(dim=1).values.flatten().to(model.device)
    return stored_weights(problem, model, centroids, ids)


def test_the_smallest_of_tied_tokens_wins_among_the_decided(
    runner: Runner, config: Config, token_problem: Problem
) -> None:
    """All candidates are decided, their logits are negative, and half of them tie."""
    problem = quantised(token_problem, "decided-by-many")
    problem = replace(problem, n_rescored=problem.vocab_size)
    step = quantised_step(runner, problem, config)
    shape = problem.vocab_size, problem.hidden_size
    model = torch.full(shape, -2.0).bfloat16().to(runner.torch_device)
    model[::2] = -1
    weights = stored_head(problem, model)
    hidden = torch.ones(1, problem.hidden_size).bfloat16().to(runner.torch_device)
    out = run(step, problem, weights, hidden)
    assert Judge(weights, problem).why_wrong(out, hidden, slack_of(config)) is None


IN_PLACE = [
    ("twelve", "argmax", "some", 1),
    ("twelve", "logits", "all", 1),
    ("sixteen", "argmax", "one", 1),
    ("sixteen", "logits", "some", 3),
    ("twelve", "argmax", "all", 3),
]


@pytest.mark.parametrize(("clusters_of", "epilogue", "probes", "tokens"), IN_PLACE)
def test_rows_in_place_give_the_right_answer(
    runner: Runner, config: Config, clusters_of: str, epilogue: str, probes: str, tokens: int
) -> None:
    problem = runner.problems[clusters_of]
    numbers = {"one": 1, "some": problem.n_probes, "all": problem.n_clusters}
    problem = replace(
        problem, n_probes=numbers[probes], epilogue=epilogue, n_tokens=tokens, in_place=True
    )
    step = quantised_step(runner, problem, config)
    workload = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=3)
    assert workload.why_wrong(step, slack_of(config)) is None
    if epilogue == "logits" and probes == "all":  # bit for bit what rows in order give
        weights, states = workload.sets[0], workload.checks[3]
        ordered = replace(weights, weight=weights.weight[weights.ids.long()])
        other = quantised_step(runner, replace(problem, in_place=False), config)
        found = run(step, problem, weights, states)
        assert torch.equal(found, run(other, problem, ordered, states))


def test_rows_in_place_tie_and_fill_up_clusters(
    runner: Runner, config: Config, epilogue: str
) -> None:
    """The model has fewer rows than the clusters have places: some tokens are there twice."""
    problem = replace(runner.problems["twelve"], epilogue=epilogue, in_place=True)
    step = quantised_step(runner, problem, config)
    for seed in range(2):
        drawn = make_weights(problem, runner, seed, whole=True)
        vocab = problem.vocab_size - 5
        mixed = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
        ids = token_order(mixed % problem.n_clusters, problem.n_clusters)
        weights = replace(
            drawn, weight=drawn.weight[:vocab].contiguous(), ids=ids.int().to(drawn.ids.device)
        )
        hidden = random_states(problem, runner, seed).sign()
        judge = Judge(weights, problem, exact=True)
        out = run(step, problem, weights, hidden)
        assert judge.why_wrong(out, hidden, slack_of(config)) is None


def test_any_of_the_best_screened_can_win(runner: Runner, config: Config, epilogue: str) -> None:
    """The model's rows have nothing to do with the screened ones: any of the best is as likely."""
    problem = quantised(replace(runner.problems["sixteen"], epilogue=epilogue), "int8-decided")
    problem = replace(problem, n_rescored=6, n_tokens=4)
    step = quantised_step(runner, problem, config)
    weights = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=11).sets[0]
    assert weights.model_weight is not None
    weights = replace(weights, model_weight=weights.model_weight.flip(0).contiguous())
    hidden = random_states(problem, runner, seed=12)
    out = run(step, problem, weights, hidden)
    assert Judge(weights, problem).why_wrong(out, hidden, slack_of(config)) is None


@pytest.mark.parametrize("formats", ["int8-decided", "int4-pinned"])
def test_rows_of_zeros_and_outliers_are_screened(
    runner: Runner, config: Config, formats: str, epilogue: str
) -> None:
    problem = quantised(replace(runner.problems["twelve"], epilogue=epilogue), formats)
    step = quantised_step(runner, problem, config)
    shape = problem.vocab_size, problem.hidden_size
    model = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    model[::5], model[1::5, 3] = 0, 3000
    hidden = random_states(problem, runner, seed=8)
    hidden[1, 3] = 1000
    weights = stored_head(problem, model.to(runner.torch_device))
    out = run(step, problem, weights, hidden)
    assert Judge(weights, problem).why_wrong(out, hidden, slack_of(config)) is None


@pytest.mark.parametrize("formats", ["int8-decided", "int4-pinned"])
def test_a_state_of_nan_spoils_its_own_row_alone(
    runner: Runner, config: Config, formats: str, epilogue: str
) -> None:
    problem = quantised(replace(runner.problems["twelve"], epilogue=epilogue), formats)
    step = quantised_step(runner, problem, config)
    weights = Workload.create(problem, runner.torch_device, cold_bytes=1, seed=9).sets[0]
    hidden = random_states(problem, runner, seed=10)
    hidden[0, 7] = float("nan")
    out = run(step, problem, weights, hidden)
    assert int(out[0]) == 0 if out.dim() == 1 else bool(out[0].isnan().all())
    assert Judge(weights, problem).why_wrong(out[1:], hidden[1:], slack_of(config)) is None


def test_each_token_probes_clusters_of_its_own(
    runner: Runner, config: Config, problem: Problem
) -> None:
    problem = replace(problem, n_tokens=3)
    step = runner.make(problem, config)
    weights, hidden = make_weights(problem, runner), random_states(problem, runner, seed=1)
    scores = hidden.float() @ weights.centroids.float().T
    probed = scores.topk(problem.n_probes, dim=1).indices.tolist()
    assert len({frozenset(clusters) for clusters in probed}) == 3
    tokens = run(step, problem, weights, hidden)
    judge = Judge(weights, problem)
    assert judge.why_wrong(tokens, hidden, slack_of(config)) is None
    assert len(set(tokens_of(tokens).tolist())) > 1


def test_negative_logits_are_compared_as_numbers(
    runner: Runner, config: Config, token_problem: Problem
) -> None:
    step = runner.make(token_problem, config)
    weights = make_weights(token_problem, runner)
    weights = replace(weights, weight=-weights.weight.abs())
    hidden = random_states(token_problem, runner, seed=2).abs()
    assert bool((weights.weight.float() @ hidden[0].float() < 0).all())
    tokens = run(step, token_problem, weights, hidden)
    assert Judge(weights, token_problem).why_wrong(tokens, hidden, slack_of(config)) is None


def test_rows_that_pad_a_cluster_change_nothing(
    runner: Runner, config: Config, token_problem: Problem
) -> None:
    """A cluster with fewer tokens repeats its last one, here with the best logits of all."""
    step = runner.make(token_problem, config)
    for sign in (1, -1):
        weights = make_weights(token_problem, runner)
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
        judge = Judge(weights, token_problem)
        assert judge.why_wrong(tokens, hidden, slack_of(config)) is None


def test_the_smallest_of_tied_tokens_wins(
    runner: Runner, config: Config, token_problem: Problem
) -> None:
    step = runner.make(token_problem, config)
    for seed in range(2):
        weights = make_weights(token_problem, runner, seed, whole=True)
        rows = weights.weight.view(token_problem.n_clusters, -1, token_problem.hidden_size)
        rows[:, :] = rows[:1, :1]  # all tokens tie
        if seed:
            rows[:, ::2] += 1  # half of each cluster's do, the others lie above or below
        hidden = torch.ones(1, token_problem.hidden_size).bfloat16().to(runner.torch_device)
        judge = Judge(weights, token_problem, exact=True)
        out = run(step, token_problem, weights, hidden)
        assert judge.why_wrong(out, hidden, slack_of(config)) is None


def test_whole_numbers_give_the_exact_token(
    runner: Runner, config: Config, problem: Problem
) -> None:
    step = runner.make(problem, config)
    for seed in range(2):
        weights = make_weights(problem, runner, seed, whole=True)
        hidden = random_states(problem, runner, seed).sign()
        judge = Judge(weights, problem, exact=True)
        out = run(step, problem, weights, hidden)
        assert judge.why_wrong(out, hidden, slack_of(config)) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_logits_are_rounded_to_nearest(runner: Runner, config: Config, dtype: str) -> None:
    """Of whole numbers beyond what the dtype holds exactly: many lie just between two."""
    problem = replace(
        runner.problems["twelve"], epilogue="logits", weight_dtype=dtype, centroid_dtype=dtype
    )
    if "bf16" in str(getattr(config, "simd", "")) and dtype != "bf16":
        pytest.skip("these instructions are for bf16")
    step = runner.make(problem, config)
    weights = make_weights(problem, runner, whole=True)
    generator = torch.Generator().manual_seed(1)
    shape = (problem.vocab_size, problem.hidden_size)
    drawn = torch.randint(-60, 61, shape, generator=generator).to(runner.torch_device)
    weights = replace(
        weights,
        weight=drawn.to(format_of(dtype).torch_dtype),
        centroids=weights.centroids.to(format_of(dtype).torch_dtype),
    )
    hidden = 32 * random_states(problem, runner, seed=2).sign().to(format_of(dtype).torch_dtype)
    judge = Judge(weights, problem, exact=True)
    assert judge.why_wrong(run(step, problem, weights, hidden), hidden, slack_of(config)) is None


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_state_of_zeros_ties_everything(
    runner: Runner, config: Config, problem: Problem, zero: float
) -> None:
    step = runner.make(problem, config)
    weights = make_weights(problem, runner)
    hidden = torch.full((1, problem.hidden_size), zero).bfloat16().to(runner.torch_device)
    tokens = run(step, problem, weights, hidden)
    judge = Judge(weights, problem, exact=True)
    assert judge.why_wrong(tokens, hidden, slack_of(config)) is None
    if isinstance(step, TRITON_STEPS) and slack_of(config):  # others pick among clusters that tie
        assert tokens_of(tokens).tolist() == [0]


def test_signed_zeros_tie(runner: Runner, config: Config, token_problem: Problem) -> None:
    problem = replace(token_problem, n_probes=token_problem.n_clusters)
    step = runner.make(problem, config)
    weights = make_weights(problem, runner)
    weights.weight[:] = torch.where(weights.ids % 2 == 0, -0.0, 0.0)[:, None]
    hidden = random_states(token_problem, runner, seed=4).abs()
    assert run(step, problem, weights, hidden).tolist() == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_leaves_nothing_unwritten(
    runner: Runner, config: Config, problem: Problem, value: float
) -> None:
    step = runner.make(problem, config)
    weights = make_weights(problem, runner)
    hidden = random_states(problem, runner, seed=5)
    bad = hidden.clone()
    bad[0, 7] = value
    if isinstance(step, TRITON_STEPS):
        step.scratch.selected.fill_(2**30)  # no cluster that an earlier call listed
    out = new_out(problem, hidden.device).fill_(-7)  # NaN may be right here
    step(weights, bad, out)
    assert not bool((out == -7).any())
    assert 0 <= tokens_of(out).item() < problem.vocab_size
    if value != value:  # as plain torch has it: a row of NaN, whose argmax is 0
        assert out.tolist() == [0] if out.dim() == 1 else bool(out.isnan().all())
    tokens = run(step, problem, weights, hidden)  # and the next call is right again
    assert Judge(weights, problem).why_wrong(tokens, hidden, slack_of(config)) is None


@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_row_stands_for_those_that_are_missing(
    runner: Runner, config: Config, problem: Problem, rows: int
) -> None:
    problem = replace(problem, n_tokens=4)
    step = runner.make(problem, config)
    weights = make_weights(problem, runner)
    hidden = random_states(problem, runner, seed=6)
    whole = torch.cat([hidden[:rows], hidden[rows - 1 :][:1].expand(4 - rows, -1)])
    few = hidden.clone()
    few[rows:] = float("nan")  # what lies behind is not read
    out = poisoned_out(problem, hidden.device)
    step(weights, few[:rows], out)
    assert Judge(weights, problem).why_wrong(out, whole, slack_of(config)) is None


def test_calls_leave_nothing_behind_for_the_next(
    runner: Runner, config: Config, problem: Problem
) -> None:
    """Each call has lower logits than the one before, and finds its scratch spoiled."""
    step = runner.make(problem, config)
    weights = make_weights(problem, runner)
    before = step.scratch.state.clone() if isinstance(step, (*TRITON_STEPS, CudaStep)) else None
    judge = Judge(weights, problem)
    for call in range(3):
        hidden = random_states(problem, runner, seed=call) * 2.0 ** (-8 * call)
        tokens = run(step, problem, weights, hidden)
        assert judge.why_wrong(tokens, hidden, slack_of(config)) is None
        if isinstance(step, CudaStep):
            assert torch.equal(step.scratch.state, before)
            step.scratch.scores.fill_(float("nan"))
            step.scratch.moments.fill_(float("nan"))
        if not isinstance(step, TRITON_STEPS):
            continue
        count = slice(problem.n_tokens, 2 * problem.n_tokens)  # written before it is read
        step.scratch.state[count] = before[count]
        assert torch.equal(step.scratch.state, before)
        step.scratch.state[count] = 10**6
        step.scratch.scores.fill_(float("nan"))
        step.scratch.selected.fill_(2**30)
        before = step.scratch.state.clone()


QUANTISED_ON_CPU: dict[str, Problem] = {
    "int8": Problem(
        vocab_size=2400,
        hidden_size=1152,
        n_clusters=200,
        n_probes=20,
        weight_dtype="int8",
        centroid_dtype="int8",
        model_dtype="bf16",
        n_rescored=8,
        n_pinned=2,
    ),
    "int4-several-tokens": Problem(
        vocab_size=2400,
        hidden_size=33,
        n_clusters=200,
        n_probes=20,
        n_tokens=3,
        weight_dtype="int4",
        centroid_dtype="int4",
        model_dtype="fp16",
        n_rescored=8,
        n_pinned=2,
        epilogue="logits",
    ),
    "int4-rows-one-probe": Problem(
        vocab_size=2400,
        hidden_size=640,
        n_clusters=150,
        n_probes=1,
        weight_dtype="int4",
        centroid_dtype="int8",
        model_dtype="fp32",
        n_rescored=1,
    ),
    "int8-rows": Problem(
        vocab_size=2400,
        hidden_size=99,
        n_clusters=200,
        n_probes=20,
        weight_dtype="int8",
        centroid_dtype="bf16",
        model_dtype="bf16",
        n_pinned=2,
        epilogue="logits",
    ),
    "int8-centroids-alone": Problem(
        vocab_size=2400,
        hidden_size=200,
        n_clusters=200,
        n_probes=20,
        weight_dtype="bf16",
        centroid_dtype="int8",
    ),
    "all-probed": Problem(
        vocab_size=2400,
        hidden_size=200,
        n_clusters=150,
        n_probes=150,
        weight_dtype="int4",
        centroid_dtype="bf16",
        model_dtype="bf16",
        n_rescored=8,
        epilogue="logits",
    ),
}


def _step_on_cpu(name: str, problem: Problem) -> tuple[Step, int]:
    """A step of a config for CPUs that fits the problem."""
    config = _narrowed(ON_CPU[name], problem)
    return _compiled_step(problem, config, CPU), slack_of(config)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("case", QUANTISED_ON_CPU)
def test_quantised_heads_are_right(case: str, name: str) -> None:
    """On random numbers, outliers in rows and states, and rows of zeros."""
    problem = QUANTISED_ON_CPU[case]
    step, slack = _step_on_cpu(name, problem)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3)
    assert workload.why_wrong(step, slack) is None
    weights, judge = workload.sets[0], Judge(workload.sets[0], problem)
    hidden = workload.checks[3].clone()
    hidden[:, 5] *= 1000
    for row in range(0, problem.vocab_size, 7):
        values = torch.zeros(problem.hidden_size)
        values[row % problem.hidden_size] = 300.0 * (row % 3)
        weights.put(problem, row, values)
    for states in (hidden, torch.zeros_like(hidden)):
        out = run(step, problem, weights, states)
        assert judge.why_wrong(out, states, slack) is None


@pytest.mark.parametrize("name", ON_CPU)
def test_the_models_own_rows_decide(name: str) -> None:
    """Rows that look alike in 4 bits: the best differs in what these lose; of ties the first."""
    problem = replace(QUANTISED_ON_CPU["int4-rows-one-probe"], n_probes=3, n_rescored=8)
    step, _ = _step_on_cpu(name, problem)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3)
    weights, hidden = workload.sets[0], torch.ones(1, problem.hidden_size)
    scores = weights.centroid_rows(problem, slice(None), torch.float32).sum(dim=1)
    first = int(scores.argmax()) * problem.cluster_size
    for member in range(8):
        values = torch.full((problem.hidden_size,), 7.0)
        values[0] += 0.125 * (member in (2, 5))
        weights.put(problem, first + member, values)
    assert int(run(step, problem, weights, hidden)) == int(weights.ids[first + 2])


@pytest.mark.parametrize("selection", ["threshold", "histogram", "nth_element"])
def test_pinned_clusters_are_probed_beside_the_best(selection: str) -> None:
    problem = replace(QUANTISED_ON_CPU["int8-rows"], n_pinned=3, n_probes=4)
    for config in (
        CppFusedConfig(selection=selection, slack=0),
        CppStagedConfig(selection=selection, slack=0),
    ):
        step = _compiled_step(problem, config, CPU)
        workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3)
        weights, hidden = workload.sets[0], workload.states[0].abs()
        for centroids in (weights.centroids, torch.zeros_like(weights.centroids)):
            weights = replace(weights, centroids=centroids.clone())
            weights.centroids[:2] = -1.0  # the worst of all
            out = run(step, problem, weights, hidden)
            probed = (out[0, weights.ids.long()] != -1e4).view(problem.n_clusters, -1).all(dim=1)
            assert probed[:3].all()
            scores = weights.centroids.float() @ hidden[0].float()
            best = set(scores.argsort(descending=True, stable=True)[:4].tolist())
            assert set(probed.nonzero()[:, 0].tolist()) == best | {0, 1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fused", "staged"])
@pytest.mark.parametrize("case", ["int8", "int8-rows", "int8-centroids-alone"])
def test_a_state_that_is_not_finite_is_plain_torchs(case: str, name: str, value: float) -> None:
    """Of a NaN, token 0 or a row of NaN; of infinities, what products with them give."""
    problem = QUANTISED_ON_CPU[case]
    step, slack = _step_on_cpu(name, problem)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=3)
    weights, hidden = workload.sets[0], workload.states[0].clone()
    hidden[0, 3] = value
    hidden[0, 4] = -value
    out = run(step, problem, weights, hidden)
    expected = run(TorchStep(problem), problem, weights, hidden)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    if value != value:
        assert out.isnan().all() if problem.epilogue == "logits" else out.tolist() == [0]
    assert workload.why_wrong(step, slack) is None


@pytest.mark.parametrize("seed", range(8))
def test_any_valid_config_of_a_cpu_gives_right_tokens(
    seed: int, random_config: Callable[[random.Random], Config]
) -> None:
    rng = random.Random(seed)
    config, problem = random_config(rng), _small_problem(rng)
    while Candidate(problem, config, CPU).why_invalid():
        config, problem = random_config(rng), _small_problem(rng)
    step = _compiled_step(problem, config, CPU)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=seed)
    assert workload.why_wrong(step, slack_of(config)) is None


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("seed", range(8))
def test_any_valid_config_gives_right_tokens(
    seed: int, random_config: Callable[[random.Random], Config]
) -> None:
    rng = random.Random(seed)
    device = replace(find_device("orin"), sm_count=1)
    while True:
        config, problem = random_config(rng), _small_problem(rng)
        if isinstance(config, PersistentConfig):
            config = replace(
                config, programs_per_sm=1
            )  # or the interpreter never leaves a barrier
        loops = getattr(config, "score_programs_per_sm", 0) > 0
        if Candidate(problem, config, device).why_invalid() is None and not (
            loops and CANNOT_LOOP
        ):
            break
    step = _interpreted_step(problem, config, device)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=seed)
    assert workload.why_wrong(step, slack_of(config)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_any_valid_config_that_streams_gives_right_tokens(seed: int) -> None:
    rng = random.Random(seed)
    device = device_of(torch.device("cuda"))
    assert device is not None
    if device.capability < 90:
        pytest.skip("needs sm_90")
    while True:
        values = {
            name: rng.choice(knob["choices"]) for name, knob in knobs(StreamedConfig).items()
        }
        config = StreamedConfig(**values)
        clusters, size = rng.choice((1, 7, 131, 1000, 9496)), rng.choice((1, 3, 12, 16))
        weight = rng.choice(("bf16", "fp16", "int8", "int8"))
        screens = weight == "int8"
        problem = Problem(
            vocab_size=clusters * size,
            hidden_size=rng.choice((8, 64, 192, 1152, 3072, 4096)),
            n_clusters=clusters,
            n_probes=rng.choice((1, min(clusters, 256), clusters)),
            weight_dtype=weight,
            centroid_dtype=rng.choice(("bf16", "fp16", "int8")),
            epilogue=rng.choice(list(EPILOGUES)),
            model_dtype=rng.choice(("bf16", "fp16")) if screens else "",
            n_rescored=min(rng.choice((0, 1, 8, 40)), clusters * size) if screens else 0,
            n_pinned=min(rng.choice((0, 0, 3)), clusters),
        )
        if Candidate(problem, config, device).why_invalid() is None:
            break
    step = _compiled_step(problem, config, device)
    workload = Workload.create(problem, torch.device("cuda"), cold_bytes=1, seed=seed)
    assert workload.why_wrong(step, slack_of(config)) is None


def _small_problem(rng: random.Random) -> Problem:
    clusters, size = rng.choice((1, 7, 11, 20)), rng.choice((1, 3, 5, 12))
    weight = rng.choice(("bf16", "fp16", "fp32", "int8", "int4"))
    quantised = format_of(weight).quantised
    return Problem(
        vocab_size=clusters * size,
        hidden_size=rng.choice((1, 33, 96, 200)),
        n_clusters=clusters,
        n_probes=rng.randint(1, clusters),
        n_tokens=rng.choice((1, 1, 2)),
        weight_dtype=weight,
        centroid_dtype=rng.choice(("bf16", "fp16", "fp32", "int8", "int4")),
        model_dtype=rng.choice(("bf16", "fp16", "fp32")) if quantised else "",
        n_rescored=rng.choice((0, 1, min(8, clusters * size))) if quantised else 0,
        n_pinned=rng.choice((0, 0, min(2, clusters))),
        epilogue=rng.choice(tuple(EPILOGUES)),
        in_place=rng.choice((False, not quantised)),
    )
