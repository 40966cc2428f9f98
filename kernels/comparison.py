"""Several configs compiled, verified and timed side by side in this process, on a head's weights.

Usage:
    comparison = compare(problem, weights, device, [default, *others], seconds=20.0)
    for entry in comparison.entries:
        entry.config, entry.measurement, entry.why

All are compiled first, some at a time: none is begun after half of the time, and those begun are
given up when a fifth of it is left. Then each is verified against float64 before it is timed, and
those that are not far behind take turns, in two seconds.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from flashtune.kernels.backend import backend_of
from flashtune.kernels.config import Config, slack_of
from flashtune.kernels.layout import Step, Weights
from flashtune.kernels.room import free_bytes
from flashtune.kernels.timing import Timer, Timing
from flashtune.kernels.workload import Workload
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
_LOST = "the device was lost before its turn came"
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
        weights, problem, device.l2_bytes, free_bytes=free_bytes(where), seed=time.time_ns()
    )
    compiled = _compile(problem, configs, device, where, seconds)
    begun = time.monotonic()
    heat = _Heat(device, workload, min(begun + RUN_SECONDS, start + seconds))
    try:
        for config in configs:
            heat.admit(config, compiled[config], note)
        heat.take_turns(configs[0])
    finally:
        note(None)
    return Comparison(
        entries=tuple(
            heat.entries.get(config, Entry(config=config, why=_LOST)) for config in configs
        ),
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
    load = backend_of(device).loader
    pool = ThreadPoolExecutor(min(COMPILERS, len(os.sched_getaffinity(0))))
    futures = {config: pool.submit(load, problem, config, device, where) for config in configs}
    wait(futures.values(), timeout=BEGIN_SHARE * seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    left = start + COMPILE_SHARE * seconds - time.monotonic()
    wait(futures.values(), timeout=max(0.0, left))
    return futures


class _Heat:
    """Configs that run one after another, then in turns, until a time is up."""

    def __init__(self, device: Device, workload: Workload, end: float) -> None:
        """`end` is on the clock of time.monotonic."""
        self.entries: dict[Config, Entry] = {}
        self.lost = False
        self._backend, self._workload = backend_of(device), workload
        self._end = end
        self._admit_until = (time.monotonic() + end) / 2
        self._timers: dict[Config, Timer] = {}
        self._samples: dict[Config, list[float]] = {}

    def admit(
        self, config: Config, compiled: "Future[Load]", note: Callable[[Config | None], None]
    ) -> None:
        """Verify a config and take its first samples, if its turn comes at all."""
        why = self._why_out(compiled)
        if why:
            self.entries[config] = Entry(config=config, why=why)
            return
        refusal = compiled.exception()
        if refusal is not None:
            self._fail(config, Outcome.COMPILE_ERROR, refusal)
            return
        note(config)
        try:
            step = compiled.result()()
            wrong = self._workload.why_wrong(step, slack_of(config))
            if wrong:
                self._fail(config, Outcome.WRONG_RESULT, wrong)
                return
            timer = self._backend.timer(step, self._workload)
            self._samples[config] = timer.sample(FIRST_SAMPLES)
            self._timers[config] = timer
        except Exception as error:  # drivers raise whatever they like
            self._fail(config, Outcome.CRASH, error)

    def take_turns(self, first: Config) -> None:
        """Time `first` and those not far behind in turns, so that a drifting clock favours none.

        First samples count only for those that take no turns.
        """
        limit = FAR_BEHIND * min(map(min, self._samples.values()), default=0.0)
        for config, samples in self._samples.items():
            if config != first and min(samples) > limit:
                del self._timers[config]
                self._enter(config, Outcome.PRUNED)
        for config in self._timers:
            self._samples[config] = []
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > self._end:
                break
            for config, timer in list(self._timers.items()):
                try:
                    self._samples[config] += timer.sample(1)
                except Exception as error:
                    self._timers.pop(config, None)
                    self._fail(config, Outcome.CRASH, error)
        for config in self._timers:
            self._enter(config, Outcome.OK)

    def _why_out(self, compiled: "Future[Load]") -> str:
        if self.lost:
            return _LOST
        if not compiled.done() or compiled.cancelled():
            return "it was not compiled in time"
        if len(self._timers) >= LEAST_RUNNERS and time.monotonic() > self._admit_until:
            return "there was no time to run it"
        return ""

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
                self._timers.clear()
        measurement = Measurement(
            outcome=outcome, error=" ".join(text.split())[:500], policy=RACE_POLICY
        )
        self.entries[config] = Entry(config=config, measurement=measurement)
