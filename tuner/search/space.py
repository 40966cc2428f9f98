"""The configs that a search chooses from: conditional on the plan, narrowed by fixed knobs.

Usage:
    space = Space(problem, device, fixed={"plan": "staged"})
    config, reason = space.suggest(trial)     # reason is None if the config is valid
    for config in space.configs(): …          # every valid config

A knob is called `plan.knob` in Optuna, because its choices may not change between trials. A knob
that does not matter given the values before it is not suggested.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import optuna

from flashtune.kernels.backends.target import known_good
from flashtune.kernels.plans.candidate import PLANS, Candidate, Rule, plans_of, why_broken
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.kernels.plans.knob import enabled, knobs
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import ConfigData, family

Choices = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Space:
    """Every valid config for a problem and device, with some knobs fixed to one value.

    `known_good`: configs from which searches begin; None: those known for the device. `without`:
    plans to leave out.

    Raises FlashtuneError if `fixed` names an unknown knob or value.
    """

    problem: Problem
    device: Device
    fixed: Mapping[str, Any] = field(default_factory=dict)
    known_good: Sequence[Config] | None = None
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Check the fixed knobs."""
        for name, value in self.fixed.items():
            choices = list(plans_of(self.device)) if name == "plan" else _all_choices(name)
            if not choices:
                raise FlashtuneError(f"unknown knob {name!r}: use plan, {_known_knobs()}")
            if value not in choices:
                raise FlashtuneError(f"knob {name} must be one of {choices}, not {value!r}")

    @property
    def plans(self) -> list[str]:
        """The plans to choose from: those that have every fixed value among their choices.

        Excludes the plans in `without`.
        """
        return [
            name
            for name, plan in plans_of(self.device).items()
            if name not in self.without
            and all(
                value == name if each == "plan" else value in _choices_of(plan.config, each)
                for each, value in self.fixed.items()
            )
        ]

    def suggest(self, trial: optuna.Trial) -> tuple[Config, str | None]:
        """The config that a trial asks for, and why it is invalid, or None."""
        config = self._built(trial.suggest_categorical)
        return config, self._why_invalid(config)

    def parameters(self, config: Config) -> dict[str, Any] | None:
        """The trial parameters for which `suggest` returns this config.

        None if the config is not in the space.
        """
        if config.plan not in self.plans:
            return None
        plan, data = type(config), config_data(config)
        parameters: dict[str, Any] = {"plan": config.plan}
        for name, choices in self._knobs(plan).items():
            if enabled(plan, name, data):
                if data[name] not in choices:
                    return None
                parameters[f"{plan.plan}.{name}"] = data[name]
        return parameters

    def holds(self, data: ConfigData) -> bool:
        """Whether a recorded config is a valid config of this space."""
        try:
            config = parse_config(data)
        except FlashtuneError:
            return False
        return self._why_invalid(config) is None and self.parameters(config) is not None

    def distributions(self, config: Config) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distributions of `parameters(config)`."""
        plan, data = type(config), config_data(config)
        found: dict[str, optuna.distributions.BaseDistribution] = {
            "plan": _categorical(*self.plans)
        }
        for name, choices in self._knobs(plan).items():
            if enabled(plan, name, data):
                found[f"{plan.plan}.{name}"] = _categorical(*choices)
        return found

    def configs(self) -> Iterator[Config]:
        """Every valid config, in the order of the knobs' choices.

        Rules are checked as soon as their knobs are set, and a family that a rule excludes
        entirely is skipped: there are too many configs to try each.
        """
        for plan in self.plans:
            yield from self._complete(PLANS[plan].config, {})

    def neighbours(self, config: Config) -> list[Config]:
        """The valid configs that differ in one knob, and in those that it switches on or off."""
        plan = type(config)
        found = []
        for name, choices in self._knobs(plan).items():
            for choice in choices:
                near = self._changed(config, name, choice)
                if near != config and self._why_invalid(near) is None:
                    found.append(near)
        return list(dict.fromkeys(found))

    def neighbour(self, config: Config, generator: random.Random) -> Config | None:
        """A random one of `neighbours`; None if there are none."""
        plan = type(config)
        steps = [(name, choice) for name, each in self._knobs(plan).items() for choice in each]
        generator.shuffle(steps)
        changed = (self._changed(config, *step) for step in steps)
        valid = (near for near in changed if near != config and self._why_invalid(near) is None)
        return next(valid, None)

    def drawn(
        self, generator: random.Random, given: Mapping[str, Any] = MappingProxyType({})
    ) -> Config:
        """A random config of any of the plans, valid or not, with the given parameters."""
        return self._built(
            lambda name, choices: given[name] if name in given else generator.choice(choices)
        )

    def is_valid(self, config: Config) -> bool:
        """Whether a config of one of the plans keeps their rules."""
        return self._why_invalid(config) is None

    def family(self, config: Config) -> str:
        """The family that a config belongs to: its plan, and how it selects clusters."""
        return family(config_data(config))

    def starts(self) -> list[Config]:
        """The known good starting points that are valid here, with the fixed knobs applied."""
        known = self.known_good
        if known is None:
            known = known_good(self.problem, self.device)
        found = (self._within(config) for config in known if config.plan in self.plans)
        return list(dict.fromkeys(each for each in found if self._why_invalid(each) is None))

    def _built(self, chosen: Callable[[str, Choices], Any]) -> Config:
        """The config of the parameters that `chosen` picks from their choices, by name."""
        plan = PLANS[chosen("plan", self.plans)].config
        values: dict[str, Any] = {}
        for name, choices in self._knobs(plan).items():
            if enabled(plan, name, values):
                values[name] = chosen(f"{plan.plan}.{name}", choices)
            else:
                values[name] = knobs(plan)[name]["default"]
        return plan(**values)

    def _why_invalid(self, config: Config) -> str | None:
        return Candidate(self.problem, config, self.device).why_invalid()

    def _knobs(self, plan: type[Config]) -> dict[str, Choices]:
        """The choices of each knob that remain once the fixed knobs are applied."""
        return {
            name: (self.fixed[name],) if name in self.fixed else knob["choices"]
            for name, knob in knobs(plan).items()
        }

    def _changed(self, config: Config, name: str, value: Any) -> Config:
        """The config with one knob changed and the fixed knobs applied."""
        plan = type(config)
        data = {**config_data(config), name: value}
        del data["plan"]
        for each, knob in knobs(plan).items():
            if not enabled(plan, each, data):
                data[each] = knob["default"]
            elif each in self.fixed:
                data[each] = self.fixed[each]
        return plan(**data)

    def _within(self, config: Config) -> Config:
        """The config with the fixed knobs applied."""
        first = next(iter(knobs(type(config))))
        return self._changed(config, first, getattr(config, first))

    def _complete(self, plan: type[Config], values: dict[str, Any]) -> Iterator[Config]:
        """Every valid config of a plan whose first knobs have these values."""
        names = list(knobs(plan))
        if len(values) == len(names):
            yield plan(**values)
            return
        if len(values) == 1 and not self._may_hold(plan, values):
            return
        name, later = names[len(values)], set(names[len(values) + 1 :])
        rules = [
            rule for rule in self._rules(plan) if name in rule.knobs and not rule.knobs & later
        ]
        for choice in self._choices(plan, name, values):
            chosen = {**values, name: choice}
            if self._keeps(plan, chosen, rules):
                yield from self._complete(plan, chosen)

    def _may_hold(self, plan: type[Config], values: dict[str, Any]) -> bool:
        """Whether each rule on its own leaves any config of a plan with these first values."""
        for rule in self._rules(plan):
            names = [name for name in knobs(plan) if name in rule.knobs]
            choices = product(*(self._choices(plan, name, values) for name in names))
            picks = ({**values, **dict(zip(names, each, strict=True))} for each in choices)
            if not any(self._keeps(plan, pick, [rule]) for pick in picks):
                return False
        return True

    def _rules(self, plan: type[Config]) -> list[Rule]:
        """The rules of a plan."""
        return list(PLANS[plan.plan].rules)

    def _keeps(self, plan: type[Config], values: dict[str, Any], rules: Sequence[Rule]) -> bool:
        return not why_broken(rules, Candidate(self.problem, plan(**values), self.device))

    def _choices(self, plan: type[Config], name: str, values: dict[str, Any]) -> Choices:
        """A knob's choices once the knobs that decide whether it matters have their values."""
        if name in values:
            return (values[name],)
        if not enabled(plan, name, values):
            return (knobs(plan)[name]["default"],)
        return self._knobs(plan)[name]


@functools.lru_cache(maxsize=None, typed=True)  # Optuna checks each choice
def _categorical(*choices: Any) -> optuna.distributions.CategoricalDistribution:
    return optuna.distributions.CategoricalDistribution(choices)


def _known_knobs() -> str:
    return ", ".join(dict.fromkeys(knob for plan in PLANS.values() for knob in knobs(plan.config)))


def _choices_of(plan: type[Config], name: str) -> Choices:
    """The choices of a plan's knob; empty if the plan has no such knob."""
    known = knobs(plan)
    return known[name]["choices"] if name in known else ()


def _all_choices(name: str) -> list[Any]:
    """The choices of a knob over all plans that have it."""
    found = [_choices_of(plan.config, name) for plan in PLANS.values()]
    return list(dict.fromkeys(choice for choices in found for choice in choices))


def parse_fixed(text: str) -> tuple[str, Any]:
    """Read `--fix`: KNOB=VALUE, with the value in the type of the knob's choices.

    Raises FlashtuneError if the knob or value does not exist.
    """
    name, _, value = text.partition("=")
    choices = list(PLANS) if name == "plan" else _all_choices(name)
    if not choices:
        raise FlashtuneError(f"unknown knob {name!r}: use plan, {_known_knobs()}")
    for choice in choices:
        if str(choice).lower() == value.lower():
            return name, choice
    raise FlashtuneError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
