"""Steps put on trial: verified, sampled first, dropped if far behind, then timed in turns.

Usage:
    trial = Trial(workload, backend.timer, policy="race")
    for config in configs:
        trial.load(config, load)              # load() gives the step
        trial.admit(config, slack=16)
    trial.drop_slower_than(FAR_BEHIND * trial.fastest_us, spared=(default,))
    trial.take_turns(rounds=20)
    trial.finish()                            # a Measurement for each config
    trial.unload()                            # if none of them is to run again

One mechanism for a search, for the race at first load and for `flashtune quality`, so that a
time means the same and an error has the same outcome in all of them. Any key identifies an
entrant: a config, a name. An entrant's failure becomes its measurement and ends its trial; the
others go on, unless the device was lost.
"""

import math
import time
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from flashtune.kernels.measure.energy import joules_a_call
from flashtune.kernels.measure.failure import WrongResultError, failure
from flashtune.kernels.measure.timing import Timer, Timing
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.weights import Step, Unloadable
from flashtune.tuning_db.record import Measurement, Outcome

FIRST_SAMPLES = 2
FAR_BEHIND = 1.3  # times the best; a step that is slower at its first samples is timed no further

Entrant = TypeVar("Entrant", bound=Hashable)
MakeTimer = Callable[[Step, Workload], Timer]


class Trial(Generic[Entrant]):
    """The entrants of one workload. Not for use from several threads.

    `lost`: the device no longer answers. Nothing can run on it in this process, and entrants that
    were not finished before that get no measurement.
    """

    def __init__(self, workload: Workload, make_timer: MakeTimer, policy: str) -> None:
        """Nothing runs yet. policy: of the measurements, see Measurement."""
        self.lost = False
        self._workload, self._make_timer, self._policy = workload, make_timer, policy
        self._steps: dict[Entrant, Step] = {}
        self._timers: dict[Entrant, Timer] = {}
        self._samples: dict[Entrant, list[float]] = {}
        self._joules: dict[Entrant, float] = {}
        self._ended: dict[Entrant, Measurement] = {}

    @property
    def loaded(self) -> Collection[Entrant]:
        """Those whose step was loaded."""
        return self._steps.keys()

    @property
    def running(self) -> Collection[Entrant]:
        """Those that were admitted, and neither failed nor were dropped since."""
        return self._timers.keys()

    @property
    def fastest_us(self) -> float:
        """The best sample of any that is running; infinite where none is."""
        return min((min(self._samples[each]) for each in self._timers), default=math.inf)

    def load(self, entrant: Entrant, load: Callable[[], Step]) -> None:
        """Make an entrant's step. Compiler errors may appear only now."""
        try:
            self._steps[entrant] = load()
        except Exception as error:  # compilers and drivers raise exceptions of any type
            self._ended[entrant] = failure(error, Outcome.COMPILE_ERROR, self._policy)

    def admit(self, entrant: Entrant, slack: int, *, tensor_cores: bool = False) -> None:
        """Verify an entrant that was loaded, and take its first samples.

        slack: how many clusters its step may probe beyond those that must be. tensor_cores:
        whether they multiply.
        """
        step = self._steps.get(entrant)
        if step is None or self.lost:
            return
        try:
            reason = self._workload.why_wrong(step, slack, tensor_cores=tensor_cores)
            if reason:
                raise WrongResultError(reason)
            timer = self._make_timer(step, self._workload)
            self._samples[entrant] = timer.sample(FIRST_SAMPLES)
            self._timers[entrant] = timer
        except Exception as error:
            self._fail(entrant, error)

    def drop_slower_than(self, limit_us: float, spared: Collection[Entrant] = ()) -> None:
        """End, as PRUNED, those whose first samples are all above the limit."""
        for entrant in list(self._timers):
            if entrant not in spared and min(self._samples[entrant]) > limit_us:
                del self._timers[entrant]
                self._ended[entrant] = self._measured(entrant, Outcome.PRUNED)

    def take_turns(
        self, rounds: int, replays: int = 1, *, least: int = 1, until: float = math.inf
    ) -> None:
        """Time those that are running in turns, so that a drifting clock favours none.

        First samples do not count. Each round takes that many replays of each; it takes two for
        a measurement. After `least` rounds none is begun later than `until`, on the clock of
        time.monotonic.
        """
        for entrant in self._timers:
            self._samples[entrant] = []
        for number in range(rounds):
            if number >= least and time.monotonic() > until:
                break
            for entrant in list(self._timers):
                if self.lost:
                    return
                try:
                    self._samples[entrant] += self._timers[entrant].sample(replays)
                except Exception as error:
                    del self._timers[entrant]
                    self._fail(entrant, error)

    def meter(self, joules: Callable[[], float]) -> None:
        """Measure the energy of a call for each running entrant, one after another."""
        for entrant in list(self._timers):
            if self.lost:
                return
            try:
                self._joules[entrant] = joules_a_call(self._timers[entrant], joules)
            except Exception as error:
                del self._timers[entrant]
                self._fail(entrant, error)

    def finish(self) -> dict[Entrant, Measurement]:
        """The measurement of each entrant; entrants without a known outcome are missing."""
        if not self.lost:
            for entrant in self._timers:
                self._ended[entrant] = self._measured(entrant, Outcome.OK)
        return dict(self._ended)

    def unload(self) -> None:
        """Give up the timers, and unload what was loaded for steps: none of them runs again.

        On a lost device nothing can be unloaded.
        """
        self._timers.clear()
        steps: list[object] = list(self._steps.values())
        self._steps.clear()
        if self.lost:
            return
        with suppress(Exception):  # of a driver: then it stays loaded
            if self._workload.sets[0].weight.is_cuda:
                torch.cuda.synchronize()
            for step in steps:
                if isinstance(step, Unloadable):
                    step.unload()

    def _measured(self, entrant: Entrant, outcome: Outcome) -> Measurement:
        timing = Timing.of(self._samples[entrant])
        return Measurement(
            outcome=outcome,
            median_us=timing.median_us,
            spread_us=timing.spread_us,
            samples=timing.samples,
            policy=self._policy,
            joules=self._joules.get(entrant),
        )

    def _fail(self, entrant: Entrant, error: Exception) -> None:
        self._ended[entrant] = failure(error, Outcome.CRASH, self._policy)
        if self._workload.sets[0].weight.is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access stays with the process
                self.lost = True
