"""A session's results as plain data, as `flashtune search --json` prints them.

Usage:
    json.dumps(result_data(outcome))
"""

from dataclasses import asdict
from typing import Any, TypedDict

from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.search.lookup import best_shipped
from flashtune.tuner.search.search import Result
from flashtune.tuner.search.session import SessionResult
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.record import Provenance, Record


class ShapeData(TypedDict):
    """The search of one shape. Times are microseconds per call, None if there is none.

    winner, shipped, front: records as `Record.data` gives them; `shipped` is the shipped record if
    it is better than a winner that was only predicted. The other fields are those of `Result`.
    """

    problem: dict[str, Any]
    winner: dict[str, Any] | None
    shipped: dict[str, Any] | None
    searched_us: float | None
    default_us: float | None
    baseline_us: float | None
    floor_us: float | None
    evaluated: int
    failed: int
    failure: dict[str, Any] | None
    default_kept: bool
    objective: str
    front: list[dict[str, Any]]
    timed_out: bool
    cancelled: bool


class SearchData(TypedDict):
    """A whole search: the device by name, `measured` or `predicted`, bytes/s, and each shape."""

    device: str
    provenance: str
    memory_bandwidth: float
    cancelled: bool
    results: list[ShapeData]


def result_data(outcome: SessionResult) -> SearchData:
    """The results as plain data."""
    return {
        "device": outcome.device.name,
        "provenance": outcome.provenance.value,
        "memory_bandwidth": outcome.device.memory_bandwidth,
        "cancelled": outcome.cancelled,
        "results": [_shape_data(result, outcome.device) for result in outcome.results],
    }


def better_shipped(result: Result, device: Device) -> Record | None:
    """The shipped record, if it is better than a winner that was only predicted.

    Measured is better than predicted.
    """
    winner = result.winner
    if winner is None or winner.provenance is Provenance.MEASURED:
        return None
    shipped = best_shipped(device, result.problem)
    if shipped is None or shipped.provenance is Provenance.MEASURED:
        return shipped
    times = [record.measurement.median_us or 0.0 for record in (shipped, winner)]
    return shipped if times[0] < times[1] else None


def _shape_data(result: Result, device: Device) -> ShapeData:
    shipped = better_shipped(result, device)
    return {
        "problem": result.problem.data(),
        "winner": result.winner.data() if result.winner else None,
        "shipped": shipped.data() if shipped else None,
        "searched_us": result.searched_us,
        "default_us": result.default_us,
        "baseline_us": result.baseline_us,
        "floor_us": floor_us(result.problem, device),
        "evaluated": result.evaluated,
        "failed": result.failed,
        "failure": asdict(result.failure) if result.failure else None,
        "default_kept": result.default_kept,
        "objective": result.objective.value,
        "front": [record.data() for record in result.front],
        "timed_out": result.timed_out,
        "cancelled": result.cancelled,
    }
