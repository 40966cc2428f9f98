"""Knobs: the fields of a config's dataclass, each with its choices; and rules about them.

A knob's choices stand with the knob, once: the search space, the parser and the docs read them
from here. `when` names the knob values under which a knob matters; where it does not, it must
keep its default, so that no two configs mean the same kernel.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


def knob(
    default: Any, choices: tuple[Any, ...], when: Mapping[str, tuple[Any, ...]] | None = None
) -> Any:
    """A config's field with its choices; `when` maps other knobs to values that enable this."""
    return field(default=default, metadata={"choices": choices, "when": dict(when or {})})


def knobs(plan: Any) -> dict[str, Mapping[str, Any]]:
    """The knobs of a plan, each with `choices`, `when` and `default`, in search order.

    Not to be changed by whoever reads them: a plan's knobs are gathered once.
    """
    return _gathered(plan)


@functools.cache
def _gathered(plan: Any) -> dict[str, Mapping[str, Any]]:
    return {f.name: {**f.metadata, "default": f.default} for f in fields(plan)}


def enabled(plan: Any, name: str, values: Mapping[str, Any]) -> bool:
    """Whether knob `name` matters, given the values of the knobs before it."""
    when = knobs(plan)[name]["when"]
    return all(values[other] in allowed for other, allowed in when.items())


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition of `why_invalid`, and every knob that it reads, of whichever of its plans.

    `find(config, problem, device)` is None, or one line that says why the config breaks it; it
    is asked of the rule's own plans only, of all where `plans` is empty. Whoever enumerates
    configs can judge a rule as soon as its knobs are set.
    """

    find: Callable[[Any, Problem, Device], str | None]
    knobs: frozenset[str]
    plans: tuple[type, ...] = ()

    def why_broken(self, config: Any, problem: Problem, device: Device) -> str | None:
        """None when the config keeps the rule, or the rule is not about its plan."""
        if self.plans and not isinstance(config, self.plans):
            return None
        return self.find(config, problem, device)


def why_broken(
    rules: tuple[Rule, ...], config: Any, problem: Problem, device: Device
) -> str | None:
    """The first rule's reason that a config breaks, else None."""
    reasons = (rule.why_broken(config, problem, device) for rule in rules)
    return next((reason for reason in reasons if reason), None)
