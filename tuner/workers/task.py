"""A request to a worker process.

Usage:
    data = Task(kind="measure", candidates=(candidate,)).data()     # to be sent by message.py
    task = Task.from_data(data)
"""

from dataclasses import dataclass
from typing import Any

from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import config_data, parse_config
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One request. `compile` and `measure` are about one candidate, `compare` about several.

    All candidates are for one problem and device. seed: of the workload. best_us: the best time so
    far; a config far behind it is pruned. sources: each candidate's rendered source, for a worker
    without templates. energy: whether to measure the energy of calls, too.
    """

    kind: str
    candidates: tuple[Candidate, ...]
    seed: int = 0
    best_us: float | None = None
    sources: tuple[str, ...] = ()
    energy: bool = False

    @property
    def problem(self) -> Problem:
        """The candidates' problem."""
        return self.candidates[0].problem

    @property
    def device(self) -> Device:
        """The candidates' device."""
        return self.candidates[0].device

    def data(self) -> dict[str, Any]:
        """The task as plain data."""
        return {
            "kind": self.kind,
            "problem": self.problem.data(),
            "configs": [config_data(each.config) for each in self.candidates],
            "device": self.device.data(),
            "seed": self.seed,
            "best_us": self.best_us,
            "sources": self.sources,
            "energy": self.energy,
        }

    @classmethod
    def from_data(cls, data: Any) -> "Task":
        """Read `data` back; configs pass their own validation."""
        problem, device = Problem.from_json(data["problem"]), Device.from_json(data["device"])
        configs = [parse_config(config) for config in data["configs"]]
        return cls(
            kind=data["kind"],
            candidates=tuple(Candidate(problem, config, device) for config in configs),
            seed=data["seed"],
            best_us=data["best_us"],
            sources=tuple(data["sources"]),
            energy=data["energy"],
        )
