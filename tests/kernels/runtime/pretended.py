"""A pretended CPU whose configs take the times they are told to; as a script, one racing process.

    python pretended.py DATABASE TIMES     # waits for a line, then prints head.explain() as JSON

TIMES is JSON: what becomes of configs by their `parts`, see `Backend`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashtune.kernels import head
from flashtune.kernels.backends.target import default_config
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.plans.cpp_fused import CppFusedConfig
from flashtune.kernels.runtime import binding, heat
from flashtune.kernels.runtime.binding import TorchStep
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

CPU = Device(
    name="pretended-cpu",
    title="Pretended",
    vendor="cpu",
    arch="x86_64-avx2",
    sm_count=2,
    memory_bandwidth=0.0,
    l2_bytes=2**16,
    clock_hz=0.0,
    source="this test",
)
PROBLEM = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
TOOLS = Toolchain(compiler="pretended 1.0")
DEFAULT = default_config(PROBLEM, CPU)
assert isinstance(DEFAULT, CppFusedConfig)


def config(parts: int) -> CppFusedConfig:
    """A valid config, told apart by its parts; the default has 16."""
    return replace(DEFAULT, parts=parts)


def record(parts: int, median_us: float, **changes: Any) -> Record:
    """A record of a config, predicted for the pretended CPU unless told otherwise."""
    values: dict[str, Any] = {
        "device": CPU.name,
        "toolchain": TOOLS,
        "problem": PROBLEM,
        "config": config_data(config(parts)),
        "provenance": Provenance.PREDICTED,
        "measurement": Measurement(outcome=Outcome.OK, median_us=median_us),
        "created": "2026-01-31T12:00:00Z",
    }
    return Record(**{**values, **changes})


class Timer:
    """Always takes the same time."""

    def __init__(self, time_us: float) -> None:
        self._time_us = time_us

    def sample(self, replays: int) -> list[float]:
        return [self._time_us] * replays


class Loaded:
    """A step that can be unloaded, as one of a GPU."""

    def __init__(self, step: Step, backend: "Backend") -> None:
        self._step, self._backend = step, backend

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self._step(weights, hidden, out)

    def unload(self) -> None:
        self._backend.unloaded += 1


class Backend:
    """Configs take `times[parts]` microseconds, 10 unless told.

    Other fates, as text: `broken` does not compile, `slow` takes long to; once run, `wrong`
    answers 0, `raises` does, `hangs` says so on standard output and waits.
    """

    times_alone = True

    def __init__(self, times: dict[int, float | str]) -> None:
        self.times = times
        self.compiled: list[int] = []
        self.loads = self.unloaded = 0
        self._loaded: dict[Step, int] = {}

    def loader(self, candidate: Candidate, *_: object) -> Callable[[], Step]:
        problem, config = candidate.problem, candidate.config
        parts = getattr(config, "parts", DEFAULT.parts)  # of the other plan: none
        fate = self.times.get(parts, 10.0)
        self.compiled.append(parts)
        if fate == "broken":
            raise RuntimeError("the compiler fell over")
        if fate == "slow":
            time.sleep(2.0)

        def step(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            if fate == "raises":
                raise RuntimeError("a fault on the device")
            if fate == "hangs":
                print("hanging", flush=True)
                time.sleep(600)
            TorchStep(problem)(weights, hidden, out)
            if fate == "wrong":
                out.zero_()

        def load() -> Step:
            own = Loaded(step, self)
            self._loaded[own] = parts
            self.loads += 1
            return own

        return load

    def timer(self, step: Step, workload: Workload) -> Timer:
        time_us = self.times.get(self._loaded[step], 10.0)
        assert isinstance(time_us, float)
        return Timer(time_us)


def places(backend: Backend) -> list[tuple[object, str, object]]:
    """What to set where, so that heads run on the pretended CPU."""
    return [
        (binding, "device_of", lambda _: CPU),
        (head, "device_of", lambda _: CPU),
        (binding, "toolchain", lambda _: TOOLS),
        (binding, "backend_of", lambda _: backend),
        (heat, "backend_of", lambda _: backend),
        (heat, "target_of", lambda _: backend),
    ]


def make_head(**options: Any) -> FlashHead:
    """A head of the problem, always the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    centroids = torch.nn.functional.normalize(torch.randn(32, 64, generator=generator))
    order = torch.randperm(512, generator=generator)
    return FlashHead(weight, centroids.bfloat16(), order // 16, n_probes=4, **options)


def main(database: Path, times: dict[int, float | str]) -> None:
    """Make a head once a line comes, and say what it runs."""
    os.environ["FLASHTUNE_DB"] = str(database)
    for module, name, value in places(Backend(times)):
        setattr(module, name, value)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(make_head().explain()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), {int(k): v for k, v in json.loads(sys.argv[2]).items()})
