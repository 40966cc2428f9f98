"""A target: a kind of device, the plans that run on it, and everything specific to it.

Usage:
    target = target_of(device)
    target.times_alone
    default_config(problem, device)       # a config that is valid for every problem
    backend_of(candidate)                 # what builds it

A target is a row: `TARGETS` lists those of the folders beside this file by vendor.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, cast

import torch

from flashtune.kernels.backends.backend import Backend
from flashtune.kernels.measure.timing import Timer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import TARGETS, Candidate, Plan, plans_of
from flashtune.kernels.plans.knob import Config
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.policy import policy_of, taken_behind
from flashtune.tuning_db.probe import Figures
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Provenance, Record

Joules = Callable[[], float]
"""The device's energy so far; only differences are meaningful."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device. Everything in it is asked for only when it is needed.

    name: the vendor, as devices name it. lanes: threads of a warp. builders: what builds the
    plans' candidates, by `Plan.builder`. torch_device: where its tensors lie, as torch names it.
    starts: the plans, in the order in which their starting points are tried.
    default: a config that is valid for every problem; baseline: the pipeline that all
    comparisons use, in which a library selects the clusters.
    timer: a step over cold weights, as decode runs it. times_behind: whether it is timed behind
    another kernel, which the policies of its times say.
    describe: the device under a torch device, None if that is not of this kind. here: this
    machine's device, None if it has none; described: the same, but its bandwidth may be unknown
    where measuring it would take templates. named: this machine's device if that is its name.
    trouble: why nothing can be measured on this machine's, None if it can.
    unused: why a device that this machine should have is not found; None without signs of one.
    why_missing: why this machine cannot build a plan, None if it can.
    times_alone: whether compilers that run at the same time would disturb the timing.
    registered: whether its devices are listed in devices.json; others only their machine knows.
    compiles_elsewhere: whether what one machine compiles runs on another.
    bandwidth_sources: what a machine runs to measure how fast it reads memory; empty if the
    figure is published.
    probe: measures this machine's device; None where its kind has nothing to measure.
    conditions: what its speed depends on besides its kind, as far as it can be read.
    energy: gives a counter of the joules consumed; raises FlashtuneError if none can be read.
    """

    name: str
    lanes: int
    plans: tuple[Plan, ...]
    starts: tuple[Plan, ...]
    builders: Mapping[str, Callable[[], Backend]]
    torch_device: str
    default: Callable[[Problem, Device], Config]
    baseline: Callable[[Problem, Device], Config]
    timer: Callable[[Step, Workload], Timer]
    times_behind: bool
    describe: Callable[[torch.device], Device | None]
    here: Callable[[], Device | None]
    described: Callable[[], Device | None]
    named: Callable[[str], Device | None]
    toolchain: Callable[[], Toolchain]
    trouble: Callable[[], str | None]
    unused: Callable[[], str | None]
    why_missing: Callable[[Plan], str | None]
    times_alone: bool
    registered: bool
    compiles_elsewhere: bool
    bandwidth_sources: Callable[[Device], Sequence[str]]
    probe: Callable[[Device, torch.device], Figures | None]
    conditions: Callable[[torch.device], Mapping[str, str]]
    energy: Callable[[torch.device], AbstractContextManager[Joules]]


def policy_for(purpose: str, device: Device) -> str:
    """The policy of times that are taken of a device for this purpose; see tuning_db/policy.py."""
    return policy_of(purpose, behind=target_of(device).times_behind)


def timed_otherwise(record: Record, device: Device) -> bool:
    """Whether a measured time of this device was taken in another way than times are now."""
    measured = record.provenance is Provenance.MEASURED
    behind = taken_behind(record.measurement.policy)
    return measured and target_of(device).times_behind and not behind


def no_energy(where: torch.device) -> NoReturn:
    """`energy` of a kind of device without an energy counter; raises FlashtuneError."""
    raise FlashtuneError(f"the energy of {where} cannot be measured here")


def all_targets() -> tuple[Target, ...]:
    """Every target."""
    return tuple(cast("Target", each) for each in TARGETS.values())


def target_of(device: Device) -> Target:
    """A device's target; raises FlashtuneError if there are no kernels for its kind."""
    plans_of(device)  # which says so
    return cast("Target", TARGETS[device.vendor])


def backend_of(candidate: Candidate) -> Backend:
    """What builds a candidate on its device."""
    return target_of(candidate.device).builders[candidate.plan.builder]()


def default_config(problem: Problem, device: Device) -> Config:
    """A config that is valid for every problem, used if no better one is known.

    Raises FlashtuneError for a problem that no kernel of the device can solve.
    """
    return target_of(device).default(problem, device)


def baseline_config(problem: Problem, device: Device) -> Config:
    """The baseline of every comparison: a library selects the clusters."""
    return target_of(device).baseline(problem, device)


def known_good(problem: Problem, device: Device) -> list[Config]:
    """Configs from which searches begin, valid or not, those expected to be fastest first."""
    starts = target_of(device).starts
    return [config for plan in starts for config in plan.starts(problem, device)]
