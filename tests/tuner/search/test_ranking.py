"""The ranking without compilers: its programs are the rendered ones, its choice is varied."""

import random

import pytest

from flashtune.kernels.backends.triton.backend import load_source
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.tuner.search.ranking import promising
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Device, find_device
from flashtune.tuning_db.problem import Problem, parse_shape

QWEN = parse_shape("qwen3-vl-2b")


def test_the_programs_are_those_of_the_rendered_kernels(random_config, random_problem) -> None:
    generator = random.Random(7)
    devices = [find_device(name) for name in ("orin", "h200")]
    checked = {"staged": 0, "persistent": 0, "batched": 0, "dense": 0}
    while min(checked.values()) < 5:
        config, problem = random_config(generator), random_problem(generator)
        device = generator.choice(devices)
        if (
            config.plan not in checked  # a plan in CUDA C++ renders no launches
            or Candidate(problem, config, device).why_invalid() is not None
        ):
            continue
        launches = load_source(Candidate(problem, config, device).source).LAUNCHES
        rendered = {
            (each["kernel"], each["programs"], each["num_warps"])
            for each in launches
            if "programs" in each
        }
        expected = Candidate(problem, config, device).launches
        assert {(use.kernel, use.programs, use.warps) for use in expected} == rendered
        checked[config.plan] += 1


@pytest.mark.parametrize("name", ["orin", "h200"])
def test_promising_configs_are_valid_and_of_the_families_that_may_win(name: str) -> None:
    device = find_device(name)
    space = Space(QWEN, device)
    found = promising(space, shipped_model(), most=8, seed=0)
    assert len(set(found)) == 8
    assert all(Candidate(QWEN, config, device).why_invalid() is None for config in found)
    assert {space.family(config) for config in found} >= {
        "staged/threshold",
        "staged/in_gather",
        "persistent",
    }
    assert all(config.plan != "dense" for config in found)  # all of the weight for one token


def test_what_is_known_to_be_good_elsewhere_is_taken_up() -> None:
    device, winner = find_device("h200"), StagedConfig(select_warps=8, pdl=True)
    tiny = Space(QWEN, device, {"plan": "staged", "selection": "threshold", "score_rows": 2})

    def best(near: list[StagedConfig]) -> float:
        found = promising(tiny, shipped_model(), most=1, seed=0, near=near)[0]
        return time_us(QWEN, found, device)

    assert best([winner]) <= time_us(QWEN, winner, device)


def time_us(problem: Problem, config: StagedConfig | PersistentConfig, device: Device) -> float:
    candidate = Candidate(problem, config, device)
    return shipped_model().predict(candidate, candidate.launches).time_us
