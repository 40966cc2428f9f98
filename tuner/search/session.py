"""A run of `flashtune search`: several problems on one kind of device, within one budget.

Usage:
    session = Session(request, store)
    outcome = session.run(display)                      # the display shows progress
    outcomes = side_by_side([session, other], display)  # for several kinds of device

As many problems are searched at once as there are workers that measure. One thread drives all.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from flashtune.kernels.backends.host import devices_here, toolchain
from flashtune.kernels.backends.target import default_config, target_of
from flashtune.kernels.plans.candidate import Candidate, plans_of
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuner.fleet.machine import Fleet
from flashtune.tuner.fleet.muster import Muster
from flashtune.tuner.here import as_it_is_now
from flashtune.tuner.objective import Objective
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.search.evaluate import (
    Evaluator,
    MeasuringEvaluator,
    PredictingEvaluator,
    Steps,
)
from flashtune.tuner.search.samplers.sampler import MOST_SEED, SAMPLERS
from flashtune.tuner.search.search import Budget, Event, Result, Search
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.pool import WorkerPool, rest
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import here
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table
from flashtune.tuning_db.table_folder import added_tables

SHORTEST_SECONDS = 5.0  # for which a search that was cut short is continued
UNREAD_SECONDS = 0.01  # for which replies are left unread between two steps; far below a task's


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """A user's request for a search. `trials` is per problem, `timeout_s` for all.

    fleet: the workers that have the device, unless that is one worker of this machine. Raises
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
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("trials", "jobs"):
            _check_count(name, getattr(self, name), range(1, sys.maxsize))
        _check_count("seed", self.seed, range(MOST_SEED + 1))
        timeout = self.timeout_s
        if timeout is not None and not (
            isinstance(timeout, int | float) and 0 < timeout < math.inf
        ):
            raise FlashtuneError(
                f"timeout must be a number of seconds greater than 0, not {timeout!r}"
            )
        if self.sampler not in SAMPLERS:
            raise FlashtuneError(
                f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionResult:
    """The result of a request; `results` lacks the problems that were not begun.

    device: with the bandwidth measured in this run, if it is this machine's CPU.
    """

    device: Device
    provenance: Provenance
    problems: Sequence[Problem]
    results: Sequence[Result]
    cancelled: bool


class Display(Protocol):
    """Shows the user the progress of a session."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def start(
        self, problem: Problem, trials: int, floor_us: float | None
    ) -> Callable[[Event], None]:
        """Begin to show a search; returns the function that takes its events."""


class Session:
    """Runs the searches of a request, as many at once as there are workers that measure."""

    def __init__(self, request: SearchRequest, store: Store) -> None:
        """Measures if the device is in this machine or a fleet, else predicts.

        Raises FlashtuneError if the fixed knobs leave no valid config for a problem, or if energy
        counts and can't be read.
        """
        self.request, self.store = request, store
        self.pools: list[WorkerPool] = []
        self._device = request.device
        self._searches: dict[int, Search] = {}  # by the place of their problem
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
                    f"with {dict(request.fixed)}: fix fewer knobs"
                )

    def run(self, display: Display) -> SessionResult:
        """Run this session alone; see `side_by_side`."""
        return side_by_side([self], display)[0]

    def steps(self, display: Display) -> Steps[None]:
        """Search. `result` has every search that was begun, however this ends."""
        if self._is_here:
            self._device = as_it_is_now(self.request.device)
        for why in self._left_out.values():
            display.note(f"{why}; searching without it")
        with ExitStack() as stack:
            compilers = stack.enter_context(self._compilers())
            measurers = stack.enter_context(self._measurers(display))
            self.pools = [compilers, measurers]
            muster = Muster(measurers, self._reference(), display.note)
            end = time.monotonic() + (self.request.timeout_s or math.inf)
            waiting, begun = deque(range(len(self._spaces))), list[Steps[None]]()
            while waiting or begun:
                muster.turn()
                most = max(1, measurers.size) if self.provenance is Provenance.MEASURED else 1
                while waiting and len(begun) < most and time.monotonic() < end:
                    rounds = -(-len(waiting) // most)
                    share = (end - time.monotonic()) / rounds if self.request.timeout_s else None
                    begun.append(self._search(waiting.popleft(), share, begun, display))
                if not begun:
                    return  # out of time
                yield from in_turns(begun)
                if not waiting and not begun:
                    waiting.extend(self._cut_short(end - time.monotonic()))

    def _cut_short(self, left: float) -> list[int]:
        """What to continue in the seconds that are left: the last searches did not need them.

        Those that ran out of time, the one that knows the fewest configs first, each for a while.
        """
        cut = [place for place, search in self._searches.items() if search.timed_out]
        cut.sort(key=lambda place: len(self._searches[place].proposals.known))
        return cut[: int(max(0.0, left) // SHORTEST_SECONDS)] if cut else []

    def result(self, *, cancelled: bool) -> SessionResult:
        """The results, or the results so far, of the searches that were begun."""
        again = as_it_is_now(self.request.device) if self._is_here and not cancelled else None
        devices = [self._device, *filter(None, [again])]
        return SessionResult(
            device=max(devices, key=lambda device: device.memory_bandwidth),
            provenance=self.provenance,
            problems=self.request.problems,
            results=[each.result() for each in self._searches.values()],
            cancelled=cancelled,
        )

    @property
    def _is_here(self) -> bool:
        return self.request.fleet is None or not self.request.fleet.elsewhere

    def _compilers(self) -> WorkerPool:
        """An empty pool if the workers that measure also compile."""
        fleet = self.request.fleet
        return WorkerPool(here(self.request.jobs) if fleet is None else fleet.compilers or ())

    def _measurers(self, display: Display) -> WorkerPool:
        """A single worker needs no check; of several, the muster says which ones measure."""
        fleet = self.request.fleet
        places = here(1) if fleet is None else fleet.places
        alone = not callable(places) and len(places) == 1
        return WorkerPool(places, display.note, admits=alone)

    def _reference(self) -> Task:
        """The task by which workers are compared: the default config of the first problem."""
        problem, device = self.request.problems[0], self.request.device
        candidate = Candidate(problem, default_config(problem, device), device)
        sources = () if self._is_here else (candidate.source,)
        return Task(
            kind="compare", candidates=(candidate,), seed=self.request.seed, sources=sources
        )

    def _search(
        self, place: int, timeout_s: float | None, sharers: Sequence[Any], display: Display
    ) -> Steps[None]:
        space = self._spaces[place]
        with closing(self._evaluator(space.problem, sharers)) as evaluator:
            search = Search(
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
            self._searches[place] = search
            yield from search.steps()

    def _evaluator(self, problem: Problem, sharers: Sequence[Any]) -> Evaluator:
        compilers, measurers = self.pools
        if self.provenance is Provenance.PREDICTED:
            return PredictingEvaluator(problem, self.request.device, compilers)
        return MeasuringEvaluator(
            problem,
            self.request.device,
            compilers if compilers.size else None,
            measurers,
            seed=self.request.seed,
            elsewhere=not self._is_here,
            energy=self.request.objective.needs_energy,
            sharers=lambda: len(sharers),
        )

    def _near(self) -> list[Record]:
        """Winners on this device: the user's, those of added tables, those that ship.

        A problem's own winner is the nearest. A table's winner is not trusted without measuring:
        it may have been measured with other tools.
        """
        name = self.request.device.name
        found = [self.store.best(name, other) for other in self.store.problems(name)]
        table = prebuilt_table(name)
        shipped = table.records if table else ()
        added = [
            each for each in added_tables().of(name) if each.measurement.outcome is Outcome.OK
        ]
        return [*(record for record in found if record), *added, *shipped]


def side_by_side(sessions: Sequence[Session], display: Display) -> list[SessionResult]:
    """Run sessions concurrently to their end; Ctrl-C ends them with their results so far."""
    session_of = {session.steps(display): session for session in sessions}
    under_way, cancelled = list(session_of), False
    try:
        while under_way:
            for seconds in in_turns(under_way):
                rest([pool for each in under_way for pool in session_of[each].pools], seconds)
    except KeyboardInterrupt:
        cancelled = True
    finally:
        for steps in session_of:
            steps.close()
    return [session.result(cancelled=cancelled) for session in sessions]


def in_turns(under_way: list[Steps[None]]) -> Steps[None]:
    """Advance each by one step; those that ended are removed from the list.

    Replies are read before a step if that was long ago, but workers are waited for only at the
    end, if all wait for them.
    """
    wait, read = math.inf, time.monotonic()
    for each in list(under_way):
        if time.monotonic() > read + UNREAD_SECONDS:
            yield 0.0
            read = time.monotonic()
        seconds = next(each, None)
        if seconds is None:
            under_way.remove(each)
            wait = 0.0
        else:
            wait = min(wait, seconds)
    if under_way:
        yield wait


def _check_count(name: str, value: Any, allowed: range) -> None:
    if type(value) is not int or value not in allowed:
        raise FlashtuneError(
            f"{name} must be a whole number from {allowed[0]} to {allowed[-1]}, not {value!r}"
        )


def _evaluated(request: SearchRequest) -> tuple[Provenance, Toolchain]:
    """Whether the request is measured or predicted, and with which tools."""
    if request.fleet is not None:
        return Provenance.MEASURED, request.fleet.toolchain
    found = toolchain(request.device)
    if request.device.name in {each.name for each in devices_here()}:
        return Provenance.MEASURED, found
    return Provenance.PREDICTED, Toolchain(triton=found.triton)


def _check_energy(request: SearchRequest, provenance: Provenance) -> None:
    """Raise FlashtuneError if energy counts and is known here not to be measurable."""
    if not request.objective.needs_energy:
        return
    if provenance is Provenance.PREDICTED:
        raise FlashtuneError(
            f"energy can only be measured, not predicted: search on {request.device.name} "
            "itself, or use the objective time"
        )
    if request.fleet is None or not request.fleet.elsewhere:
        target = target_of(request.device)
        with target.energy(torch.device(target.torch_device)):
            pass


def _left_out(request: SearchRequest, provenance: Provenance) -> dict[str, str]:
    """The plans that would run on the device but cannot be searched, each with the reason.

    Remote machines report themselves what they can build.
    """
    found: dict[str, str | None] = {}
    for name, plan in plans_of(request.device).items():
        if provenance is Provenance.PREDICTED and name not in PLAN_STAGES:
            found[name] = f"times of plan {name} cannot be predicted: search on the machine itself"
        elif request.fleet is None or not request.fleet.elsewhere:
            found[name] = target_of(request.device).why_missing(plan)
    return {name: why for name, why in found.items() if why and _would_run(name, request)}


def _would_run(plan: str, request: SearchRequest) -> bool:
    """Whether a plan has a valid config for any of the problems."""
    spaces = (Space(problem, request.device, {"plan": plan}) for problem in request.problems)
    return any(next(space.configs(), None) for space in spaces)
