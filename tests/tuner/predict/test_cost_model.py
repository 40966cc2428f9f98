"""The cost model's properties: what must be slower is predicted slower. No number is held."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import Candidate, KernelUse, plans_of
from flashtune.kernels.plans.config import Config, config_data
from flashtune.kernels.plans.cpp_fused import CppFusedConfig
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.predict import cost_model
from flashtune.kernels.predict.cost_model import (
    Prediction,
    read_model_file,
    shipped_model,
)
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuning_db.device import Device, all_devices, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import family

QWEN = Problem(vocab_size=151936, hidden_size=2048, n_clusters=9496, n_probes=256)
CONFIGS = (StagedConfig(), StagedConfig(selection="in_gather"), PersistentConfig(gather_rows=8))
DEVICES = all_devices()


def uses(config: Config, problem: Problem, device: Device, **changes: int) -> list[KernelUse]:
    """What a config's kernels might need: as many programs as it has tiles."""
    if isinstance(config, PersistentConfig):
        rows = {"decode": (device.sm_count * config.programs_per_sm, config.warps)}
    elif isinstance(config, StreamedConfig):
        rows = {
            name: (device.sm_count, getattr(config, f"{name}_warps"))
            for name in ("score", "gather")
        }
    else:
        probes = isinstance(config, StagedConfig)
        clusters = problem.n_probes if probes else problem.n_clusters
        tiles = clusters * -(-problem.cluster_size // config.gather_rows)
        rows = {"gather": (tiles, config.gather_warps)}
        if not isinstance(config, DenseConfig):
            scored = -(-problem.n_clusters // config.score_rows)
            rows["score"] = (scored, config.score_warps)
        if isinstance(config, BatchedConfig) or getattr(config, "selection", "") == "threshold":
            rows["select"] = (problem.n_tokens, config.select_warps)
    plausible = {"registers": 40, "shared_bytes": 1024, "spilled": 0, **changes}
    return [
        KernelUse(kernel=name, programs=programs, warps=warps, **plausible)
        for name, (programs, warps) in rows.items()
    ]


def predict(
    config: Config, problem: Problem = QWEN, device: Device | None = None, **changes: int
) -> float:
    return interval(config, problem, device, **changes).time_us


def interval(
    config: Config, problem: Problem = QWEN, device: Device | None = None, **changes: int
) -> Prediction:
    device = device or find_device("h200")
    candidate = Candidate(problem, config, device)
    return cost_model.predict(candidate, uses(config, problem, device, **changes))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.plan)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
class TestOnEveryDevice:
    def test_more_bytes_are_slower(self, config: Config, device: Device) -> None:
        times = [
            predict(config, problem, device)
            for problem in (
                QWEN,
                replace(QWEN, hidden_size=4096),
                replace(QWEN, n_probes=1024),
                replace(QWEN, weight_dtype="fp32"),
                replace(QWEN, centroid_dtype="fp32"),
                replace(QWEN, n_tokens=4),
            )
        ]
        assert all(time > times[0] for time in times[1:])

    def test_more_bandwidth_is_faster(self, config: Config, device: Device) -> None:
        doubled = replace(device, memory_bandwidth=2 * device.memory_bandwidth)
        assert predict(config, QWEN, doubled) < predict(config, QWEN, device)

    def test_a_higher_clock_is_faster(self, config: Config, device: Device) -> None:
        doubled = replace(device, clock_hz=2 * device.clock_hz)
        assert predict(config, QWEN, doubled) < predict(config, QWEN, device)

    def test_spills_are_slower_and_the_more_the_worse(
        self, config: Config, device: Device
    ) -> None:
        none, some, many = (
            predict(config, QWEN, device, spilled=spilled) for spilled in (0, 64, 1024)
        )
        assert none < some < many

    def test_fewer_resident_programs_are_no_faster(self, config: Config, device: Device) -> None:
        # As many as fit is best only up to the tail of the last wave: compare one with many.
        crowded = predict(config, QWEN, device, shared_bytes=device.limits.shared_per_block)
        assert crowded >= predict(config, QWEN, device)

    def test_nothing_beats_its_bytes_or_is_far_from_them(
        self, config: Config, device: Device
    ) -> None:
        floor = floor_us(QWEN, device)
        assert floor is not None
        assert floor < predict(config, QWEN, device) < 50 * floor  # a slip of a unit is more


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_threshold_beats_a_library_at_many_clusters(device: Device) -> None:
    topk = StagedConfig(selection="torch_topk")
    assert predict(StagedConfig(), QWEN, device) < predict(topk, QWEN, device)


def test_overlapped_launches_are_faster() -> None:
    assert predict(StagedConfig(pdl=True)) < predict(StagedConfig())


@pytest.mark.parametrize("config", [StagedConfig(), BatchedConfig(), DenseConfig()])
def test_fewer_bytes_are_faster_and_deciding_again_costs_little(config: Config) -> None:
    orin = find_device("orin")
    slow = replace(orin, memory_bandwidth=orin.memory_bandwidth / 4)  # there bytes are all
    tokens = 1 if isinstance(config, StagedConfig) else 8
    times = []
    for changes in (
        {},
        {"weight_dtype": "int8", "centroid_dtype": "int8", "model_dtype": "bf16"},
        {
            "weight_dtype": "int8",
            "centroid_dtype": "int8",
            "model_dtype": "bf16",
            "n_rescored": 8,
        },
    ):
        candidate = Candidate(replace(QWEN, n_tokens=tokens, **changes), config, slow)
        times.append(cost_model.predict(candidate, candidate.launches).time_us)
    wide, narrow, decided = times
    assert narrow < decided < 0.8 * wide


def test_a_device_with_an_unknown_clock_has_a_prediction() -> None:
    device = replace(find_device("h200"), clock_hz=0.0)
    assert 0 < predict(StagedConfig(), QWEN, device) < math.inf


def test_predictions_are_finite_and_positive(random_config, random_problem) -> None:
    generator = random.Random(3)
    seen = dict.fromkeys(PLAN_STAGES, 0)
    for _ in range(10_000):
        config, device = random_config(generator), generator.choice(DEVICES)
        problem = random_problem(generator)
        if (
            config.plan not in PLAN_STAGES
            or Candidate(problem, config, device).why_invalid() is not None
        ):
            continue
        seen[config.plan] += 1
        changes = {
            "registers": generator.randint(16, 255),
            "shared_bytes": generator.randrange(device.limits.shared_per_block),
            "spilled": generator.choice((0, 0, 512)),
        }
        assert 0 < predict(config, problem, device, **changes) < math.inf
    assert min(seen.values()) > 5


def test_every_plan_of_a_gpu_is_covered() -> None:
    assert set(PLAN_STAGES) == set(plans_of(find_device("h200")))


INT8 = {"weight_dtype": "int8", "centroid_dtype": "int8", "model_dtype": "bf16"}
INT4 = {"weight_dtype": "int4", "centroid_dtype": "int4", "model_dtype": "bf16"}


def estimated(config: Config, problem: Problem, device: Device) -> Prediction:
    candidate = Candidate(problem, config, device)
    return cost_model.predict(candidate, candidate.launches)


def test_streamed_follows_bytes_and_deciding() -> None:
    h100 = find_device("h100")
    plain, narrow, decided = (
        estimated(StreamedConfig(), problem, h100).time_us
        for problem in (QWEN, replace(QWEN, **INT8), replace(QWEN, **INT8, n_rescored=8))
    )
    assert narrow < decided < plain


def test_narrow_numbers_wait_to_become_floats_where_the_memory_is_fast() -> None:
    # Without what it takes to widen them, they would cost their bytes alone.
    config, orin = StagedConfig(), find_device("orin")
    fast = replace(orin, memory_bandwidth=100 * orin.memory_bandwidth)
    slow = replace(orin, memory_bandwidth=orin.memory_bandwidth / 10)
    for narrow in (INT8, INT4):
        narrowed = replace(QWEN, **narrow)
        assert (
            estimated(config, narrowed, slow).time_us < 0.6 * estimated(config, QWEN, slow).time_us
        )
        assert estimated(config, narrowed, fast).time_us > estimated(config, QWEN, fast).time_us


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


@pytest.mark.parametrize("narrow", [INT8, INT4], ids=["int8", "int4"])
def test_digits_wait_less_where_memory_is_not_all(narrow: dict[str, str]) -> None:
    orin = find_device("orin")
    problem = replace(QWEN, **narrow)
    digits, cast = (
        estimated(each, problem, orin).time_us
        for each in (DIGITS, StagedConfig(score_rows=4, gather_rows=8))
    )
    assert digits < 0.8 * cast
    floor = floor_us(problem, orin)
    assert floor is not None
    assert floor < digits


def test_more_tokens_have_more_digits() -> None:
    one, eight = (
        estimated(
            DenseConfig(widen="digits", gather_block=64), replace(QWEN, **INT8, n_tokens=tokens),
            find_device("orin"),
        ).time_us
        for tokens in (1, 8)
    )  # fmt: skip
    assert one < eight < 2 * one


@pytest.mark.parametrize(
    ("arch", "less"),
    [("sm_89", False), ("sm_90", True)],
)
def test_tensor_cores_are_fed_by_bits_from_sm_90_on(arch: str, less: bool) -> None:
    old, new = (
        estimated(DenseConfig(), replace(QWEN, **INT8), replace(find_device("h100"), arch=each))
        for each in ("sm_86", arch)  # sm_80 has half of their lanes
    )
    assert (new.time_us < 0.9 * old.time_us) is less


def test_formats_that_were_not_measured_have_the_widest_interval() -> None:
    model, config = shipped_model(), StagedConfig()
    own = model.intervals[family(config_data(config))]
    assert "int8" in model.formats and "int4" not in model.formats
    for narrow, (low, high) in ((INT8, own), (INT4, model.widest())):
        for problem in (replace(QWEN, **narrow), replace(QWEN, **{**narrow, "n_rescored": 8})):
            found = estimated(config, problem, find_device("orin"))
            assert found.low_us == pytest.approx(low * found.time_us)
            assert found.high_us == pytest.approx(high * found.time_us)


def test_cpus_have_no_prediction() -> None:
    with pytest.raises(FlashtuneError, match="search on the machine itself"):
        cost_model.predict(Candidate(QWEN, CppFusedConfig(), find_device("h200")), ())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.plan)
def test_the_interval_is_around_the_time_and_the_familys_own(config: Config) -> None:
    found = interval(config)
    assert found.low_us < found.time_us < found.high_us
    low, high = shipped_model().intervals[family(config_data(config))]
    assert found.low_us == pytest.approx(low * found.time_us)
    assert found.high_us == pytest.approx(high * found.time_us)


def test_a_family_that_was_not_measured_has_the_widest_interval() -> None:
    model = shipped_model()
    rest = {name: each for name, each in model.intervals.items() if name != "persistent"}
    blind = replace(model, intervals=rest)
    config, device = PersistentConfig(), find_device("h200")
    found = blind.predict(Candidate(QWEN, config, device), uses(config, QWEN, device))
    assert found.low_us / found.time_us == pytest.approx(min(low for low, _ in rest.values()))
    assert found.high_us / found.time_us == pytest.approx(max(high for _, high in rest.values()))


def test_a_small_device_waits_longer_for_the_same_programs() -> None:
    # Eight multiprocessors take many waves, of which an H200 takes few.
    h200 = find_device("h200")
    small = replace(h200, sm_count=8)
    slow = StagedConfig(score_rows=1, score_block=64, score_warps=1)
    assert predict(slow, QWEN, small) > 2 * predict(slow, QWEN, h200)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "roofline-1"}'])
def test_a_file_that_is_no_model_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(FlashtuneError, match="flashtune model fit") as raised:
        read_model_file(path)
    assert "\n" not in str(raised.value)
