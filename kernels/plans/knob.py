"""Knobs: the fields of a config's dataclass, each with its choices.

A knob's choices are declared once, with the knob: the search space, the parser and the docs read
them from here. `when` names the knob values under which a knob matters; otherwise it must keep its
default, so that no two configs mean the same kernel.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from flashtune.tuning_db.record import ConfigData


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A plan with all its knobs set; each plan has a subclass, whose fields are its knobs."""

    plan: ClassVar[str]


def config_data(config: Config) -> ConfigData:
    """A config as plain data, including its plan: the form in records and tables."""
    return {"plan": config.plan, **{name: getattr(config, name) for name in knobs(type(config))}}


def changed_data(config: Config) -> ConfigData:
    """A config as plain data without the knobs at their defaults: a new knob changes nothing."""
    defaults = {name: each["default"] for name, each in knobs(type(config)).items()}
    return {
        name: value
        for name, value in config_data(config).items()
        if name == "plan" or value != defaults[name]
    }


def knob(
    default: Any, choices: tuple[Any, ...], when: Mapping[str, tuple[Any, ...]] | None = None
) -> Any:
    """A config's field with its choices; `when` maps other knobs to values that enable this."""
    return field(default=default, metadata={"choices": choices, "when": dict(when or {})})


def knobs(plan: Any) -> dict[str, Mapping[str, Any]]:
    """The knobs of a plan, each with `choices`, `when` and `default`, in search order.

    Callers must not change them: a plan's knobs are collected once.
    """
    return _gathered(plan)


@functools.cache
def _gathered(plan: Any) -> dict[str, Mapping[str, Any]]:
    return {f.name: {**f.metadata, "default": f.default} for f in fields(plan)}


def enabled(plan: Any, name: str, values: Mapping[str, Any]) -> bool:
    """Whether knob `name` matters, given the values of the knobs before it."""
    when = knobs(plan)[name]["when"]
    return all(values[other] in allowed for other, allowed in when.items())
