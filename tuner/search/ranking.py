"""The most promising configs of a space by the cost model, without compiling anything.

Usage:
    promising(space, shipped_model(), most=16, seed=0)      # configs, unlike one another

The resources of kernels are estimated, so this only says what is worth compiling.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timezone

from flashtune.kernels.backends.target import default_config, known_good
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.kernels.predict.cost_model import VERSION, CostModel
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuner.search.proposal import FAR
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.shortlist import shortlist

DRAWS = 1000  # random configs to begin with
ROUNDS = 3  # rounds of looking at the best configs' neighbours
BEST = 6  # configs of each family whose neighbours are looked at
KEPT = 30  # configs of each family from which the shortlist is made
_MOST_REGISTERS = 255


def promising(
    space: Space, model: CostModel, *, most: int, seed: int, near: Iterable[Config] = ()
) -> list[Config]:
    """Up to `most` valid configs that the model expects to be fast, by the shortlist's rule.

    Since needs are estimated, every family has a place whose best is not far behind the best of
    all by the rule of searches. near:
    configs that may be good here; those outside the space are ignored.
    """
    problem, device = space.problem, space.device
    generator = random.Random(seed)
    unknown = {name for name in space.plans if name not in PLAN_STAGES}
    space = replace(space, without=space.without | unknown)
    drawn = [space.drawn(generator) for _ in range(DRAWS)]
    known = [default_config(problem, device), *known_good(problem, device), *near]
    times: dict[Config, float] = {}
    fresh = [config for config in [*known, *drawn] if space.holds(config_data(config))]
    for _ in range(ROUNDS):
        for config in fresh:
            if config not in times:
                times[config] = _expected_us(Candidate(problem, config, device), model)
        best = _best(space, times, BEST)
        fresh = [each for config in best for each in space.neighbours(config)]
    far_us = FAR * min(times.values())
    near_best = {space.family(config) for config in times if times[config] <= far_us}
    records = [
        _record(Candidate(problem, config, device), times[config])
        for config in _best(space, times, KEPT)
        if times[config] < math.inf and space.family(config) in near_best
    ]
    return [parse_config(record.config) for record in shortlist(records, most, near=FAR)]


def _expected_us(candidate: Candidate, model: CostModel) -> float:
    """The predicted time with estimated resources; infinite if registers would spill."""
    uses = candidate.launches
    if any(use.registers > _MOST_REGISTERS for use in uses):
        return math.inf
    return model.predict(candidate, uses).time_us


def _best(space: Space, times: dict[Config, float], count: int) -> list[Config]:
    """The fastest of each family."""
    families: dict[str, list[Config]] = {}
    for config in sorted(times, key=lambda config: times[config]):
        families.setdefault(space.family(config), []).append(config)
    return [config for own in families.values() for config in own[:count]]


def _record(candidate: Candidate, time_us: float) -> Record:
    return Record(
        device=candidate.device.name,
        toolchain=Toolchain(),
        problem=candidate.problem,
        config=config_data(candidate.config),
        provenance=Provenance.PREDICTED,
        measurement=Measurement(outcome=Outcome.OK, median_us=time_us, policy=VERSION),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
