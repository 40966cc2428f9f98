"""What a decode step must do, whatever its plan: interpreted, on a GPU, and on this CPU."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

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
from flashtune.kernels.testing.runner import random_weights, run, tokens_of, why_wrong
from flashtune.kernels.weights import Step
from flashtune.testing import DecodeContract, Runner
from flashtune.tuning_db.device import Device, find_device
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
    "threshold_digits": StagedConfig(
        score_rows=16, score_warps=1, gather_rows=32, gather_warps=2, widen="digits", slack=0
    ),
    "batched_digits": BatchedConfig(score_warps=1, score_stages=2, widen="digits", slack=0),
    "batched_listed_digits": BatchedConfig(
        visit="listed", gather_rows=32, gather_warps=2, widen="digits", slack=0
    ),
    "dense_digits": DenseConfig(gather_rows=32, gather_warps=2, widen="digits"),
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
    "threshold_digits_pdl": StagedConfig(
        score_rows=16,
        score_warps=1,
        score_stages=3,
        gather_rows=16,
        gather_warps=1,
        gather_stages=4,
        widen="digits",
        pdl=True,
    ),
    "batched_digits_pdl": BatchedConfig(
        visit="listed",
        score_rows=64,
        score_warps=4,
        gather_rows=64,
        gather_warps=4,
        widen="digits",
        pdl=True,
        slack=8,
    ),
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
WIDENED = {"bits": {"int8"}, "digits": {"int8", "int4"}}  # what a way to multiply is for
CANNOT_LOOP = triton.__version__.startswith("3.6.")  # with numpy 2.4


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


class TritonRunner(Runner):
    """Steps of Triton kernels, with tiles of one width; skips what cannot run there."""

    block: ClassVar[int]

    def fitted(self, problem: Problem, config: Config) -> Config:
        """The config with tiles of this runner's width."""
        block = self.block // 2 if isinstance(config, BatchedConfig | DenseConfig) else self.block
        if getattr(config, "widen", "") == "digits":
            block = 64  # two groups of int4; wider tiles in 16 bits would not fit one warp
        blocks = {f"{stage}_block": block for stage in ("score", "gather")}
        if block >= problem.hidden_size:
            blocks |= {f"{stage}_stages": 1 for stage in ("score", "gather")}
        dtypes = {problem.weight_dtype, problem.centroid_dtype}
        if not dtypes & WIDENED.get(getattr(config, "widen", ""), dtypes):
            pytest.skip("nothing is widened")
        prefetches = getattr(config, "prefetch_margin", -1) >= 0
        if (config.pdl or prefetches) and self.device.capability < 90:
            pytest.skip("needs sm_90")
        if isinstance(config, PersistentConfig) and problem.n_tokens > self.device.sm_count:
            pytest.skip("the interpreter runs one program at a time: no barrier between several")
        return replace(config, **{name: blocks[name] for name in blocks if hasattr(config, name)})

    def kept(self, step: Step) -> torch.Tensor | None:
        """All of the state but the count of selected clusters, which is written first."""
        state = step.scratch.state.clone()
        tokens = len(step.scratch.scores)
        state[tokens : 2 * tokens] = 0
        return state

    def spoil(self, step: Step) -> None:
        tokens = len(step.scratch.scores)
        step.scratch.state[tokens : 2 * tokens] = 10**6
        step.scratch.scores.fill_(float("nan"))
        step.scratch.selected.fill_(2**30)  # no cluster that an earlier call listed


class InterpretedRunner(TritonRunner):
    block = 64

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def make(self, problem: Problem, config: Config) -> Step:
        return _interpreted_step(problem, self.fitted(problem, config), self.device)


class CudaRunner(TritonRunner):
    block = 256

    def make(self, problem: Problem, config: Config) -> Step:
        if PLANS[config.plan].builder != "cuda":
            return super().make(problem, self.fitted(problem, config))
        if problem.n_tokens > 1 or self.device.capability < 90:
            pytest.skip("streamed is for one token and sm_90")
        if "int4" in (problem.weight_dtype, problem.centroid_dtype):
            pytest.skip("streamed does not read int4")
        return super().make(problem, config)

    def kept(self, step: Step) -> torch.Tensor | None:
        return step.scratch.state.clone() if isinstance(step, CudaStep) else super().kept(step)

    def spoil(self, step: Step) -> None:
        if isinstance(step, CudaStep):
            step.scratch.scores.fill_(float("nan"))
            step.scratch.moments.fill_(float("nan"))
        else:
            super().spoil(step)


class CpuRunner(Runner):
    def make(self, problem: Problem, config: Config) -> Step:
        return super().make(problem, _narrowed(config, problem))


class Contract(DecodeContract):
    """The contract, with the reasons for which our own plans refuse a problem."""

    may_refuse = (
        "has no launch that decides|in_gather writes no list|topk cannot pin|"
        "tensor cores need one dtype|prefetch needs clusters|streamed copies adjacent rows"
    )


class OnTriton(Contract):
    def test_all_clusters_that_tie_are_probed(
        self, runner: Runner, config: Config, problem: Problem
    ) -> None:
        """Only with slack: without, some of them are picked."""
        if not slack_of(config) or PLANS[config.plan].builder != "triton":
            pytest.skip("picks among clusters that tie")
        step = runner.make(problem, config)
        hidden = torch.zeros(1, problem.hidden_size).bfloat16().to(runner.torch_device)
        out = run(step, problem, random_weights(problem, runner), hidden)
        assert tokens_of(out).tolist() == [0]


class TestInterpreted(OnTriton):
    @pytest.fixture(params=CONFIGS)
    def config(self, request: pytest.FixtureRequest) -> Config:
        if request.param == "threshold_looping" and CANNOT_LOOP:
            pytest.skip("this interpreter cannot loop from a program's number on")
        return CONFIGS[request.param]

    @pytest.fixture
    def runner(self, interpreted: None) -> Runner:
        return InterpretedRunner(device=replace(find_device("orin"), sm_count=1))


@pytest.mark.gpu
class TestCuda(OnTriton):
    @pytest.fixture(params=[*CONFIGS, *ON_SM_90])
    def config(self, request: pytest.FixtureRequest) -> Config:
        return {**CONFIGS, **ON_SM_90}[request.param]

    @pytest.fixture
    def runner(self) -> Runner:
        device = device_of(torch.device("cuda"))
        assert device is not None
        return CudaRunner(
            device=device,
            problems={
                "twelve": Problem(
                    vocab_size=16380, hidden_size=1152, n_clusters=1365, n_probes=64
                ),
                "sixteen": Problem(
                    vocab_size=40000, hidden_size=640, n_clusters=2500, n_probes=77
                ),
            },
        )


class TestCpu(Contract):
    @pytest.fixture(params=ON_CPU)
    def config(self, request: pytest.FixtureRequest) -> Config:
        return ON_CPU[request.param]

    @pytest.fixture
    def runner(self) -> Runner:
        return CpuRunner(
            device=CPU,
            problems={
                "twelve": Problem(vocab_size=16380, hidden_size=99, n_clusters=1365, n_probes=64),
                "sixteen": Problem(vocab_size=40000, hidden_size=96, n_clusters=2500, n_probes=77),
            },
        )


class TestAbacus(Contract):
    """A kind of device and a plan that somebody added."""

    @pytest.fixture(params=ON_ABACUS)
    def config(self, request: pytest.FixtureRequest) -> Config:
        return ON_ABACUS[request.param]

    @pytest.fixture
    def runner(self, abacus: None) -> Runner:
        return Runner(device=ABACUS_10)


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
    assert why_wrong(workload, step, config) is None


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
        assembled = getattr(config, "widen", "") == "bits"  # which the interpreter does not run
        if Candidate(problem, config, device).why_invalid() is None and not (
            (loops and CANNOT_LOOP) or assembled
        ):
            break
    step = _interpreted_step(problem, config, device)
    workload = Workload.create(problem, torch.device("cpu"), cold_bytes=1, seed=seed)
    assert why_wrong(workload, step, config) is None


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
    assert why_wrong(workload, step, config) is None


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
