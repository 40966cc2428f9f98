"""Configs: what parses, what is valid, and why the rest is not."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flashtune.kernels.backends.target import baseline_config, default_config
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config, config_data, enabled, knobs, parse_config
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.tuning_db.device import Device, all_devices, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import PRESETS, Problem, parse_shape

ORIN, H200, L4 = (find_device(name) for name in ("orin", "h200", "l4"))
QWEN = parse_shape("qwen3-vl-2b")
IN_GATHER = StagedConfig(selection="in_gather", gather_warps=8)

RandomConfig = Callable[[random.Random], Config]


@pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
@pytest.mark.parametrize("make", [default_config, baseline_config])
def test_defaults_are_valid_for_every_preset(
    make: Callable[[Problem, Device], Config], device: Device
) -> None:
    for preset in PRESETS:
        for probes in (256, 512):
            for tokens in (1, 2, 3, 4, 8, 16, 20, 32):
                problem = parse_shape(f"{preset},probes={probes},tokens={tokens}")
                config = make(problem, device)
                assert Candidate(problem, config, device).why_invalid() is None
                assert parse_config(config_data(config)) == config


@pytest.mark.parametrize("hidden", [1, 33, 64, 96, 100, 1152, 65536])
@pytest.mark.parametrize("make", [default_config, baseline_config])
def test_defaults_are_valid_for_odd_problems(
    make: Callable[[Problem, Device], Config], hidden: int
) -> None:
    for clusters, size in ((1, 1), (1, 40), (7, 3), (97, 12), (9496, 16)):
        problem = Problem(
            vocab_size=clusters * size, hidden_size=hidden, n_clusters=clusters, n_probes=1
        )
        assert Candidate(problem, make(problem, ORIN), ORIN).why_invalid() is None


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int4", "int8"), ("int4", "bf16")])
@pytest.mark.parametrize("make", [default_config, baseline_config])
def test_defaults_are_valid_for_quantised_heads(
    make: Callable[[Problem, Device], Config], formats: tuple[str, str]
) -> None:
    weight, centroids = formats
    for shape in ("qwen3-0.6b", "gemma-3-1b", "vocab=132,hidden=33,clusters=11"):
        for probes in (1, 11, 8016):
            problem = parse_shape(f"{shape},probes=1,weight={weight},centroids={centroids}")
            problem = replace(
                problem,
                n_probes=min(probes, problem.n_clusters),
                n_rescored=32,
                n_pinned=probes % 3,
                epilogue="logits",
            )
            for tokens in (1, 2, 8, 32):
                each = replace(problem, n_tokens=tokens)
                for device in (ORIN, H200):
                    assert Candidate(each, make(each, device), device).why_invalid() is None
    assert default_config(replace(problem, n_tokens=8), H200).plan == "staged"  # hidden 33
    many = parse_shape("qwen3-0.6b,tokens=8,weight=int8,rescored=8")
    listed = BatchedConfig(visit="listed", gather_rows=32, gather_warps=2, widen="bits")
    assert default_config(many, H200) == listed
    fours = replace(many, weight_dtype="int4", centroid_dtype="int4")
    assert default_config(fours, H200) == replace(listed, widen="cast")


def test_int8_is_widened_by_bits_only_where_there_is_some() -> None:
    by_bits = BatchedConfig(widen="bits")
    quantised = parse_shape("qwen3-0.6b,tokens=8,weight=int8,rescored=8")
    assert Candidate(quantised, by_bits, H200).why_invalid() is None
    reason = Candidate(replace(QWEN, n_tokens=8), by_bits, H200).why_invalid()
    assert reason == "widen needs rows in int8"


INT8 = {"weight_dtype": "int8", "centroid_dtype": "int8", "model_dtype": "bf16"}
INT4 = {"weight_dtype": "int4", "centroid_dtype": "int4", "model_dtype": "bf16"}
DIGITS = StagedConfig(
    widen="digits",
    score_rows=64,
    score_block=256,
    score_stages=3,
    gather_rows=32,
    gather_block=256,
    gather_warps=2,
    gather_stages=3,
)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DIGITS, {}, "digits need rows in int8 or int4"),
        (DIGITS, {**INT8, "hidden_size": 2**17 + 64}, "of a digit may overflow 32 bits"),
        (replace(DIGITS, score_rows=32), INT8, "less than 16 rows for each of 4 warps"),
        (replace(DIGITS, gather_rows=16), INT8, "less than 16 rows for each of 2 warps"),
        (replace(DIGITS, score_block=4096), INT8, "wider than the hidden size 2048"),
        (
            DenseConfig(widen="digits", gather_block=32),
            INT8,
            "digits multiply 64 numbers of int8 at a time",
        ),
        (
            replace(DIGITS, score_warps=1),
            {**INT8, "n_tokens": 16},
            "sums of the score tile do not fit the registers of 1 warps",
        ),
        (
            replace(DIGITS, gather_block=2048, gather_stages=1),
            INT4,
            "sums of the gather tile do not fit the registers of 2 warps",
        ),
        (
            replace(DIGITS, score_block=1024, score_stages=1),
            INT8,
            "the score tile 64x1024 does not fit the registers of 4 warps",
        ),
        (replace(DIGITS, score_block=2048), INT8, "score_stages needs a loop"),
        (
            replace(DIGITS, gather_block=128, gather_stages=1, gather_unroll=2),
            INT8,
            "gather_unroll needs rows that are widened",
        ),
        (
            replace(DIGITS, score_block=1024, score_stages=4),
            INT8,
            "the score stages do not fit in shared memory",
        ),
        (
            replace(DIGITS, selection="in_gather"),
            INT8,
            "in_gather searches with all of its warps, but digits need a list",
        ),
        (StagedConfig(score_rows=32, score_block=64), INT8, "more than 16 rows are for digits"),
        (StagedConfig(gather_rows=64, gather_block=64), {}, "more than 32 rows are for digits"),
    ],
)
def test_a_rule_says_what_digits_cannot_multiply(
    config: Config, changes: dict[str, Any], message: str
) -> None:
    candidate = Candidate(replace(QWEN, **changes), config, ORIN)
    assert message in (candidate.why_invalid() or "valid")


def test_digits_multiply_what_is_quantised_and_leave_the_rest() -> None:
    """Rows in 16 bits keep their tiles beside centroids whose tiles are for tensor cores."""
    for changes in (INT8, INT4, {**INT8, "centroid_dtype": "int4"}):
        for rescored in (0, 8):
            problem = replace(QWEN, **changes, n_rescored=rescored)
            assert Candidate(problem, DIGITS, ORIN).why_invalid() is None
    mixed = replace(QWEN, centroid_dtype="int8")
    beside = replace(DIGITS, gather_rows=4, gather_block=1024, gather_warps=4, gather_stages=1)
    candidate = Candidate(mixed, beside, ORIN)
    assert candidate.why_invalid() is None
    assert candidate.source.count("tl.dot(") == 1
    assert [use.kernel for use in candidate.launches] == ["digits", "score", "select", "gather"]


def test_a_list_has_tiles_for_the_clusters_that_can_be_on_it() -> None:
    problem = replace(QWEN, n_tokens=8)  # 9,496 clusters of 16
    listed = BatchedConfig(visit="listed", gather_rows=32, slack=16)
    gather = {use.kernel: use for use in Candidate(problem, listed, H200).launches}["gather"]
    assert gather.programs == 8 * (256 + 16) * 16 // 32
    many = Candidate(replace(problem, n_tokens=64), listed, H200)
    assert {use.kernel: use.programs for use in many.launches}["gather"] == 9496 * 16 // 32
    odd = Problem(vocab_size=132, hidden_size=33, n_clusters=11, n_probes=2, n_tokens=3)
    narrow = replace(listed, score_block=32, gather_block=32, gather_rows=16, slack=0)
    assert Candidate(odd, narrow, ORIN).why_invalid() is None  # tiles need not hold whole clusters


def test_the_default_for_many_tokens_reads_a_cluster_once() -> None:
    assert isinstance(default_config(replace(QWEN, n_tokens=7), ORIN), StagedConfig)
    assert default_config(replace(QWEN, n_tokens=8), ORIN) == BatchedConfig()
    mixed = replace(QWEN, n_tokens=8, centroid_dtype="fp16")  # tensor cores take one dtype
    assert isinstance(default_config(mixed, ORIN), StagedConfig)


def test_the_baseline_uses_the_library_and_a_program_a_cluster() -> None:
    config = baseline_config(QWEN, ORIN)
    assert isinstance(config, StagedConfig)
    assert (config.selection, config.gather_rows) == ("torch_topk", QWEN.cluster_size)


def test_a_problem_without_a_default_says_so() -> None:
    problem = Problem(vocab_size=2**20, hidden_size=64, n_clusters=2**20, n_probes=1)
    with pytest.raises(FlashtuneError, match="no default kernel for 1048576x64"):
        default_config(problem, ORIN)


def test_configs_survive_json(random_config: RandomConfig) -> None:
    rng = random.Random(0)
    drawn = [random_config(rng) for _ in range(300)]
    assert {config.plan for config in drawn} == set(PLANS)
    for config in drawn:
        assert parse_config(json.loads(json.dumps(config_data(config)))) == config


def _staged(**changes: Any) -> dict[str, Any]:
    return {**config_data(StagedConfig()), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a config's plan must be one of staged, persistent"),
        ([], "a config's plan"),
        ({}, "a config's plan"),
        ({"plan": "fused"}, "a config's plan"),
        ({"plan": ["staged"]}, "a config's plan"),
        ({"plan": "staged"}, "must have exactly its knobs"),
        (_staged(colour="red"), "check colour"),
        (_staged(plan="persistent"), "a persistent config must have exactly its knobs"),
        (_staged(score_rows=True), "score_rows must be one of .* not True"),
        (_staged(score_rows=1.0), "score_rows must be one of .* not 1.0"),
        (_staged(score_rows="1"), "score_rows must be one of"),
        (_staged(score_rows=3), "score_rows must be one of .* not 3"),
        (_staged(score_rows=None), "score_rows must be one of"),
        (_staged(score_rows=[1]), "score_rows must be one of"),
        (_staged(score_rows=float("nan")), "score_rows must be one of"),
        (_staged(pdl=1), "pdl must be one of"),
        (_staged(selection="torch_topk", slack=0), "slack has no effect here: keep its default"),
        (_staged(prefetch_margin=5), "prefetch_margin has no effect here"),
        (_staged(selection="in_gather", select_warps=8), "select_warps has no effect here"),
        (_staged(evict='evict_first"); import os #'), "evict must be one of"),
        (_staged(evict="{{ 7 * 7 }}"), "evict must be one of"),
        (_staged(selection="threshold\n"), "selection must be one of"),
    ],
)
def test_what_is_not_a_config_is_refused(data: Any, message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        parse_config(data)


@pytest.mark.parametrize("plan", [plan.config for plan in PLANS.values()])
def test_knobs_have_distinct_choices_with_the_default_among_them(plan: type[Config]) -> None:
    before: set[str] = set()
    for name, known in knobs(plan).items():
        choices = known["choices"]
        assert known["default"] in choices
        assert len(set(choices)) == len(choices)
        assert len({type(choice) for choice in choices}) == 1
        assert set(known["when"]) <= before  # `enabled` reads the knobs before
        before.add(name)


def test_a_knob_is_enabled_by_the_knobs_it_names() -> None:
    assert enabled(StagedConfig, "slack", {"selection": "in_gather"})
    assert not enabled(StagedConfig, "slack", {"selection": "torch_topk"})
    assert enabled(StagedConfig, "score_rows", {})


@pytest.mark.parametrize(
    ("config", "changes", "device", "message"),
    [
        (StagedConfig(), {"hidden_size": 512}, ORIN, "score_block 1024 is wider than the hidden"),
        (
            StagedConfig(score_block=512),
            {"hidden_size": 512},
            ORIN,
            "gather_block 1024 is wider than the hidden",
        ),
        (
            StagedConfig(score_rows=16, score_block=2048),
            {},
            H200,
            "score tile 16x2048 does not fit the registers of 4 warps",
        ),
        (StagedConfig(), {"n_tokens": 16}, H200, "score tile 2x1024 does not fit the registers"),
        (
            StagedConfig(gather_rows=32),
            {},
            H200,
            "gather tile 32x1024 does not fit the registers of 4 warps",
        ),
        (PersistentConfig(warps=4, gather_block=2048), {}, H200, "gather tile 16x2048"),
        (StagedConfig(score_rows=1, score_block=64), {}, H200, "less than one element per thread"),
        (
            StagedConfig(gather_rows=1, gather_block=64, gather_warps=32),
            {},
            H200,
            "gather tile 1x64 has less than one element",
        ),
        (
            StagedConfig(score_block=2048, score_stages=2),
            {},
            H200,
            "score_stages and score_unroll need a loop",
        ),
        (
            StagedConfig(gather_block=2048, gather_unroll=2),
            {},
            H200,
            "gather_stages and gather_unroll need a loop",
        ),
        (StagedConfig(score_stages=2, score_unroll=2), {}, H200, "exclude each other"),
        (
            StagedConfig(gather_rows=16, gather_block=1024, gather_warps=16, gather_stages=4),
            {},
            L4,
            "the gather stages do not fit in shared memory",
        ),
        (StagedConfig(pdl=True), {}, ORIN, "programmatic dependent launch needs sm_90"),
        (PersistentConfig(pdl=True), {}, L4, "programmatic dependent launch needs sm_90"),
        (
            StagedConfig(select_warps=4),
            {"n_clusters": 151936},
            H200,
            "151936 scores do not fit the registers of 4 warps",
        ),
        (
            replace(IN_GATHER, gather_warps=1),
            {},
            H200,
            "9496 scores do not fit the registers of 1 warps",
        ),
        (
            replace(IN_GATHER, prefetch_margin=5),
            {},
            ORIN,
            "prefetch of whole clusters needs sm_90",
        ),
        (PersistentConfig(prefetch_margin=0), {}, ORIN, "prefetch of whole clusters needs sm_90"),
        (
            replace(IN_GATHER, prefetch_margin=5),
            {"vocab_size": 9496, "hidden_size": 1025},
            H200,
            "multiple of 16 bytes, not 2050",
        ),
        (
            replace(IN_GATHER, prefetch_margin=5),
            {"in_place": True},
            H200,
            "prefetch needs clusters whose rows are adjacent, not rows in place",
        ),
        (
            PersistentConfig(score_rows=1),
            {"n_tokens": 9},
            ORIN,
            "9 tokens are more than the 8 programs",
        ),
        (
            PersistentConfig(programs_per_sm=4, warps=16),
            {},
            ORIN,
            "would not be resident at once: too many threads",
        ),
    ],
)
def test_each_rule_gives_its_reason(
    config: Config, changes: dict[str, int], device: Device, message: str
) -> None:
    problem = replace(QWEN, **changes)
    assert message in (Candidate(problem, config, device).why_invalid() or "valid")


def test_a_hint_is_no_reason_where_it_is_allowed() -> None:
    allowed = [
        StagedConfig(pdl=True),
        replace(IN_GATHER, prefetch_margin=5),
        PersistentConfig(prefetch_margin=0, pdl=True),
        StagedConfig(score_stages=4),
        StagedConfig(gather_unroll=2),
    ]
    assert [Candidate(QWEN, config, H200).why_invalid() for config in allowed] == [None] * len(
        allowed
    )
