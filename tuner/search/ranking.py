"""The most promising configs of a space by the cost model, with nothing compiled.

Usage:
    promising(space, shipped_model(), most=16, seed=0)      # configs, unlike one another

What kernels will need is estimated, so this says what is worth compiling, no more.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from flashtune.kernels.backends.backend import KernelUse
from flashtune.kernels.plans.config import (
    PLANS,
    Config,
    config_data,
    default_config,
    known_good,
    parse_config,
)
from flashtune.kernels.plans.knob import enabled, knobs
from flashtune.kernels.plans.tensor_config import BatchedConfig, DenseConfig, padded_tokens
from flashtune.kernels.plans.triton_config import PersistentConfig, StagedConfig, TritonConfig
from flashtune.kernels.plans.triton_grid import launch_programs
from flashtune.tuner.predict.cost_model import VERSION, CostModel
from flashtune.tuner.predict.stages import PLAN_STAGES
from flashtune.tuner.search.proposal import FAR
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.shortlist import shortlist

DRAWS = 1000  # random configs to begin with
ROUNDS = 3  # of looking at the neighbours of the best
BEST = 6  # of each family, whose neighbours are looked at
KEPT = 30  # of each family, to make the shortlist from
_MOST_REGISTERS = 255
_BASE_REGISTERS = 24  # of a thread, for addresses and loops


def promising(
    space: Space, model: CostModel, *, most: int, seed: int, near: Iterable[Config] = ()
) -> list[Config]:
    """Up to `most` valid configs that the model expects to be fast, by the shortlist's rule.

    Families whose best is far behind the best of all, as searches have it, are left out.
    near: configs that may be good here; those that are not in the space are passed over.
    """
    problem, device = space.problem, space.device
    generator = random.Random(seed)
    unknown = {name for name in space.plans if PLANS[name] not in PLAN_STAGES}
    space = replace(space, without=space.without | unknown)
    plans = [PLANS[name] for name in space.plans]
    drawn = [_draw(plans, generator) for _ in range(DRAWS)]
    known = [default_config(problem, device), *known_good(problem, device), *near]
    times: dict[Config, float] = {}
    fresh = [config for config in [*known, *drawn] if space.holds(config_data(config))]
    for _ in range(ROUNDS):
        for config in fresh:
            if config not in times:
                times[config] = _expected_us(problem, config, device, model)
        best = _best(space, times, BEST)
        fresh = [each for config in best for each in space.neighbours(config)]
    far_us = FAR * min(times.values())
    near_best = {space.family(config) for config in times if times[config] <= far_us}
    records = [
        _record(problem, device, config, times[config])
        for config in _best(space, times, KEPT)
        if times[config] < math.inf and space.family(config) in near_best
    ]
    return [parse_config(record.config) for record in shortlist(records, most)]


def _expected_us(problem: Problem, config: Config, device: Device, model: CostModel) -> float:
    """The predicted time with estimated needs; infinite where registers would spill."""
    assert isinstance(config, TritonConfig)
    uses = expected_uses(problem, config, device)
    if any(use.registers > _MOST_REGISTERS for use in uses):
        return math.inf
    return model.predict(problem, config, device, uses).time_us


def _best(space: Space, times: dict[Config, float], count: int) -> list[Config]:
    """The fastest of each family."""
    families: dict[tuple[str, str | None], list[Config]] = {}
    for config in sorted(times, key=lambda config: times[config]):
        families.setdefault(space.family(config), []).append(config)
    return [config for own in families.values() for config in own[:count]]


def _draw(plans: Sequence[type[Config]], generator: random.Random) -> Config:
    """A random config of any of the plans, valid or not."""
    plan = generator.choice(plans)
    values: dict[str, Any] = {}
    for name, known in knobs(plan).items():
        free = enabled(plan, name, values)
        values[name] = generator.choice(known["choices"]) if free else known["default"]
    return plan(**values)


def _record(problem: Problem, device: Device, config: Config, time_us: float) -> Record:
    return Record(
        device=device.name,
        toolchain=Toolchain(),
        problem=problem,
        config=config_data(config),
        provenance=Provenance.PREDICTED,
        measurement=Measurement(outcome=Outcome.OK, median_us=time_us, policy=VERSION),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def expected_uses(problem: Problem, config: TritonConfig, device: Device) -> list[KernelUse]:
    """The kernels that a config launches: their programs, and an estimate of what they need."""
    if isinstance(config, PersistentConfig):
        both = [
            _expected(problem, config, stage, config.warps, 0) for stage in ("score", "gather")
        ]
        return [
            KernelUse(
                kernel="decode",
                programs=launch_programs(problem, config, device)["decode"],
                warps=config.warps,
                registers=max(use.registers for use in both),
                shared_bytes=max(use.shared_bytes for use in both),
                spilled=0,
            )
        ]
    uses = []
    for kernel, number in launch_programs(problem, config, device).items():
        warps = getattr(config, f"{kernel}_warps")
        if kernel == "select":
            uses.append(
                KernelUse(
                    kernel=kernel,
                    programs=number,
                    warps=warps,
                    registers=_BASE_REGISTERS + problem.n_clusters // (32 * warps),
                    shared_bytes=0,
                    spilled=0,
                )
            )
        else:
            uses.append(_expected(problem, config, kernel, warps, number))
    return uses


def _expected(
    problem: Problem, config: TritonConfig, stage: str, warps: int, programs: int
) -> KernelUse:
    """A pass's kernel: about two registers for each element of a thread's tile, and its scores."""
    rows, block, stages = (
        getattr(config, f"{stage}_{name}") for name in ("rows", "block", "stages")
    )
    if isinstance(config, BatchedConfig | DenseConfig):
        tokens = padded_tokens(problem)
        elements = rows * tokens + (0 if stages > 1 else rows * block)
        staged = (rows + tokens) * block * 2
    else:
        elements = (1 + (problem.n_tokens if stage == "score" else 1)) * rows * block
        staged = rows * block * 2
    registers = _BASE_REGISTERS + elements // (32 * warps)
    searches = isinstance(config, PersistentConfig) or (
        isinstance(config, StagedConfig) and config.selection == "in_gather"
    )
    if stage == "gather" and searches:
        registers = max(registers, _BASE_REGISTERS + 2 * problem.n_clusters // (32 * warps))
    return KernelUse(
        kernel=stage,
        programs=programs,
        warps=warps,
        registers=registers,
        shared_bytes=stages * staged if stages > 1 else 0,
        spilled=0,
    )
