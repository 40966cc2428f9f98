"""The search and its records for Python programs, with the same results as the command line's.

Usage:
    found = flashtune.search(device="orin", shapes=["qwen3-vl-2b"], trials=100)
    found["results"][0]["winner"]["config"]
    flashtune.best("orin", "qwen3-vl-2b")["measurement"]["median_us"]

A device is given by name or alias, as `flashtune devices` lists them; a shape is a preset, pairs,
or a Problem. `db` is the database; default: $FLASHTUNE_DB, else the user's. Tables:
`flashtune.tables`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flashtune.kernels.model_folder.folder import read_model
from flashtune.tuner.fleet.fleets import FleetRequest, fleets_for
from flashtune.tuner.here import device_named, this_device
from flashtune.tuner.objective import Objective
from flashtune.tuner.search.lookup import best_record, measured_record
from flashtune.tuner.search.result_data import SearchData, result_data
from flashtune.tuner.search.search import Event
from flashtune.tuner.search.session import SearchRequest, Session
from flashtune.tuner.search.space import parse_fixed
from flashtune.tuner.tables import AnyPath
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.store import Store, default_path, existing

LOG = logging.getLogger("flashtune")
OnEvent = Callable[[Problem, Event], None]


def search(
    *,
    device: str | Device | None = None,
    shapes: Iterable[str | Problem] = (),
    models: Iterable[AnyPath] = (),
    trials: int = 150,
    timeout: float | None = None,
    sampler: str = "tpe",
    seed: int = 0,
    jobs: int | None = None,
    fixed: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    objective: str = "time",
    remote: str | Iterable[str] = (),
    remote_python: str | None = None,
    gpus: str | Iterable[int] | None = None,
    ray: str | None = None,
    db: AnyPath | None = None,
    on_event: OnEvent = lambda problem, event: None,
) -> SearchData:
    """Search for the fastest kernel of each shape on a device, as `flashtune search` does.

    Measures if the device is in this machine or can be reached over ssh, else predicts. Every
    result is written to the database at once, and the same call continues from there.

    Args:
        device: A device by name or alias, `cpu` or `gpu`. Default: this machine's.
        shapes: Presets, pairs, or Problems.
        models: Folders of FlashHead models, whose shapes are searched.
        trials: Configs to evaluate for each shape, including those of earlier runs.
        timeout: Seconds for all shapes.
        sampler: `tpe`, `gp`, `random` or `exhaustive`.
        seed: Seed for random numbers.
        jobs: How many compilers run at a time. Default: one per processor.
        fixed: Knobs and their values: only configs with these are searched.
        retry_failed: First evaluate again the configs that failed in earlier runs.
        objective: What to minimise: `time`, `energy` or `both`.
        remote: Measure on the machine that ssh reaches by this name (docs/remote.md), or on
            several of one kind.
        remote_python: The Python there that has torch and Triton.
        gpus: Measure on this machine's GPUs: `all`, or their numbers (docs/fleet.md).
        ray: Measure on a Ray cluster: its address, or `auto`.
        db: The database. Default: $FLASHTUNE_DB, else the user's.
        on_event: Called with the problem and an event after each evaluation.

    Returns:
        Plain data, as `flashtune search --json` prints it. `cancelled` is set after Ctrl-C. If
        nothing worked for a shape, its `winner` is None and `failure` says why.

    Raises:
        FlashtuneError: If something cannot be searched, or the machine is at fault.
    """
    if isinstance(shapes, str | Problem) or isinstance(models, str | os.PathLike):
        raise FlashtuneError("shapes and models are lists: write shapes=[…]")
    problems = [_problem(each) for each in shapes]
    problems += [read_model(os.fspath(each)) for each in models]
    if not problems:
        raise FlashtuneError("give at least one shape or model to search for")
    numbers = gpus if gpus is None or isinstance(gpus, str) else ",".join(map(str, gpus))
    asked = FleetRequest(
        remote=[remote] if isinstance(remote, str) else list(remote),
        remote_python=remote_python,
        gpus=numbers,
        ray=ray,
    )
    wanted = _device(device) if device is not None else None
    n_jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    told = _Told(on_event)
    fleets = fleets_for(asked, wanted, n_jobs, told.note)
    if len(fleets) > 1:
        kinds = ", ".join(fleet.device.name for fleet in fleets)
        raise FlashtuneError(
            f"there are devices of several kinds ({kinds}): choose one with device=…"
        )
    fleet = fleets[0] if fleets else None
    request = SearchRequest(
        device=fleet.device if fleet else wanted or this_device(),
        problems=list(dict.fromkeys(problems)),
        trials=trials,
        timeout_s=timeout,
        sampler=sampler,
        seed=seed,
        jobs=n_jobs,
        fixed=dict(parse_fixed(f"{name}={value}") for name, value in (fixed or {}).items()),
        retry_failed=retry_failed,
        objective=_objective(objective),
        fleet=fleet,
    )
    with Store(Path(db) if db is not None else default_path()) as store:
        return result_data(Session(request, store).run(told))


def best(
    device: str | Device,
    shape: str | Problem,
    *,
    require: bool = False,
    db: AnyPath | None = None,
) -> dict[str, Any]:
    """The best record of a shape on a device, as `flashtune best --json` prints it.

    Args:
        device: A device by name or alias, `cpu` or `gpu`.
        shape: A preset, pairs, or a Problem.
        require: Only accept a record that was measured for exactly this shape and can run.
        db: The database. Default: $FLASHTUNE_DB, else the user's.

    Returns:
        The fields of the record, where it comes from (`source`), and whether that ships with
        flashtune (`shipped`).

    Raises:
        FlashtuneError: If there is no such record, or the database does not exist.
    """
    find = measured_record if require else best_record
    database = existing(Path(db)) if db is not None else None
    return find(_device(device), _problem(shape), database).data()


class _Told:
    """Passes a session's events to a function, and its notes to the log."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def note(self, text: str) -> None:
        LOG.info("%s", text)

    def start(
        self, problem: Problem, trials: int, floor_us: float | None
    ) -> Callable[[Event], None]:
        return partial(self._on_event, problem)


def _objective(name: str) -> Objective:
    known = [each.value for each in Objective]
    if name not in known:
        raise FlashtuneError(f"objective must be one of {', '.join(known)}, not {name!r}")
    return Objective(name)


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else device_named(device)


def _problem(shape: str | Problem) -> Problem:
    return shape if isinstance(shape, Problem) else parse_shape(shape)
