"""The plan in CUDA C++: which problems it is for, what its launches take, and how it is built."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.cuda import nvrtc
from flashtune.kernels.backends.cuda.backend import CudaBackend
from flashtune.kernels.backends.cuda.nvrtc import compile_cuda
from flashtune.kernels.backends.target import default_config, known_good, target_of
from flashtune.kernels.plans import STAGED, STREAMED
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, knobs, parse_config, slack_of
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.runtime.choice import USER, Level, Source, choose, contenders
from flashtune.tuning_db.cached_file import whole
from flashtune.tuning_db.device import Device, Toolchain, all_devices, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import EPILOGUES, PRESETS, Problem, parse_shape
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

H200, ORIN, THOR, RTX_5090 = (find_device(name) for name in ("h200", "orin", "thor", "rtx-5090"))
QWEN = parse_shape("qwen3-vl-2b")
SMALL = Problem(vocab_size=1536, hidden_size=320, n_clusters=128, n_probes=8)
TOOLS = Toolchain(triton="3.6.0", torch="2.13.0", driver="580")


@pytest.fixture
def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where no wheel of the compiler is installed."""
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    nvrtc.why_missing.cache_clear()
    nvrtc._version.cache_clear()
    yield
    monkeypatch.undo()
    nvrtc.why_missing.cache_clear()
    nvrtc._version.cache_clear()


NARROW = StreamedConfig(gather_warps=8)
UNEVEN = StreamedConfig(score_stages=1, score_warps=12)


@pytest.mark.parametrize(
    ("changes", "config", "device", "why"),
    [
        ({"n_tokens": 2}, NARROW, H200, "one token at a time, not 2"),
        ({"in_place": True}, NARROW, H200, "streamed copies adjacent rows, not rows in place"),
        ({}, NARROW, ORIN, "need sm_90 or later"),
        ({"weight_dtype": "fp32"}, NARROW, H200, "weights of 16 bits or int8, not bf16, fp32"),
        ({"centroid_dtype": "fp32"}, NARROW, H200, "weights of 16 bits or int8, not bf16, fp32"),
        ({"weight_dtype": "int4", "model_dtype": "bf16"}, NARROW, H200, "not bf16, int4"),
        ({"centroid_dtype": "int8", "hidden_size": 2040}, NARROW, H200, "a multiple of 16, not"),
        (
            {"weight_dtype": "int8", "model_dtype": "bf16", "n_rescored": 65},
            NARROW,
            H200,
            "decides at most 64 tokens again, not 65",
        ),
        ({"n_pinned": 1100}, NARROW, H200, "1100 pinned clusters are too many for 8 warps"),
        ({"hidden_size": 2044}, NARROW, H200, "a multiple of 8, not 2044"),
        ({"hidden_size": 32768}, NARROW, H200, "does not fit the registers of 8 warps"),
        ({"hidden_size": 8192}, NARROW, H200, "rows in flight of the score do not fit"),
        ({"hidden_size": 4096}, UNEVEN, H200, "do not fit on one multiprocessor"),
        (
            {"weight_dtype": "int8", "model_dtype": "bf16", "n_rescored": 8},
            NARROW,
            THOR,
            "keeps of its rows needs more than 48 KiB of shared memory on 20 multiprocessors",
        ),
        ({"n_clusters": 37984}, StreamedConfig(), H200, "scores are too many for 16 warps"),
    ],
)
def test_what_it_is_not_for_is_said(
    changes: dict[str, Any], config: StreamedConfig, device: Device, why: str
) -> None:
    problem = replace(QWEN, **changes)
    reason = Candidate(problem, config, device).why_invalid()
    assert reason is not None
    assert why in reason
    with pytest.raises(FlashtuneError, match="streamed config not valid"):
        _ = Candidate(problem, config, device).source


def test_every_preset_has_a_start_on_hopper() -> None:
    for preset in PRESETS:
        problem = parse_shape(preset)
        valid = [
            each
            for each in STREAMED.starts(problem, H200)
            if Candidate(problem, each, H200).why_invalid() is None
        ]
        assert valid, preset
    assert known_good(QWEN, H200)[0] == STREAMED.starts(QWEN, H200)[0]


def test_a_multiprocessor_holds_one_block_of_each_launch_and_not_two_of_one() -> None:
    rng, checked = random.Random(1), 0
    while checked < 300:
        config = StreamedConfig(
            **{name: rng.choice(each["choices"]) for name, each in knobs(StreamedConfig).items()}
        )
        device = rng.choice([each for each in all_devices() if each.capability >= 90])
        problem = parse_shape(rng.choice(list(PRESETS)))
        if Candidate(problem, config, device).why_invalid():
            continue
        checked += 1
        whole, reserved = device.limits.shared_per_sm, device.limits.reserved_per_block
        score, gather = (
            each.shared_bytes + reserved for each in Candidate(problem, config, device).launches
        )
        assert score + gather <= whole
        assert 2 * score > whole
        assert score + 2 * gather > whole
        assert max(score, gather) - reserved <= device.limits.shared_per_block


@pytest.mark.parametrize("device", [H200, THOR, RTX_5090], ids=lambda device: device.arch)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_compiles_without_a_gpu(device: Device, epilogue: str, dtype: str) -> None:
    for config in (StreamedConfig(), StreamedConfig(prefetch=False, early=False, gather_warps=8)):
        problem = replace(SMALL, epilogue=epilogue, weight_dtype=dtype)
        uses = CudaBackend().compile(Candidate(problem, config, device))
        assert [use.kernel for use in uses] == ["score", "gather"]
        for use, launch in zip(uses, Candidate(problem, config, device).launches, strict=True):
            assert (use.programs, use.warps) == (device.sm_count, launch.warps)
            assert use.spilled == 0
            assert use.registers * 32 * use.warps <= device.limits.registers_per_sm


def test_the_compiler_counts_no_more_shared_memory_than_the_plan() -> None:
    from flashtune.kernels.backends.cubin import resource_usage

    screens = "weight=int8,centroids=int8,rescored=8"
    shapes = ("gemma-3-1b", f"qwen3-vl-2b,{screens}", f"gemma-3-1b,{screens},pinned=3")
    for problem in (SMALL, QWEN, *map(parse_shape, shapes)):
        needs = resource_usage(
            compile_cuda(Candidate(problem, StreamedConfig(), H200).source, "sm_90")
        )
        for launch in Candidate(problem, StreamedConfig(), H200).launches:
            assert (
                needs[launch.kernel]["SHARED"]
                <= (launch.shared_bytes - launch.dynamic_bytes) + H200.limits.reserved_per_block
            )
            assert (launch.shared_bytes - launch.dynamic_bytes) - needs[launch.kernel][
                "SHARED"
            ] < 1024


def test_its_binary_is_kept_and_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path))
    source = Candidate(SMALL, StreamedConfig(), H200).source
    binary = compile_cuda(source, "sm_90")
    (kept,) = (tmp_path / "cuda").iterdir()
    assert whole(kept) == binary
    monkeypatch.setattr(nvrtc, "_compiled", lambda *_: b"anew")
    assert compile_cuda(source, "sm_90") == binary
    assert compile_cuda(source, "sm_100") == b"anew"
    assert compile_cuda(source + "\n", "sm_90") == b"anew"


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(nvrtc, "_compiled", lambda *_: b"anew")
    assert compile_cuda("source", "sm_90") == b"anew"


def test_what_the_compiler_refuses_is_one_line() -> None:
    source = Candidate(SMALL, StreamedConfig(), H200).source
    with pytest.raises(
        FlashtuneError, match=r"NVRTC cannot compile the kernel for sm_90: .*nowhere"
    ):
        compile_cuda(source.replace("warp_sum(sums", "nowhere(sums"), "sm_90")
    with pytest.raises(FlashtuneError, match="for sm_12"):
        compile_cuda(source, "sm_12")


@pytest.mark.usefixtures("without_nvrtc")
def test_without_the_compiler_it_is_neither_chosen_nor_raced() -> None:
    assert target_of(H200).why_missing(STAGED) is None
    assert "pip install 'flashtune[cuda]'" in (target_of(H200).why_missing(STREAMED) or "")
    with pytest.raises(FlashtuneError, match="run-time compiler"):
        compile_cuda("source", "sm_90")
    records = [record(StreamedConfig(), 10.0), record(StagedConfig(slack=0), 20.0)]
    choice = choose(QWEN, H200, TOOLS, [Source(name=USER, records=records)])
    assert choice.config == StagedConfig(slack=0)
    assert "pip install" in choice.skipped[0]
    raced = contenders(QWEN, H200, TOOLS, [])
    assert raced and not any(isinstance(each, StreamedConfig) for each in raced)


def test_with_the_compiler_it_is_chosen_and_raced() -> None:
    records = [record(StreamedConfig(), 10.0), record(StagedConfig(slack=0), 20.0)]
    choice = choose(QWEN, H200, TOOLS, [Source(name=USER, records=records)])
    assert (choice.config, choice.level) == (StreamedConfig(), Level.EXACT)
    many = choose(replace(QWEN, n_tokens=4), H200, TOOLS, [Source(name=USER, records=records)])
    assert many.config == StagedConfig(slack=0)
    assert slack_of(choice.config) == choice.config.slack > 0
    raced = contenders(QWEN, H200, TOOLS, [])
    assert raced[0] == default_config(QWEN, H200)
    assert raced[1] == StreamedConfig()


def test_a_config_from_a_table_is_checked() -> None:
    data = config_data(StreamedConfig())
    assert parse_config(data) == StreamedConfig()
    for wrong in ({"score_warps": 7}, {"early": 1}, {"prefetch_margin": -10.0}, {"slack": "16"}):
        with pytest.raises(FlashtuneError, match=f"knob {next(iter(wrong))} must be one of"):
            parse_config({**data, **wrong})
    with pytest.raises(FlashtuneError, match="prefetch_margin has no effect here"):
        parse_config({**data, "prefetch": False, "prefetch_margin": 5})


def test_source_from_elsewhere_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Candidate(SMALL, StreamedConfig(), H200).source
    monkeypatch.setattr("flashtune.kernels.plans.candidate.render", None)
    candidate, where = Candidate(SMALL, StreamedConfig(), H200), torch.device("cuda")
    assert callable(CudaBackend().loader(candidate, where, source))
    with pytest.raises(FlashtuneError, match="NVRTC cannot compile"):
        CudaBackend().loader(candidate, where, "int x = ;")


def record(config: Config, median_us: float) -> Record:
    return Record(
        device=H200.name,
        toolchain=TOOLS,
        problem=QWEN,
        config=config_data(config),
        provenance=Provenance.MEASURED,
        measurement=Measurement(
            outcome=Outcome.OK, median_us=median_us, spread_us=0.1, samples=10, policy="final"
        ),
        created="2026-11-24T00:00:00Z",
    )
