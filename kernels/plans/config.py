"""Configs as plain data: the form in records and tables, and the only parser for it.

Usage:
    config = parse_config({"plan": "staged", "selection": "threshold", …})  # from a table
    config_data(config)
    short_config(record.config)         # one readable line
"""

from collections.abc import Mapping
from typing import Any

from flashtune.kernels.plans.candidate import PLANS
from flashtune.kernels.plans.knob import Config, config_data, enabled, knobs
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.record import ConfigData, Scalar

__all__ = ["Config", "config_data", "enabled", "knobs", "parse_config", "short_config", "slack_of"]


def parse_config(data: Any) -> Config:
    """The config that `data` describes; raises FlashtuneError on anything not a known choice.

    This is the only way from a table or a database to a template.
    """
    plan = PLANS[data.get("plan") if isinstance(data, Mapping) else None].config
    values: dict[str, Scalar] = {name: value for name, value in data.items() if name != "plan"}
    known = knobs(plan)
    if set(values) != set(known):
        odd = ", ".join(sorted(set(values) ^ set(known)))
        raise FlashtuneError(f"a {plan.plan} config must have exactly its knobs; check {odd}")
    for name, value in values.items():
        choices = known[name]["choices"]
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise FlashtuneError(
                f"{plan.plan} knob {name} must be one of {choices}, not {value!r}"
            )
        if not enabled(plan, name, values) and value != known[name]["default"]:
            raise FlashtuneError(f"{plan.plan} knob {name} has no effect here: keep its default")
    return plan(**values)


def slack_of(config: Config) -> int:
    """How many more clusters than requested a config may probe."""
    return PLANS[config.plan].slack(config)


def short_config(config: ConfigData) -> str:
    """The plan, and the knobs that differ from their defaults or from what this version knows."""
    if config["plan"] not in PLANS:
        return f"{config['plan']}, which this version of flashtune does not know"
    plan = PLANS[config["plan"]].config
    known = knobs(plan)
    changed = [
        f"{name}={config[name]}"
        for name, knob in known.items()
        if name in config and config[name] != knob["default"]
    ]
    odd = sorted(set(known) ^ (set(config) - {"plan"}))
    if odd:
        changed.append(f"(of another version of flashtune: see {', '.join(odd)})")
    return " ".join([plan.plan, *changed])
