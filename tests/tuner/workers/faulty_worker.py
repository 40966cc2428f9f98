"""A worker on a CPU whose backend is pretended: a config's knobs say how it goes wrong.

python faulty_worker.py < tasks > replies
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from flashtune.kernels.backends.torch import decode
from flashtune.kernels.measure.failure import DoesNotFitError
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.weights import Weights
from flashtune.tuner.workers import worker

FAULTS = {
    (2, 0): "compiler_dies",
    (2, 8): "segfault",
    (2, 32): "syntax",
    (2, 64): "hang",
    (4, 0): "wrong",
    (4, 8): "does_not_fit",
    (4, 32): "out_of_memory",
    (4, 64): "prints",
    (8, 0): "illegal_access",
    (8, 8): "cooperative",
    (8, 32): "slow",
    (16, 32): "flaky",
}
FASTEST = (16, 64)


def place(config: Config) -> tuple[int, int]:
    """The two knobs that say what a config does."""
    assert isinstance(config, StagedConfig)
    return config.score_programs_per_sm, config.slack


def fault(config: Config) -> str:
    """What is wrong with a config, empty where nothing is."""
    return FAULTS.get(place(config), "")


def time_of(config: Config) -> float:
    """The time that a config is pretended to take, in microseconds."""
    programs, slack = place(config)
    return 1000.0 if fault(config) == "slow" else 50 - programs - slack / 8


class PretendedStep:
    """Plain torch, or what its config does instead."""

    def __init__(self, config: Config, times_loaded: int) -> None:
        self.config, self._again = config, times_loaded > 1

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        wrong = fault(self.config)
        if wrong == "segfault":
            print("the last word", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if wrong == "hang":
            time.sleep(600)
        if wrong == "illegal_access":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if wrong == "cooperative":
            raise RuntimeError("too many blocks in cooperative launch")
        if wrong == "out_of_memory":
            raise torch.OutOfMemoryError("tried to allocate 3 TiB")
        if wrong == "prints":
            print('{"measurements": [], "uses": [], "fatal": true}', flush=True)
            os.write(1, b"noise of a compiled library\n")
        out.copy_(decode(weights, hidden, 4))
        if wrong == "wrong" or (wrong == "flaky" and self._again):
            out.add_(1).remainder_(512)


class PretendedTimer:
    """Gives the pretended time, now a little less, now a little more."""

    def __init__(self, time_us: float) -> None:
        self.time_us = time_us

    def sample(self, replays: int) -> list[float]:
        return [self.time_us + 0.01 * (number % 3 - 1) for number in range(replays)]


class PretendedBackend:
    """A backend with no kernels."""

    name = "pretended"
    torch_device = "cpu"

    def __init__(self) -> None:
        self._loaded: Counter[Config] = Counter()

    def _load(self, config: Config) -> PretendedStep:
        self._loaded[config] += 1
        return PretendedStep(config, self._loaded[config])

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
        if fault(candidate.config) == "compiler_dies":
            os._exit(3)
        if fault(candidate.config) == "does_not_fit":
            raise DoesNotFitError("300 KiB of shared memory, of 163")
        source = "def step(:" if fault(candidate.config) == "syntax" else "step = None"
        compile(source, "candidate.py", "exec")
        return [KernelUse(kernel="step", programs=1, warps=4, registers=32, shared_bytes=0)]

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None
    ) -> Callable[[], PretendedStep]:
        self.compile(candidate)
        return lambda: self._load(candidate.config)

    def timer(self, step: PretendedStep, workload: Workload) -> PretendedTimer:
        return PretendedTimer(time_of(step.config))


if __name__ == "__main__":
    backend = PretendedBackend()
    worker.backend_of = lambda candidate: backend  # type: ignore[assignment]
    worker.target_of = lambda device: backend  # type: ignore[assignment]
    torch.set_num_threads(1)
    worker.main(worker.Worker())
