"""Records to store, made short: `make_record(config={...}, median_us=12.0)`."""

from collections.abc import Callable
from typing import Any

import pytest

from flashtune.tuning_db.device import Toolchain
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

MakeRecord = Callable[..., Record]


@pytest.fixture
def problem() -> Problem:
    return Problem(vocab_size=1024, hidden_size=64, n_clusters=64, n_probes=8)


@pytest.fixture
def make_record(problem: Problem) -> MakeRecord:
    def make(median_us: float | None = 10.0, **changes: Any) -> Record:
        measured: dict[str, Any] = {
            "outcome": Outcome.CRASH if median_us is None else Outcome.OK,
            "median_us": median_us,
            "spread_us": None if median_us is None else 0.5,
            "samples": 0 if median_us is None else 100,
            "error": "illegal access" if median_us is None else "",
            "policy": changes.pop("policy", "search"),
            "joules": changes.pop("joules", None),
        }
        values: dict[str, Any] = {
            "device": "nvidia-h200",
            "toolchain": Toolchain(triton="3.6.0", torch="2.13.0", driver="580.1"),
            "problem": problem,
            "config": {"plan": "staged", "score_rows": 2},
            "provenance": Provenance.MEASURED,
            "measurement": Measurement(**measured),
            "created": "2026-01-31T12:00:00Z",
        }
        return Record(**{**values, **changes})

    return make
