"""What turns a config into something that runs: one interface, one backend a kind of device.

Usage:
    backend = backend_of(device)
    backend.compile(problem, config, device)              # no device needed, in any process
    load = backend.loader(problem, config, device, torch.device("cuda"))
    step = load()                                         # with scratch of its own
    step(weights, hidden, out)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flashtune.kernels.measure.timing import Timer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.config import Config
from flashtune.kernels.weights import Step
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelUse:
    """What one launch of a compiled candidate needs. `spilled` is bytes a thread."""

    kernel: str
    programs: int
    warps: int
    registers: int
    shared_bytes: int
    spilled: int


def resident_programs(use: KernelUse, device: Device) -> int:
    """Programs of a kernel that one multiprocessor holds at a time; at least one."""
    limits, threads = device.limits, 32 * use.warps
    registers = max(1, use.registers) * threads
    room = [
        limits.blocks_per_sm,
        limits.threads_per_sm // threads,
        limits.registers_per_sm // registers,
        limits.shared_per_sm // (use.shared_bytes + 1024),
    ]
    return max(1, min(room))


class Backend(Protocol):
    """Renders, compiles, loads and times the candidates of one kind of device."""

    torch_device: str  # where its tensors lie, as torch names it
    times_alone: bool  # whether compilers that run beside the timing would slow it down

    def render(self, problem: Problem, config: Config, device: Device) -> str:
        """The candidate's source; raises FlashtuneError when the config is not valid for it."""

    def compile(self, problem: Problem, config: Config, device: Device) -> Sequence[KernelUse]:
        """Compile into the compiler's own cache, and say what the kernels need.

        Needs no device. Raises DoesNotFitError, or whatever the compiler raises.
        """

    def loader(
        self,
        problem: Problem,
        config: Config,
        device: Device,
        torch_device: torch.device,
        source: str | None = None,
    ) -> Callable[[], Step]:
        """Compile; each call of the result loads a step with scratch of its own.

        source: what `render` gives, where that was done elsewhere.
        """

    def timer(self, step: Step, workload: Workload) -> Timer:
        """The step over cold weights, as decode runs it."""


def backend_of(device: Device) -> Backend:
    """The backend for a device; raises FlashtuneError when there is none."""
    if device.vendor == "nvidia":
        from flashtune.kernels.backends.nvidia.backend import NvidiaBackend

        return NvidiaBackend()
    if device.vendor == "cpu":
        from flashtune.kernels.backends.cpp.backend import CppBackend

        return CppBackend()
    raise FlashtuneError(f"no kernels for devices of {device.vendor}: {device.name}")
