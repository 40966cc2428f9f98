"""What is particular to kernels on a CPU: instructions, threads, forks, and the head on top."""

import itertools
import logging
import os
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.backends.states import wide

from flashtune.kernels.backends.cpp.backend import CppBackend
from flashtune.kernels.backends.cpp.huge_pages import advise
from flashtune.kernels.backends.cpp.this_cpu import describe_cpu
from flashtune.kernels.backends.target import default_config, target_of
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.timing import WallTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, slack_of
from flashtune.kernels.plans.cpp_fused import CPP_FUSED, CppFusedConfig
from flashtune.kernels.plans.cpp_staged import CppStagedConfig
from flashtune.kernels.plans.parts.simd import BF16_LEVELS, simd_levels, useful_levels
from flashtune.kernels.runtime import binding
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

CPU, PLACE = describe_cpu(), torch.device("cpu")
PROBLEM = Problem(vocab_size=1200, hidden_size=128, n_clusters=100, n_probes=10)
BEST = useful_levels(PROBLEM, CPU)[-1]
TWO = CppFusedConfig(simd=BEST, threads=min(2, CPU.sm_count), slack=0)
TOOLS = Toolchain(triton="")


def make_step(config: Config = TWO, problem: Problem = PROBLEM) -> Step:
    return CppBackend().loader(Candidate(problem, config, CPU), PLACE)()


def make_workload(problem: Problem = PROBLEM) -> Workload:
    return Workload.create(problem, PLACE, cold_bytes=1, seed=0)


@pytest.fixture
def workload() -> Workload:
    return make_workload()


@pytest.mark.parametrize(
    ("simd", "dtype"), list(itertools.product(simd_levels(CPU.arch), ("bf16", "fp16", "fp32")))
)
def test_all_instructions_read_all_dtypes(simd: str, dtype: str) -> None:
    other = {"bf16": "fp32", "fp16": "bf16", "fp32": "fp16"}[dtype]
    problem = replace(PROBLEM, hidden_size=200, weight_dtype=dtype, centroid_dtype=other)
    config = replace(default_config(problem, CPU), simd=simd)
    needs = {"avx512_vnni": "rows or centroids in int8, or in int4 with a model in 16 bits"}
    if dtype != "bf16":
        needs |= dict.fromkeys(BF16_LEVELS, "hidden states and weights in bf16")
    if simd in needs:
        with pytest.raises(FlashtuneError, match=f"{simd} needs {needs[simd]}"):
            make_step(config, problem)
        return
    assert make_workload(problem).why_wrong(make_step(config, problem), slack_of(config)) is None


@pytest.mark.parametrize("simd", simd_levels(CPU.arch))
@pytest.mark.parametrize("hidden_size", [99, 128, 352])
@pytest.mark.parametrize(
    ("rows", "centroids", "model"),
    [("int8", "int4", "bf16"), ("int4", "bf16", "bf16"), ("int4", "int4", "fp16")],
)
def test_all_instructions_read_quantised_formats(
    simd: str, hidden_size: int, rows: str, centroids: str, model: str
) -> None:
    """Also of states whose groups have no unit in common; 352 is whole groups, not blocks."""
    problem = replace(
        PROBLEM,
        hidden_size=hidden_size,
        weight_dtype=rows,
        centroid_dtype=centroids,
        model_dtype=model,
        n_rescored=3,
        epilogue="logits",
    )
    config = replace(default_config(problem, CPU), simd=simd)
    reason = Candidate(problem, config, CPU).why_invalid()
    if reason:
        assert reason.startswith(f"{simd} needs")
        return
    workload = make_workload(problem)
    judged = replace(workload, checks=(*workload.checks, wide(workload.checks[0])))
    assert judged.why_wrong(make_step(config, problem), slack_of(config)) is None


def test_halves_keep_their_subnormals_and_signs() -> None:
    problem = replace(PROBLEM, hidden_size=64, weight_dtype="fp16", centroid_dtype="fp16")
    for simd in useful_levels(problem, CPU):
        workload = make_workload(problem)
        weights = workload.sets[0]
        weights.weight.copy_(weights.weight.sign() * 2.0**-24)
        step = make_step(replace(default_config(problem, CPU), simd=simd), problem)
        assert workload.why_wrong(step, slack=16) is None


def test_the_second_start_has_the_next_useful_instructions() -> None:
    device = replace(CPU, arch="x86_64-avx512_bf16")
    int4 = replace(PROBLEM, weight_dtype="int4", model_dtype="bf16")
    for problem, first in (
        (PROBLEM, ["avx512_bf16", "avx512"]),
        (replace(PROBLEM, weight_dtype="fp32", centroid_dtype="fp32"), ["avx512", "avx2"]),
        (replace(PROBLEM, weight_dtype="int8", model_dtype="fp32"), ["avx512_vnni", "avx512"]),
        (int4, ["avx512_bf16", "avx512_vnni"]),
        (replace(int4, model_dtype="fp32"), ["avx512", "avx2"]),
    ):
        starts = CPP_FUSED.starts(problem, device)
        assert [start.simd for start in starts[:2]] == first
        assert not any(Candidate(problem, each, device).why_invalid() for each in starts[:2])


def test_no_more_clusters_than_allowed_are_probed_when_all_tie(workload: Workload) -> None:
    for config in (TWO, CppStagedConfig(selection="nth_element"), replace(TWO, slack=8)):
        weights = workload.sets[0]
        centroids = torch.ones_like(weights.centroids)
        weight = torch.zeros_like(weights.weight)
        weight[12 * (PROBLEM.n_probes + slack_of(config)) :] = 1.0  # best, but beyond the limit
        out = torch.zeros(1, dtype=torch.int64)
        hidden = torch.ones(1, PROBLEM.hidden_size).bfloat16()
        make_step(config)(replace(weights, centroids=centroids, weight=weight), hidden, out)
        position = int((weights.ids == out.item()).nonzero())
        assert position < 12 * (PROBLEM.n_probes + slack_of(config))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # this is what is tested
def test_a_fork_gets_threads_of_its_own(workload: Workload) -> None:
    step = make_step()
    assert workload.why_wrong(step, slack=0) is None
    child = os.fork()
    if child == 0:
        fine = workload.sets[0] is not None
        out = torch.zeros(1, dtype=torch.int64)
        for _ in range(20):
            step(workload.sets[0], workload.states[0], out)
        del step  # ends the child's threads, not the parent's
        os._exit(0 if fine and 0 <= int(out) < PROBLEM.vocab_size else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert workload.why_wrong(step, slack=0) is None


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_idle_threads_sleep(workload: Workload) -> None:
    step = make_step()
    out = torch.zeros(1, dtype=torch.int64)
    step(workload.sets[0], workload.states[0], out)
    time.sleep(0.05)
    before = cpu_seconds()
    time.sleep(0.5)
    assert cpu_seconds() - before < 0.1
    step(workload.sets[0], workload.states[0], out)  # and wake again


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_start_late_and_end_with_the_step(workload: Workload) -> None:
    before = n_threads()
    step = make_step()
    assert n_threads() == before
    step(workload.sets[0], workload.states[0], torch.zeros(1, dtype=torch.int64))
    assert n_threads() == before + TWO.threads - 1
    del step
    assert n_threads() == before


def test_steps_of_their_own_run_at_the_same_time(workload: Workload) -> None:
    reasons: list[str | None] = []

    def run() -> None:
        step = make_step()
        reasons.extend(workload.why_wrong(step, slack=0) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [None] * 20


def test_many_calls_with_many_threads_agree(workload: Workload) -> None:
    device = replace(CPU, sm_count=8)  # more threads than cores: every order happens
    config = replace(TWO, threads=8, parts=2)
    step = CppBackend().loader(Candidate(PROBLEM, config, device), PLACE)()
    out, first = torch.zeros(1, dtype=torch.int64), None
    for call in range(3000):
        step(workload.sets[0], workload.states[0], out)
        first = int(out) if first is None else first
        assert int(out) == first, call


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (replace(TWO, threads=192), {}, "192 threads are more than the"),
        (replace(TWO, simd="neon" if "x86" in CPU.arch else "avx2"), {}, "has no"),
        (replace(TWO, score_rows=8, score_columns=4), {}, "more than 16 sums"),
        (replace(TWO, gather_columns=8), {"hidden_size": 24}, "exceeds the hidden size"),
        (replace(TWO, gather_rows=8), {"vocab_size": 400}, "more than a cluster's 4"),
        (replace(TWO, gather_rows=2), {"in_place": True}, "gather_rows must be 1, not 2"),
        (replace(TWO, score_rows=8), {"n_clusters": 4, "n_probes": 1}, "more than the 4 clusters"),
    ],
)
def test_each_rule_gives_its_reason(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        _ = Candidate(replace(PROBLEM, **changes), config, CPU).source


def test_the_timer_times_a_pass_over_all_sets(workload: Workload) -> None:
    calls = []
    timer = WallTimer(lambda weights, *_: calls.append(weights), workload)
    assert len(timer.sample(3)) == 3
    assert len(calls) == len(workload.sets) + 3 * timer.calls
    assert all(sample > 0 for sample in target_of(CPU).timer(make_step(), workload).sample(2))


def test_advice_changes_no_tensor() -> None:
    large = torch.arange(3 * 2**20)
    expected = large.clone()
    for tensor in (large, large[5:], large[:7], torch.empty(0)):
        advise(tensor)
    assert torch.equal(large, expected)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of its own, and this machine's CPU without its bandwidth."""
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    for module in ("runtime.binding", "head"):
        monkeypatch.setattr(f"flashtune.kernels.{module}.device_of", lambda _: CPU)
    monkeypatch.setattr(binding, "toolchain", lambda _: TOOLS)
    return tmp_path / "tuning.db"


def make_head() -> FlashHead:
    weights = make_workload().sets[0]
    maps = weights.ids.view(PROBLEM.n_clusters, -1)
    by_token = weights.weight[torch.argsort(weights.ids)]
    return FlashHead(by_token, weights.centroids, vocab_maps=maps, n_probes=PROBLEM.n_probes)


def test_a_head_on_a_cpu_runs_the_winner(database: Path) -> None:
    winner = replace(TWO, parts=2)
    with Store(database) as store:
        store.add(
            Record(
                device=CPU.name,
                toolchain=TOOLS,
                problem=PROBLEM,
                config=config_data(winner),
                provenance=Provenance.MEASURED,
                measurement=Measurement(outcome=Outcome.OK, median_us=10.0),
                created="2026-01-31T12:00:00Z",
            )
        )
    head, workload = make_head(), make_workload()
    data = head.explain()
    assert (data["level"], data["config"]) == ("exact", dict(config_data(winner)))
    step = head.decoder.bound("argmax", 1).take_step()
    assert workload.why_wrong(step, slack=0) is None


def test_a_head_without_a_record_runs_the_default(database: Path) -> None:
    head = make_head()
    head(torch.ones(1, PROBLEM.hidden_size).bfloat16())
    assert head.explain()["level"] == "default"
    assert head.explain()["config"] == dict(config_data(default_config(PROBLEM, CPU)))


@pytest.mark.parametrize("trouble", ["no compiler", "failing compiler", "no cache"])
def test_without_a_library_a_head_runs_torch_and_warns_once(
    trouble: str,
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path / "cache"))
    if trouble == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif trouble == "failing compiler":
        monkeypatch.setenv("CXX", "false")
    else:
        (tmp_path / "cache").write_text("")
    head = make_head()
    for n_tokens in (1, 2, 1):
        assert head(torch.ones(n_tokens, PROBLEM.hidden_size).bfloat16()).shape == (n_tokens,)
    assert head.explain()["level"] == "torch"
    warnings = [line for line in caplog.records if line.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "plain torch is used instead" in warnings[0].getMessage()
