"""A run of `flashtune search`: several problems on one device, within one budget.

Usage:
    session = Session(request, store)
    outcome = session.run(display)      # which is told how it goes
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from flashtune.kernels.backends.host import devices_here, toolchain
from flashtune.kernels.backends.target import target_of
from flashtune.kernels.plans.candidate import plans_of
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuner.here import as_it_is_now
from flashtune.tuner.objective import Objective
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.search.evaluate import Evaluator, MeasuringEvaluator, PredictingEvaluator
from flashtune.tuner.search.sampler import MOST_SEED, SAMPLERS
from flashtune.tuner.search.search import Budget, Event, Result, search
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.remote import RemoteMachine
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table
from flashtune.tuning_db.table_folder import added_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """What a user asks to be searched. `trials` is for each problem, `timeout_s` for all.

    remote: the machine that has the device, if that is to be measured on over ssh. Raises
    FlashtuneError for numbers out of range and for an unknown sampler.
    """

    device: Device
    problems: Sequence[Problem]
    trials: int
    timeout_s: float | None = None
    sampler: str = "tpe"
    seed: int = 0
    jobs: int = 1
    fixed: Mapping[str, Any] = field(default_factory=dict)
    retry_failed: bool = False
    objective: Objective = Objective.TIME
    remote: RemoteMachine | None = None

    def __post_init__(self) -> None:
        """Check the numbers, whoever gives them."""
        for name in ("trials", "jobs"):
            _check_count(name, getattr(self, name), range(1, sys.maxsize))
        _check_count("seed", self.seed, range(MOST_SEED + 1))
        timeout = self.timeout_s
        if timeout is not None and not (
            isinstance(timeout, int | float) and 0 < timeout < math.inf
        ):
            raise FlashtuneError(f"timeout must be seconds, more than 0, not {timeout!r}")
        if self.sampler not in SAMPLERS:
            raise FlashtuneError(
                f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionResult:
    """What became of a request; `results` lacks the problems that were not begun.

    device: with the bandwidth that was measured in this run, where it is this machine's CPU.
    """

    device: Device
    provenance: Provenance
    problems: Sequence[Problem]
    results: Sequence[Result]
    cancelled: bool


class Display(Protocol):
    """What shows a person how a session goes."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def start(
        self, problem: Problem, trials: int, floor_us: float | None
    ) -> Callable[[Event], None]:
        """Begin to show a search; its events go to the result."""


class Session:
    """Runs the searches of a request one after another."""

    def __init__(self, request: SearchRequest, store: Store) -> None:
        """Measures where the device is this machine's or the remote one's, else predicts.

        Raises FlashtuneError when what is fixed leaves no valid config for a problem, and where
        energy counts and can't be read.
        """
        self.request, self.store = request, store
        self.cancelled = False
        self._device = request.device
        self.provenance, self.toolchain = _evaluated(request)
        _check_energy(request, self.provenance)
        self._left_out = _left_out(request, self.provenance)
        without = frozenset(self._left_out)
        if request.fixed.get("plan") in without:
            raise FlashtuneError(self._left_out[request.fixed["plan"]])
        self._spaces = [
            Space(problem, request.device, request.fixed, without=without)
            for problem in request.problems
        ]
        for space in self._spaces:
            if next(space.configs(), None) is None:
                raise FlashtuneError(
                    f"no valid config for {space.problem.describe()} on {request.device.name} "
                    f"with {dict(request.fixed)}: fix less"
                )

    def run(self, display: Display) -> SessionResult:
        """Search; of a session cut short by Ctrl-C the interrupted search is the last result."""
        request = self.request
        here = request.remote is None
        self._device = as_it_is_now(request.device) if here else request.device
        results = self._searches(display)
        again = as_it_is_now(request.device) if here and not self.cancelled else self._device
        return SessionResult(
            device=max(self._device, again, key=lambda device: device.memory_bandwidth),
            provenance=self.provenance,
            problems=request.problems,
            results=results,
            cancelled=self.cancelled,
        )

    def _searches(self, display: Display) -> list[Result]:
        request = self.request
        end = time.monotonic() + (request.timeout_s or float("inf"))
        results: list[Result] = []
        transport = request.remote.transport if request.remote else None
        with (
            WorkerPool(request.jobs) as compilers,
            WorkerPool(1, transport, display.note) as measurer,
        ):
            for why in self._left_out.values():
                display.note(f"{why}; searching without it")
            for number, space in enumerate(self._spaces):
                left = end - time.monotonic()
                if left <= 0:
                    break
                share = left / (len(self._spaces) - number) if request.timeout_s else None
                try:
                    evaluator = self._evaluator(space.problem, compilers, measurer)
                    results.append(self._search(space, share, evaluator, display))
                    self.cancelled = results[-1].cancelled
                except KeyboardInterrupt:
                    self.cancelled = True
                if self.cancelled:
                    break
        return results

    def _search(
        self,
        space: Space,
        timeout_s: float | None,
        evaluator: Evaluator,
        display: Display,
    ) -> Result:
        with closing(evaluator):
            return search(
                space,
                evaluator,
                self.store,
                Budget(trials=self.request.trials, timeout_s=timeout_s),
                toolchain=self.toolchain,
                sampler=self.request.sampler,
                seed=self.request.seed,
                near=self._near(),
                retry_failed=self.request.retry_failed,
                objective=self.request.objective,
                on_event=display.start(
                    space.problem, self.request.trials, floor_us(space.problem, self._device)
                ),
            )

    def _evaluator(
        self, problem: Problem, compilers: WorkerPool, measurer: WorkerPool
    ) -> Evaluator:
        request = self.request
        if self.provenance is Provenance.PREDICTED:
            return PredictingEvaluator(problem, request.device, compilers)
        remote = request.remote
        return MeasuringEvaluator(
            problem,
            request.device,
            compilers if remote is None or remote.compiles_as(toolchain(request.device)) else None,
            measurer,
            seed=request.seed,
            elsewhere=remote is not None,
            energy=request.objective.needs_energy,
        )

    def _near(self) -> list[Record]:
        """Winners on this device: the user's, those of added tables, those that ship.

        Its own is the nearest. One of a table is not taken at its word: it may have been measured
        with other tools.
        """
        name = self.request.device.name
        found = [self.store.best(name, other) for other in self.store.problems(name)]
        table = prebuilt_table(name)
        shipped = table.records if table else ()
        added = [
            each for each in added_tables().of(name) if each.measurement.outcome is Outcome.OK
        ]
        return [*(record for record in found if record), *added, *shipped]


def _check_count(name: str, value: Any, allowed: range) -> None:
    if type(value) is not int or value not in allowed:
        raise FlashtuneError(
            f"{name} must be a whole number from {allowed[0]} to {allowed[-1]}, not {value!r}"
        )


def _evaluated(request: SearchRequest) -> tuple[Provenance, Toolchain]:
    """Whether the request is measured or predicted, and with which tools."""
    if request.remote is not None:
        return Provenance.MEASURED, request.remote.toolchain
    found = toolchain(request.device)
    if request.device.name in {each.name for each in devices_here()}:
        return Provenance.MEASURED, found
    return Provenance.PREDICTED, Toolchain(triton=found.triton)


def _check_energy(request: SearchRequest, provenance: Provenance) -> None:
    """Raise FlashtuneError where energy counts and can't be measured, as far as is known here."""
    if not request.objective.needs_energy:
        return
    if provenance is Provenance.PREDICTED:
        raise FlashtuneError(
            f"energy is measured, never predicted: search on {request.device.name} itself, or "
            "by time alone"
        )
    if request.remote is None:
        target = target_of(request.device)
        with target.energy(torch.device(target.torch_device)):
            pass


def _left_out(request: SearchRequest, provenance: Provenance) -> dict[str, str]:
    """The plans that would run on the device but cannot be searched, each with why.

    What the machine at the other end of ssh can build it says itself.
    """
    found: dict[str, str | None] = {}
    for name, plan in plans_of(request.device).items():
        if provenance is Provenance.PREDICTED and name not in PLAN_STAGES:
            found[name] = f"times of plan {name} are not predicted: search on the machine itself"
        elif request.remote is None:
            found[name] = target_of(request.device).why_missing(plan)
    return {name: why for name, why in found.items() if why and _would_run(name, request)}


def _would_run(plan: str, request: SearchRequest) -> bool:
    """Whether a plan has a valid config for any of the problems."""
    spaces = (Space(problem, request.device, {"plan": plan}) for problem in request.problems)
    return any(next(space.configs(), None) for space in spaces)
