"""A tiny problem, a device that is not here, and spaces and records to search them with."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashtune.kernels.config import Config, config_data, default_config, enabled, knobs
from flashtune.tuner.space import Space
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.store import Store

TOOLCHAIN = Toolchain(triton="3.6.0")
FreeSpace = Callable[..., Space]
Recorded = Callable[..., Record]


@pytest.fixture(scope="session")
def problem() -> Problem:
    return Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)


@pytest.fixture(scope="session")
def device() -> Device:
    return find_device("orin")


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return TOOLCHAIN


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "tuning.db") as store:
        yield store


@pytest.fixture(scope="session")
def free_space(problem: Problem, device: Device) -> FreeSpace:
    """A space around the default with these knobs alone free: `free_space("slack", "evict")`."""

    def make(*free: str, problem: Problem = problem, device: Device = device) -> Space:
        default = default_config(problem, device)
        data = config_data(default)
        fixed = {
            name: data[name]
            for name in ("plan", *knobs(type(default)))
            if name not in free and (name == "plan" or enabled(type(default), name, data))
        }
        return Space(problem, device, fixed)

    return make


@pytest.fixture(scope="session")
def recorded(problem: Problem, device: Device) -> Recorded:
    """A record of a config: `recorded(config, 12.0)`; a time of None is a failure."""

    def make(
        config: Config,
        time_us: float | None,
        problem: Problem = problem,
        device: str = device.name,
        **changes: object,
    ) -> Record:
        measurement = Measurement(
            outcome=Outcome.CRASH if time_us is None else Outcome.OK,
            median_us=time_us,
            error="illegal access" if time_us is None else "",
        )
        values = {
            "device": device,
            "toolchain": TOOLCHAIN,
            "problem": problem,
            "config": config_data(config),
            "provenance": Provenance.MEASURED,
            "measurement": measurement,
            "created": "2026-01-31T12:00:00Z",
        }
        return Record(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def faulty_script() -> Path:
    """A worker with a pretended backend, which misbehaves by config."""
    return Path(__file__).with_name("faulty_worker.py")


@pytest.fixture(scope="session")
def faulty(faulty_script: Path) -> ModuleType:
    """The pretended backend, in this process."""
    spec = importlib.util.spec_from_file_location("faulty_worker", faulty_script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
