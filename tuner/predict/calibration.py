"""Measured records with what their compiled kernels need: what the cost model is fitted to.

Usage:
    calibration = read_calibration(CALIBRATIONS / "nvidia-h200.json.gz")
    for sample in calibration.samples:
        sample.problem, sample.config, sample.uses, sample.measurement

A file is JSON, packed: fitting and checking then need neither a database nor a compiler.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from flashtune.kernels.plans.candidate import PLANS, Candidate, KernelUse
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.kernels.plans.knob import changed_data, knobs
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import MOST_BYTES, parse_json, read_file
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record

VERSION = 1
CALIBRATIONS = resources.files("flashtune.tuning_db") / "calibration"
SHIPPED = CALIBRATIONS / "nvidia-h200.json.gz"
FORMATS_TIMED = CALIBRATIONS / "nvidia-h100-formats.json.gz"  # nothing is fitted to it
COMPILE_SECONDS = 120.0
_USE = ("kernel", "programs", "warps", "registers", "shared_bytes", "spilled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One config that was measured, and what each of its compiled kernels needs."""

    problem: Problem
    config: Config
    uses: tuple[KernelUse, ...]
    measurement: Measurement

    @property
    def time_us(self) -> float:
        """Microseconds a call, as measured; of a pruned config its first samples'."""
        assert self.measurement.median_us is not None
        return self.measurement.median_us


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Samples of one device, made with one set of tools. `dropped`: rows of no config of today."""

    device: str
    toolchain: Toolchain
    samples: tuple[Sample, ...]
    dropped: int = 0


def usable(records: Iterable[Record], device: Device) -> dict[tuple[Problem, Config], Record]:
    """The measured records that have a time and whose configs are valid today, each config once.

    Of several records of one config the first counts.
    """
    found: dict[tuple[Problem, Config], Record] = {}
    for record in records:
        timed = record.measurement.outcome in (Outcome.OK, Outcome.PRUNED)
        if not timed or record.provenance is not Provenance.MEASURED:
            continue
        try:
            config = parse_config(record.config)
        except FlashtuneError:
            continue
        if Candidate(record.problem, config, device).why_invalid() is None:
            found.setdefault((record.problem, config), record)
    return found


def calibrate(
    records: Sequence[Record],
    device: Device,
    pool: WorkerPool,
    on_compiled: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Compile the records' configs for `device` and keep what their kernels need.

    Raises FlashtuneError when no record is usable, or they were made with different tools.
    """
    wanted = usable(records, device)
    toolchains = {record.toolchain for record in wanted.values()}
    if not wanted:
        raise FlashtuneError(f"no measured record of {device.name}: run `flashtune search` there")
    if len(toolchains) > 1:
        raise FlashtuneError(
            f"the records of {device.name} were made with {len(toolchains)} sets of tools: "
            "their times do not compare, give databases of one"
        )
    for problem, config in wanted:
        candidate = Candidate(problem, config, device)
        pool.submit(Task(kind="compile", candidates=(candidate,)), COMPILE_SECONDS)
    samples, done = [], 0
    while pool.pending:
        for task, reply in pool.wait(1.0):
            done += 1
            problem, config = task.problem, task.candidates[0].config
            if not reply.measurements:
                measurement = wanted[problem, config].measurement
                samples.append(
                    Sample(
                        problem=problem, config=config, uses=reply.uses, measurement=measurement
                    )
                )
            on_compiled(done, len(wanted))
    samples.sort(key=_place)
    return Calibration(device=device.name, toolchain=toolchains.pop(), samples=tuple(samples))


def _place(sample: Sample) -> tuple[str, str]:
    return sample.problem.key, json.dumps(config_data(sample.config), sort_keys=True)


def dump_calibration(calibration: Calibration) -> bytes:
    """The file's bytes: `calibration_text`, compressed."""
    return gzip.compress(calibration_text(calibration).encode(), mtime=0)


def calibration_text(calibration: Calibration) -> str:
    """The samples as JSON, the same for the same samples."""
    problems = list(dict.fromkeys(sample.problem for sample in calibration.samples))
    data = {
        "version": VERSION,
        "device": calibration.device,
        "toolchain": asdict(calibration.toolchain),
        "problems": [problem.data() for problem in problems],
        "samples": [
            {
                "problem": problems.index(sample.problem),
                "config": changed_data(sample.config),
                "uses": [[getattr(use, name) for name in _USE] for use in sample.uses],
                "outcome": sample.measurement.outcome.value,
                "median_us": round(sample.time_us, 3),
                "spread_us": round(sample.measurement.spread_us or 0.0, 3),
                "samples": sample.measurement.samples,
                "policy": sample.measurement.policy,
            }
            for sample in calibration.samples
        ],
    }
    return json.dumps(data, separators=(",", ":"), sort_keys=True)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file whole or not at all; raises FlashtuneError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(dump_calibration(calibration))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FlashtuneError(f"cannot write {path}: {error.strerror}") from error


def read_calibration(path: Any) -> Calibration:
    """Read a file, given as a Path or a packaged resource.

    Rows whose configs do not parse today are counted in `dropped`; a knob that is younger than
    the file has its default. Raises FlashtuneError for anything else that is wrong with it.
    """
    try:
        packed = read_file(Path(str(path)))
    except FlashtuneError as error:
        raise FlashtuneError(f"cannot read the calibration {error}") from error
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            data = parse_json(file.read(MOST_BYTES).decode("utf-8"), exact=True)
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, this flashtune reads {VERSION}")
        problems = [Problem.from_json(each) for each in data["problems"]]
        samples = [_sample(row, problems) for row in data["samples"]]
        toolchain = Toolchain.from_json(data["toolchain"])
    except (
        AttributeError,
        EOFError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        FlashtuneError,
        zlib.error,
    ) as error:
        raise FlashtuneError(
            f"cannot use the calibration {path} ({error}): make it anew with "
            "`flashtune model calibrate`"
        ) from error
    kept = tuple(sample for sample in samples if sample is not None)
    return Calibration(
        device=data["device"],
        toolchain=toolchain,
        samples=kept,
        dropped=len(samples) - len(kept),
    )


def _sample(row: Mapping[str, Any], problems: Sequence[Problem]) -> Sample | None:
    try:
        plan = PLANS[row["config"]["plan"]].config
        defaults = {name: knob["default"] for name, knob in knobs(plan).items()}
        config = parse_config({**defaults, **row["config"]})
    except FlashtuneError:
        return None
    return Sample(
        problem=problems[row["problem"]],
        config=config,
        uses=tuple(KernelUse(**dict(zip(_USE, use, strict=True))) for use in row["uses"]),
        measurement=Measurement(
            outcome=Outcome(row["outcome"]),
            median_us=row["median_us"],
            spread_us=row["spread_us"],
            samples=row["samples"],
            policy=row["policy"],
        ),
    )
