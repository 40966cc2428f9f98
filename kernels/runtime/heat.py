"""Several configs compiled, verified and timed side by side in this process, on a head's weights.

Usage:
    comparison = compare(problem, weights, device, [default, *others], seconds=20.0)
    for entry in comparison.entries:
        entry.config, entry.measurement, entry.why

All are compiled first, some at a time, and loaded: none is begun after half of the time, and those
begun are given up when a fifth of it is left. Then each is verified against float64 before it is
timed, and those that are not far behind take turns, in two seconds.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.measure.memory import free_bytes
from flashtune.kernels.measure.timing import Timer, Timing, timer_bytes
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config, slack_of
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome
from flashtune.tuning_db.store import RACE_POLICY

BEGIN_SHARE, COMPILE_SHARE = 0.5, 0.8  # of the time: when to begin, and to wait, no more
RUN_SECONDS = 2.0  # of verifying and timing, of them at most half before turns are taken
COMPILERS = 4  # threads; the greater part of a compiler's work is done by other processes
FIRST_SAMPLES = 2
FAR_BEHIND = 1.3  # times the fastest first sample: such a config takes no turns
ROUNDS, LEAST_ROUNDS = 20, 3
LEAST_RUNNERS = 3  # that run even where that takes longer
_FULL = ("too many blocks in cooperative launch", "out of memory", "out of resource")

Load = Callable[[], Step]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What became of one config. Where its turn did not come, `why` says so, and nothing else."""

    config: Config
    measurement: Measurement | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What became of each config, in the order given, on cold centroids or not.

    `device_lost`: the device answers no more; nothing can run on it in this process.
    """

    entries: tuple[Entry, ...]
    is_cold: bool
    compile_s: float
    run_s: float
    device_lost: bool = False


def compare(
    problem: Problem,
    weights: Weights,
    device: Device,
    configs: Sequence[Config],
    *,
    seconds: float,
    note: Callable[[Config | None], None] = lambda config: None,
) -> Comparison:
    """Compare configs within `seconds`. The first takes turns however slow it is.

    note: told of each config before it first runs, and None when all is over. Raises
    FlashtuneError where there is no room to verify anything.
    """
    start = time.monotonic()
    where = weights.weight.device
    workload = Workload.around(
        weights,
        problem,
        device.l2_bytes,
        free_bytes=free_bytes(where),
        timer_bytes=len(configs) * timer_bytes(problem),
        seed=time.time_ns(),
    )
    heat = _Heat(device, workload)
    compiled = _compile(problem, configs, device, where, seconds)
    for config in configs:
        heat.load(config, compiled[config], until=start + COMPILE_SHARE * seconds)
    begun = time.monotonic()
    end = min(begun + RUN_SECONDS, start + seconds)
    try:
        for config in configs:
            note(config)
            heat.admit(config, until=(begun + end) / 2)
        heat.take_turns(configs[0], until=end)
    finally:
        note(None)
    return Comparison(
        entries=tuple(heat.entries[config] for config in configs),
        is_cold=workload.is_cold,
        compile_s=begun - start,
        run_s=time.monotonic() - begun,
        device_lost=heat.lost,
    )


def _compile(
    problem: Problem,
    configs: Sequence[Config],
    device: Device,
    where: torch.device,
    seconds: float,
) -> "dict[Config, Future[Load]]":
    """Compile in threads, so that none still does, if it can be helped, while others are timed."""
    start = time.monotonic()
    pool = ThreadPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0))))
    futures = {}
    for config in configs:
        candidate = Candidate(problem, config, device)
        futures[config] = pool.submit(backend_of(candidate).loader, candidate, where)
    wait(futures.values(), timeout=BEGIN_SHARE * seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    left = start + COMPILE_SHARE * seconds - time.monotonic()
    wait(futures.values(), timeout=max(0.0, left))
    return futures


class _Heat:
    """Configs that are loaded, then run one after another, then in turns.

    Each of the three ends at a time on the clock of time.monotonic, though not before a few had
    their turn.
    """

    def __init__(self, device: Device, workload: Workload) -> None:
        """Nothing runs yet."""
        self.entries: dict[Config, Entry] = {}
        self.lost = False
        self._target, self._workload = target_of(device), workload
        self._steps: dict[Config, Step] = {}
        self._timers: dict[Config, Timer] = {}
        self._samples: dict[Config, list[float]] = {}

    def load(self, config: Config, compiled: "Future[Load]", until: float) -> None:
        """Make a config's step. Triton builds what launches a kernel only now."""
        late = len(self._steps) >= LEAST_RUNNERS and time.monotonic() > until
        if late or not compiled.done() or compiled.cancelled():
            self._pass_over(config, "it was not compiled in time")
            return
        try:
            self._steps[config] = compiled.result()()
        except Exception as error:  # compilers and drivers raise whatever they like
            self._fail(config, Outcome.COMPILE_ERROR, error)

    def admit(self, config: Config, until: float) -> None:
        """Verify a config and take its first samples."""
        if config not in self._steps:
            return
        if self.lost:
            self._pass_over(config, "the device was lost before its turn came")
            return
        if len(self._timers) >= LEAST_RUNNERS and time.monotonic() > until:
            self._pass_over(config, "there was no time to run it")
            return
        step = self._steps[config]
        try:
            wrong = self._workload.why_wrong(step, slack_of(config))
            if wrong:
                self._fail(config, Outcome.WRONG_RESULT, wrong)
                return
            timer = self._target.timer(step, self._workload)
            self._samples[config] = timer.sample(FIRST_SAMPLES)
            self._timers[config] = timer
        except Exception as error:
            self._fail(config, Outcome.CRASH, error)

    def take_turns(self, first: Config, until: float) -> None:
        """Time `first` and those not far behind in turns, so that a drifting clock favours none.

        First samples count only for those that take no turns.
        """
        limit = FAR_BEHIND * min(map(min, self._samples.values()), default=0.0)
        for config in list(self._timers):
            if config != first and min(self._samples[config]) > limit:
                del self._timers[config]
                self._enter(config, Outcome.PRUNED)
        for config in self._timers:
            self._samples[config] = []
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > until:
                break
            for config in list(self._timers):
                if self.lost:
                    break
                try:
                    self._samples[config] += self._timers[config].sample(1)
                except Exception as error:
                    del self._timers[config]
                    self._fail(config, Outcome.CRASH, error)
        for config in self._timers:
            if self.lost:
                self._pass_over(config, "the device was lost while it was timed")
            else:
                self._enter(config, Outcome.OK)

    def _pass_over(self, config: Config, why: str) -> None:
        self.entries[config] = Entry(config=config, why=why)

    def _enter(self, config: Config, outcome: Outcome) -> None:
        timing = Timing.of(self._samples[config])
        measurement = Measurement(
            outcome=outcome,
            median_us=timing.median_us,
            spread_us=timing.spread_us,
            samples=timing.samples,
            policy=RACE_POLICY,
        )
        self.entries[config] = Entry(config=config, measurement=measurement)

    def _fail(self, config: Config, outcome: Outcome, error: BaseException | str) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if any(words in text.lower() for words in _FULL):
            outcome = Outcome.OUT_OF_RESOURCES
        if outcome is Outcome.CRASH and self._workload.sets[0].weight.is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access stays with the process
                self.lost = True
        measurement = Measurement(
            outcome=outcome, error=" ".join(text.split())[:500], policy=RACE_POLICY
        )
        self.entries[config] = Entry(config=config, measurement=measurement)
