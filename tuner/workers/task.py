"""What is asked of a worker process and what it answers: one JSON line each.

Usage:
    line = Task(kind="measure", candidates=(candidate,)).to_json()
    task = Task.from_json(line)
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.config import config_data, parse_config
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One request. `compile` and `measure` are about one candidate, `compare` about several.

    All candidates are of one problem and device. seed: of the workload. best_us: the best time so
    far; a config far behind it is pruned. sources: what each candidate renders to, for a worker
    that has no templates.
    """

    kind: str
    candidates: tuple[Candidate, ...]
    seed: int = 0
    best_us: float | None = None
    sources: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """The candidates' problem."""
        return self.candidates[0].problem

    @property
    def device(self) -> Device:
        """The candidates' device."""
        return self.candidates[0].device

    def to_json(self) -> str:
        """One line, without its end."""
        data = {
            "kind": self.kind,
            "problem": self.problem.data(),
            "configs": [config_data(each.config) for each in self.candidates],
            "device": asdict(self.device),
            "seed": self.seed,
            "best_us": self.best_us,
            "sources": self.sources,
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, line: str) -> "Task":
        """Read `to_json`'s line back; configs pass their own validation."""
        data = json.loads(line)
        problem, device = Problem.from_json(data["problem"]), Device.from_json(data["device"])
        configs = [parse_config(config) for config in data["configs"]]
        return cls(
            kind=data["kind"],
            candidates=tuple(Candidate(problem, config, device) for config in configs),
            seed=data["seed"],
            best_us=data["best_us"],
            sources=tuple(data["sources"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One answer: a measurement a config, and of a compilation what its kernels need.

    A compilation that went well has no measurement. None stands for a config that was not timed,
    though that is not known to be its fault: another one took the worker or its device along.
    `fatal` says that the worker is not to be used any more.
    """

    measurements: tuple[Measurement | None, ...] = ()
    uses: tuple[KernelUse, ...] = ()
    fatal: bool = False

    @property
    def measurement(self) -> Measurement | None:
        """What became of a task's only config; None of a compilation that went well."""
        return self.measurements[0] if self.measurements else None

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Reply":
        """Read `to_json`'s line back."""
        data = json.loads(line)
        return cls(
            measurements=tuple(each and _measurement(each) for each in data["measurements"]),
            uses=tuple(_use(each) for each in data["uses"]),
            fatal=data["fatal"],
        )


def _measurement(data: Mapping[str, Any]) -> Measurement:
    known = {field.name for field in fields(Measurement)}
    values = {name: value for name, value in data.items() if name in known}
    return Measurement(**{**values, "outcome": Outcome(values["outcome"])})


def _use(data: Mapping[str, Any]) -> KernelUse:
    return KernelUse(**{**data, "arguments": tuple(data["arguments"])})
