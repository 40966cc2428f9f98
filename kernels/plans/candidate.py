"""A plan, its rules for configs, and a candidate: one config for a problem on a device.

Usage:
    candidate = Candidate(problem, config, device)
    candidate.why_invalid()      # None, or one line that says why it cannot run
    candidate.source             # the generated source
    candidate.launches           # its kernels, with estimates of what they need

A plan is a fusion strategy: which steps share a launch, and how clusters are selected. Each plan
has its own file beside this one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from flashtune.kernels.plans.knob import Config, config_data
from flashtune.templates.render import Value, render
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import config_key
from flashtune.tuning_db.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelUse:
    """One launch of a candidate and what its kernel needs: an estimate until it is compiled.

    registers and spilled (bytes) are per thread, shared_bytes per program; dynamic_bytes is the
    part of these that the launch requests. arguments: their names, as in backends/gpu.py, if the
    source does not give them itself.
    """

    kernel: str
    programs: int
    warps: int
    registers: int
    shared_bytes: int
    spilled: int = 0
    dynamic_bytes: int = 0
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition that makes a candidate valid, and every knob that it reads.

    `find(candidate)` is None, or one line that says why the candidate breaks it. Code that
    enumerates configs can judge a rule as soon as its knobs are set.
    """

    find: Callable[["Candidate"], str | None]
    knobs: frozenset[str] = frozenset()


class Leeway(TypedDict):
    """How far a config's answers may differ from the reference, as `why_wrong` takes it.

    slack: how many more clusters than requested may be probed. tensor_cores: whether sums are cut.
    """

    slack: int
    tensor_cores: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan. `builder` names the backend that builds it, `template` its Jinja template.

    launches: its own kernels in the order of their launches. values: what the template is filled
    in with. slack: how many more clusters than requested a config may probe. starts: configs from
    which searches begin, valid or not, those expected to be fastest first. tensor_cores: whether
    they multiply on a GPU, which cut instead of rounding (measure/judge.py).
    """

    config: type[Config]
    builder: str
    template: str | None
    rules: tuple[Rule, ...]
    launches: Callable[["Candidate"], Sequence[KernelUse]]
    values: Callable[["Candidate"], Mapping[str, Value]]
    slack: Callable[[Any], int]
    starts: Callable[[Problem, Device], Sequence[Config]]
    tensor_cores: bool = False

    @property
    def name(self) -> str:
        """Its name in records."""
        return self.config.plan

    def leeway(self, config: Any) -> Leeway:
        """How far the answers of one of its configs may differ."""
        return Leeway(slack=self.slack(config), tensor_cores=self.tensor_cores)


class KindOfDevice(Protocol):
    """What plans may know about a target (kernels/backends/target.py)."""

    @property
    def name(self) -> str:
        """The vendor, as devices name it."""

    @property
    def lanes(self) -> int:
        """Threads of a warp."""

    @property
    def plans(self) -> Sequence[Plan]:
        """The plans that run on it."""


PLANS: Registry[Plan] = Registry("a config's plan", room="flashtune.kernels.plans")
TARGETS: Registry[KindOfDevice] = Registry("a device's vendor", room="flashtune.kernels.backends")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One config for one problem on one device: what is rendered, compiled, loaded and timed."""

    problem: Problem
    config: Any  # of the plan's own config type, which its functions know
    device: Device

    @property
    def plan(self) -> Plan:
        """The config's plan."""
        return PLANS[self.config.plan]

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return TARGETS[self.device.vendor].lanes

    @property
    def slack(self) -> int:
        """How many more clusters than requested it may probe."""
        return self.plan.slack(self.config)

    @property
    def leeway(self) -> Leeway:
        """How far its answers may differ from the reference."""
        return self.plan.leeway(self.config)

    @property
    def launches(self) -> Sequence[KernelUse]:
        """Its own kernels in the order of their launches, with estimates of what they need."""
        return self.plan.launches(self)

    def why_invalid(self) -> str | None:
        """None if it can run, else one line that says why not.

        Raises FlashtuneError for a device of a kind that has no kernels.
        """
        if self.plan not in plans_of(self.device).values():
            return f"{self.config.plan} is not a plan for {self.device.name}"
        return why_broken(self.plan.rules, self)

    @property
    def source(self) -> str:
        """The generated source; raises FlashtuneError if the candidate is not valid."""
        reason = self.why_invalid()
        plan = self.plan
        if reason or plan.template is None:
            reason = reason or "this plan generates no source"
            raise FlashtuneError(
                f"{plan.name} config not valid for {self.problem.describe()}: {reason}"
            )
        return render(plan.template, plan.values(self))

    @property
    def key(self) -> str:
        """A unique key of 32 hex digits; the device counts by its name."""
        parts = (self.device.name, self.problem.key, config_key(config_data(self.config)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def why_broken(rules: Sequence[Rule], candidate: Candidate) -> str | None:
    """The first rule's reason that a candidate breaks, else None."""
    return next((reason for rule in rules if (reason := rule.find(candidate))), None)


def plans_of(device: Device) -> dict[str, Plan]:
    """The plans that run on a device, by name; raises FlashtuneError if there are none."""
    if device.vendor not in TARGETS:
        raise FlashtuneError(
            f"there are no kernels for {device.name}, a device of {device.vendor}"
        )
    return {plan.name: plan for plan in TARGETS[device.vendor].plans}


def resident_programs(use: KernelUse, device: Device) -> int:
    """Programs of a kernel that are resident on one multiprocessor; at least one."""
    limits, threads = device.limits, TARGETS[device.vendor].lanes * use.warps
    registers = max(1, use.registers) * threads
    room = [
        limits.blocks_per_sm,
        limits.threads_per_sm // threads,
        limits.registers_per_sm // registers,
        limits.shared_per_sm // (use.shared_bytes + limits.reserved_per_block),
    ]
    return max(1, min(room))
