"""Several configs compiled, verified and timed side by side in this process, on a head's weights.

Usage:
    comparison = compare(problem, weights, device, [default, *others], seconds=20.0)
    for entry in comparison.entries:
        entry.config, entry.measurement, entry.why

All are compiled first, some at a time, and loaded: no compilation starts after half of the time,
and those running are ended when a fifth of it is left. Then each is verified against float64
before it is timed, and those that are not far behind take turns (measure/trial.py), in two
seconds. The peak memory is logged before it is allocated; the modules are unloaded at the end.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from flashtune.kernels.backends.target import backend_of, policy_for, target_of
from flashtune.kernels.measure.memory import free_bytes, scratch_bytes
from flashtune.kernels.measure.timing import timer_bytes
from flashtune.kernels.measure.trial import FAR_BEHIND, Trial
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.runtime.compilers import Compilers
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.policy import RACE
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement

LOG = logging.getLogger("flashtune")
BEGIN_SHARE, COMPILE_SHARE = 0.5, 0.8  # of the time: when to stop starting, and to stop waiting
RUN_SECONDS = 2.0  # of verifying and timing, at most half of it before turns are taken
COMPILERS = 4  # threads; the greater part of a compiler's work is done by other processes
ROUNDS, LEAST_ROUNDS = 20, 3
LEAST_RUNNERS = 3  # that run even if that takes longer

Load = Callable[[], Step]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The outcome of one config. If its turn did not come, only `why` is set, and says so."""

    config: Config
    measurement: Measurement | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The outcome of each config, in the order given, on cold centroids or not.

    most_bytes: peak bytes of the device's memory. device_lost: the device no longer answers;
    nothing can run on it in this process.
    """

    entries: tuple[Entry, ...]
    is_cold: bool
    most_bytes: int
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

    note: called with each config before it first runs, and with None at the end. Raises
    FlashtuneError if there is not enough memory to verify anything.
    """
    start = time.monotonic()
    where = weights.weight.device
    room = free_bytes(where)
    workload = Workload.around(
        weights,
        problem,
        device.l2_bytes,
        free_bytes=room,
        step_bytes=len(configs) * (timer_bytes(problem) + scratch_bytes(problem)),
        seed=time.time_ns(),
    )
    LOG.info(
        "a race takes up to %.0f MiB of the %.0f MiB that are free on %s",
        workload.most_bytes / 2**20,
        room / 2**20,
        where,
    )
    trial: Trial[Config] = Trial(workload, target_of(device).timer, policy_for(RACE, device))
    compiled = _compile(problem, configs, device, where, seconds)
    missed = _load(trial, configs, compiled, until=start + COMPILE_SHARE * seconds)
    begun = time.monotonic()
    end = min(begun + RUN_SECONDS, start + seconds)
    try:
        for config in configs:
            note(config)
            why_not = _why_not(trial, until=(begun + end) / 2)
            if config in trial.loaded and why_not:
                missed[config] = why_not
            else:
                trial.admit(config, **PLANS[config.plan].leeway(config))
        trial.drop_slower_than(FAR_BEHIND * trial.fastest_us, spared=configs[:1])
        trial.take_turns(ROUNDS, least=LEAST_ROUNDS, until=end)
    finally:
        note(None)
    found = trial.finish()
    trial.unload()
    lost = "the device was lost while it was timed"
    return Comparison(
        entries=tuple(
            Entry(config=config, measurement=found[config])
            if config in found
            else Entry(config=config, why=missed.get(config, lost))
            for config in configs
        ),
        is_cold=workload.is_cold,
        most_bytes=workload.most_bytes,
        compile_s=begun - start,
        run_s=time.monotonic() - begun,
        device_lost=trial.lost,
    )


def _compile(
    problem: Problem,
    configs: Sequence[Config],
    device: Device,
    where: torch.device,
    seconds: float,
) -> "dict[Config, Future[Load]]":
    """Compile everything before anything is timed; returns what was compiled."""
    start = time.monotonic()
    compilers = Compilers(min(COMPILERS, len(os.sched_getaffinity(0))))
    futures = {}
    try:
        for config in configs:
            candidate = Candidate(problem, config, device)
            compile_it = partial(backend_of(candidate).loader, candidate, where)
            futures[config] = compilers.submit(compile_it)
        compilers.wait(BEGIN_SHARE * seconds)
        compilers.cancel()
        compilers.wait(max(0.0, start + COMPILE_SHARE * seconds - time.monotonic()))
        return {
            config: future
            for config, future in futures.items()
            if future.done() and not future.cancelled()
        }
    finally:  # after Ctrl-C, too
        compilers.end()


def _load(
    trial: Trial[Config],
    configs: Sequence[Config],
    compiled: "dict[Config, Future[Load]]",
    until: float,
) -> dict[Config, str]:
    """Load what was compiled, a few even after `until`; returns why the others were not."""
    missed = {}
    for config in configs:
        late = len(trial.loaded) >= LEAST_RUNNERS and time.monotonic() > until
        if late or config not in compiled:
            missed[config] = "it was not compiled in time"
        else:
            trial.load(config, partial(_loaded, compiled[config]))
    return missed


def _loaded(compiled: "Future[Load]") -> Step:
    """The step of what was compiled; raises what the compiler raised."""
    return compiled.result()()


def _why_not(trial: Trial[Config], until: float) -> str:
    """Why no other config may run, or None. A few may run however late it is."""
    if trial.lost:
        return "the device was lost before its turn came"
    if len(trial.running) >= LEAST_RUNNERS and time.monotonic() > until:
        return "there was no time left to run it"
    return ""
