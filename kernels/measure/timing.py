"""How long a step takes under decode conditions: cold weights, behind another kernel, median.

Usage:
    timer = BehindTimer(step, workload)     # CUDA graphs; WallTimer for steps on the CPU
    timer.sample(20)          # microseconds a call, one value a replay
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flashtune.kernels.epilogues.epilogue import new_out
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.weights import Step
from flashtune.tuning_db.problem import Problem

CALLS_PER_REPLAY = 20
CALLS_PER_PASS = 8


def timer_bytes(problem: Problem) -> int:
    """About how many bytes of its device's memory a timer takes: outputs for a replay's calls."""
    return CALLS_PER_REPLAY * new_out(problem, torch.device("meta")).nbytes


class Timer(Protocol):
    """A step prepared for repeated timing; a sample is `calls` calls."""

    calls: int

    def sample(self, replays: int) -> list[float]:
        """That many samples, each in microseconds a call."""


class _Graph:
    """A CUDA graph of so many calls, and its replays' times.

    Keeps `run` alive, and so must that the tensors which the graph reads and writes: a graph does
    not. Lets exceptions of a call during capture through.
    """

    def __init__(self, run: Callable[[int], None], calls: int) -> None:
        """Run the first call once, then capture all of them, given their number."""
        self._calls, self._run = calls, run
        run(0)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a collection in a capture can unload modules
        try:
            # What other threads do meanwhile must not fail: a race is held beside a live model.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                for call in range(calls):
                    run(call)
        finally:
            if collecting:
                gc.enable()
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self, replays: int) -> list[float]:
        """Microseconds a call, one value a replay."""
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2 * replays)
        ]
        for start, end in zip(events[::2], events[1::2], strict=True):
            start.record()
            self._graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [
            start.elapsed_time(end) * 1e3 / self._calls
            for start, end in zip(events[::2], events[1::2], strict=True)
        ]


class GraphTimer:
    """Steps over rotating weights that follow one another in a graph.

    A step may begin before the one before it has ended, which no decode lets it do: for parts of a
    step, and for comparisons with a BehindTimer. Lets exceptions of the step through.
    """

    def __init__(self, step: Step, workload: Workload) -> None:
        """Run the step once, then capture it over every set of weights."""
        sets, states = workload.sets, workload.states
        self.calls = calls = _calls_of(workload)
        self.out = out = _outs(workload, calls)

        def run(call: int) -> None:
            index = call % len(sets)
            step(sets[index], states[index], out[call])

        self._graph = _Graph(run, calls)

    def sample(self, replays: int) -> list[float]:
        """Microseconds a call, one value a replay."""
        return self._graph.sample(replays)


class BehindTimer:
    """Steps over rotating weights, each behind a kernel that writes its hidden state.

    This is how decode runs a step: behind the model's last norm, which lets nothing begin before
    it has ended. The kernel's own time is taken off: a sample is that of a graph with steps less
    the median of a graph without, replayed in turn with it. Lets exceptions of the step through.
    """

    def __init__(self, step: Step, workload: Workload) -> None:
        """Run the step once, then capture it over every set of weights."""
        sets, states = workload.sets, workload.states
        self.calls = calls = _calls_of(workload)
        self.out = out = _outs(workload, calls)
        hidden = torch.empty_like(states[0])

        def lead(call: int) -> None:
            torch.mul(states[call % len(sets)], 1.0, out=hidden)

        def run(call: int) -> None:
            lead(call)
            step(sets[call % len(sets)], hidden, out[call])

        self._whole, self._lead = _Graph(run, calls), _Graph(lead, calls)

    def sample(self, replays: int) -> list[float]:
        """Microseconds a call, one value a replay."""
        lead = statistics.median(self._lead.sample(replays))
        return [sample - lead for sample in self._whole.sample(replays)]


def _outs(workload: Workload, calls: int) -> list[torch.Tensor]:
    """An output for each call of a graph."""
    return [new_out(workload.problem, torch.device("cuda")) for _ in range(calls)]


def _calls_of(workload: Workload) -> int:
    """How many calls a graph has: as many on each set of weights."""
    n_sets = len(workload.sets)
    return -(-CALLS_PER_REPLAY // n_sets) * n_sets


class WallTimer:
    """Steps over rotating weights, one after the other, by wall-clock time.

    For steps that are done when they return.
    """

    def __init__(self, step: Step, workload: Workload) -> None:
        """Run the step once on every set of weights."""
        self._step, self._workload = step, workload
        n_sets = len(workload.sets)
        self.calls = -(-CALLS_PER_PASS // n_sets) * n_sets
        self.out = new_out(workload.problem, torch.device("cpu"))
        self._run(n_sets)

    def sample(self, replays: int) -> list[float]:
        """Microseconds a call, one value a pass."""
        samples = []
        for _ in range(replays):
            start = time.perf_counter()
            self._run(self.calls)
            samples.append((time.perf_counter() - start) * 1e6 / self.calls)
        return samples

    def _run(self, calls: int) -> None:
        sets, states = self._workload.sets, self._workload.states
        for call in range(calls):
            index = call % len(sets)
            self._step(sets[index], states[index], self.out)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and spread (10th to 90th percentile) of samples, in µs per call."""

    median_us: float
    spread_us: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarise at least two samples."""
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), tenths[8] - tenths[0], len(samples))


def interleaved(timers: Sequence[Timer], rounds: int, replays: int = 5) -> list[list[float]]:
    """Samples of each timer, taken in turns so that a drifting clock favours none."""
    samples: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, own in zip(timers, samples, strict=True):
            own.extend(timer.sample(replays))
    return samples
