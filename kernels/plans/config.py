"""Configs: a plan with all its knobs set, and the predicate that says which are valid.

Usage:
    config = default_config(problem, device)
    config = parse_config({"plan": "staged", "selection": "threshold", …})  # from a table
    why_invalid(config, problem, device)        # None, or one line that says why not

Each kind of device has a family of plans, registered here by the device's vendor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashtune.kernels.backends.cuda import nvrtc
from flashtune.kernels.plans import cpp_config, triton_config
from flashtune.kernels.plans import streamed as streamed_config
from flashtune.kernels.plans.cpp_config import CppFusedConfig, CppStagedConfig
from flashtune.kernels.plans.knob import Rule, enabled, knobs, why_broken
from flashtune.kernels.plans.streamed import StreamedConfig
from flashtune.kernels.plans.tensor_config import BatchedConfig, DenseConfig
from flashtune.kernels.plans.triton_config import PersistentConfig, StagedConfig, TritonConfig
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import ConfigData, Scalar

Config = TritonConfig | StreamedConfig | CppFusedConfig | CppStagedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The plans for one kind of device, and what is known of their configs."""

    plans: tuple[type[Config], ...]
    rules: tuple[Rule, ...]
    default: Callable[[Problem, Device], Config]
    baseline: Callable[[Problem, Device], Config]
    known_good: Callable[[Problem, Device], Sequence[Config]]
    slack_of: Callable[[Any], int]


def _known_good_on_nvidia(problem: Problem, device: Device) -> list[Config]:
    """What is fastest on the newest first: races have no time for all."""
    return [
        *streamed_config.STARTS,
        *triton_config.known_good(problem, device),
    ]


def _slack_on_nvidia(config: TritonConfig | StreamedConfig) -> int:
    return config.slack if isinstance(config, StreamedConfig) else triton_config.slack_of(config)


FAMILIES = {
    "nvidia": Family(
        plans=(StagedConfig, PersistentConfig, BatchedConfig, DenseConfig, StreamedConfig),
        rules=(*triton_config.RULES, *streamed_config.RULES),
        default=triton_config.default_config,
        baseline=triton_config.baseline_config,
        known_good=_known_good_on_nvidia,
        slack_of=_slack_on_nvidia,
    ),
    "cpu": Family(
        plans=(CppFusedConfig, CppStagedConfig),
        rules=cpp_config.RULES,
        default=cpp_config.default_config,
        baseline=cpp_config.baseline_config,
        known_good=cpp_config.known_good,
        slack_of=cpp_config.slack_of,
    ),
}
PLANS: dict[str, type[Config]] = {
    plan.plan: plan for family in FAMILIES.values() for plan in family.plans
}


def config_data(config: Config) -> ConfigData:
    """A config as plain data, its plan included: what records and tables hold."""
    return {"plan": config.plan, **asdict(config)}


def parse_config(data: Any) -> Config:
    """The config that `data` describes; raises FlashtuneError on anything not a known choice.

    This is the only way from a table or a database to a template.
    """
    if not isinstance(data, Mapping) or data.get("plan") not in tuple(PLANS):
        raise FlashtuneError(f"a config's plan must be one of {', '.join(PLANS)}")
    plan = PLANS[data["plan"]]
    values: dict[str, Scalar] = {name: value for name, value in data.items() if name != "plan"}
    known = knobs(plan)
    if set(values) != set(known):
        odd = ", ".join(sorted(set(values) ^ set(known)))
        raise FlashtuneError(f"a {plan.plan} config must have just its knobs; check {odd}")
    for name, value in values.items():
        choices = known[name]["choices"]
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise FlashtuneError(
                f"{plan.plan} knob {name} must be one of {choices}, not {value!r}"
            )
        if not enabled(plan, name, values) and value != known[name]["default"]:
            raise FlashtuneError(f"{plan.plan} knob {name} does not matter here: keep its default")
    return plan(**values)  # type: ignore[arg-type]


def plans_of(device: Device) -> dict[str, type[Config]]:
    """The plans that run on a device, by name; raises FlashtuneError when there are none."""
    return {plan.plan: plan for plan in _family_of(device).plans}


def rules_of(device: Device) -> tuple[Rule, ...]:
    """The rules that make a config of a device's plans valid."""
    return _family_of(device).rules


def why_invalid(config: Config, problem: Problem, device: Device) -> str | None:
    """None when the config can run this problem on this device, else one line that says why."""
    family = _family_of(device)
    if not isinstance(config, family.plans):
        return f"{config.plan} is no plan for {device.name}"
    return why_broken(family.rules, config, problem, device)


def baseline_config(problem: Problem, device: Device) -> Config:
    """The pipeline every comparison is made with: a library selects the clusters."""
    return _family_of(device).baseline(problem, device)


def default_config(problem: Problem, device: Device) -> Config:
    """A config that is valid for every problem, used where nothing better is known."""
    return _family_of(device).default(problem, device)


def known_good(problem: Problem, device: Device) -> Sequence[Config]:
    """Configs from which searches begin, valid or not: what was found by hand."""
    return _family_of(device).known_good(problem, device)


def why_unavailable(config: Config) -> str | None:
    """None where this machine has what builds the config's kernels, else one line."""
    return nvrtc.why_missing() if isinstance(config, StreamedConfig) else None


def slack_of(config: Config) -> int:
    """How many clusters more than asked a config may probe; none where a library selects."""
    family = next(each for each in FAMILIES.values() if isinstance(config, each.plans))
    return family.slack_of(config)


def _family_of(device: Device) -> Family:
    if device.vendor not in FAMILIES:
        raise FlashtuneError(f"no kernels for devices of {device.vendor}: {device.name}")
    return FAMILIES[device.vendor]
