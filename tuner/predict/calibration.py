"""Measured records with their compiled kernels' resources: the data for fitting the cost model.

Usage:
    calibration = read_calibration(CALIBRATIONS / "nvidia-h200.json.gz")
    for sample in calibration.samples:
        sample.problem, sample.config, sample.uses, sample.measurement

A file is compressed JSON, so fitting and checking need neither a database nor a compiler.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from flashtune.kernels.plans.candidate import PLANS, Candidate, KernelUse
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.kernels.plans.knob import changed_data, knobs
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.foreign import (
    MOST_BYTES,
    count,
    items,
    members,
    parse_json,
    read_file,
    text,
)
from flashtune.tuning_db.one_line import quoted
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import MOST_NAME, Measurement, Outcome, Provenance, Record
from flashtune.tuning_db.whole_file import write_whole

VERSION = 1
CALIBRATIONS = resources.files("flashtune.tuning_db") / "calibration"
SHIPPED = CALIBRATIONS / "nvidia-h200.json.gz"
CARDS = (SHIPPED, CALIBRATIONS / "nvidia-h100.json.gz")
LATER = CALIBRATIONS / "nvidia-h200-later.json.gz"  # measured since the fit, other problems
FORMATS_TIMED = CALIBRATIONS / "nvidia-h100-formats.json.gz"  # not used for fitting
COMPILE_SECONDS = 120.0
_USE = ("kernel", "programs", "warps", "registers", "shared_bytes", "spilled")
_TIME = ("outcome", "median_us", "spread_us", "samples", "policy")
_MOST_COUNT = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measured config, and the resources of each of its compiled kernels."""

    problem: Problem
    config: Config
    uses: tuple[KernelUse, ...]
    measurement: Measurement

    @property
    def time_us(self) -> float:
        """Microseconds per call, as measured; for a pruned config, from its first samples."""
        assert self.measurement.median_us is not None
        return self.measurement.median_us


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Samples of one device, made with one set of tools. `dropped`: rows with obsolete configs."""

    device: str
    toolchain: Toolchain
    samples: tuple[Sample, ...]
    dropped: int = 0


def usable(records: Iterable[Record], device: Device) -> dict[tuple[Problem, Config], Record]:
    """The measured records that have a time and whose configs are still valid, each config once.

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
    known: Calibration | None = None,
) -> Calibration:
    """Compile the records' configs for `device` and keep their kernels' resources.

    `known` is a calibration of the same device: its samples are part of the result, and their
    configs are not compiled again. Raises FlashtuneError if no record is usable, or they were made
    with different tools.
    """
    wanted = usable(records, device)
    toolchains = {record.toolchain for record in wanted.values()}
    if not wanted:
        raise FlashtuneError(f"no measured record of {device.name}: run `flashtune search` there")
    if len(toolchains) > 1:
        raise FlashtuneError(
            f"the records of {device.name} were made with {len(toolchains)} different "
            "toolchains, so that their times cannot be compared: give databases of one toolchain"
        )
    toolchain, samples = toolchains.pop(), []
    if known is not None:
        if (known.device, known.toolchain) != (device.name, toolchain):
            raise FlashtuneError(
                f"the calibration to add to is of {known.device} with {known.toolchain}, and the "
                f"records are of {device.name} with {toolchain}: their times do not compare"
            )
        samples = list(known.samples)
        for sample in samples:
            wanted.pop((sample.problem, sample.config), None)
    for problem, config in wanted:
        candidate = Candidate(problem, config, device)
        pool.submit(Task(kind="compile", candidates=(candidate,)), COMPILE_SECONDS)
    done = 0
    while pool.pending():
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
    return Calibration(device=device.name, toolchain=toolchain, samples=tuple(samples))


def _place(sample: Sample) -> tuple[str, str]:
    return sample.problem.key, json.dumps(config_data(sample.config), sort_keys=True)


def dump_calibration(calibration: Calibration) -> bytes:
    """The file's bytes: `calibration_text`, compressed."""
    return gzip.compress(calibration_text(calibration).encode(), mtime=0)


def calibration_text(calibration: Calibration) -> str:
    """The samples as JSON, identical for identical samples."""
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
    write_whole(path, dump_calibration(calibration))


def read_calibration(path: Any) -> Calibration:
    """Read a file, given as a Path or a packaged resource.

    Rows whose configs no longer parse are counted in `dropped`; a knob newer than the file has its
    default. Raises FlashtuneError for any other fault of the file.
    """
    try:
        packed = read_file(Path(str(path)))
    except FlashtuneError as error:
        raise FlashtuneError(f"cannot read the calibration {error}") from error
    try:
        return _calibration(parse_json(_unpacked(packed), exact=True))
    except (FlashtuneError, ValueError) as error:
        raise FlashtuneError(
            f"cannot use the calibration {path} ({error}): make it again with `flashtune model "
            "calibrate`"
        ) from error


def _unpacked(packed: bytes) -> str:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            return file.read(MOST_BYTES).decode("utf-8")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise FlashtuneError(f"not a whole gzip file of text: {error}") from error


def _calibration(data: Any) -> Calibration:
    """Read plain data back; raises FlashtuneError or ValueError."""
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise FlashtuneError(
            f"it has version {quoted(version)}, but this flashtune reads {VERSION}"
        )
    members(data, "a calibration", ("version", "device", "toolchain", "problems", "samples"))
    device = find_device(text(data["device"], "device", MOST_NAME))
    problems = [Problem.from_json(each) for each in items(data["problems"], "problems")]
    samples = [_sample(row, problems, device) for row in items(data["samples"], "samples")]
    kept = tuple(sample for sample in samples if sample is not None)
    return Calibration(
        device=device.name,
        toolchain=Toolchain.from_json(data["toolchain"]),
        samples=kept,
        dropped=len(samples) - len(kept),
    )


def _sample(row: Any, problems: Sequence[Problem], device: Device) -> Sample | None:
    """The sample in a row; None if its config is obsolete."""
    members(row, "a sample", ("problem", "config", "uses", *_TIME))
    problem = problems[count(row["problem"], "problem", 0, len(problems) - 1)]
    uses = tuple(_use(each) for each in items(row["uses"], "uses"))
    measurement = Measurement(
        **{**{name: row[name] for name in _TIME}, "outcome": Outcome(row["outcome"])}
    )
    if measurement.median_us is None:
        raise FlashtuneError(f"a sample whose outcome is {measurement.outcome.value}")
    try:
        data = row["config"] if isinstance(row["config"], dict) else {}
        plan = PLANS[data.get("plan")].config
        defaults = {name: knob["default"] for name, knob in knobs(plan).items()}
        config = parse_config({**defaults, **data})
    except FlashtuneError:
        return None
    if Candidate(problem, config, device).why_invalid() is not None:
        return None
    return Sample(problem=problem, config=config, uses=uses, measurement=measurement)


def _use(data: Any) -> KernelUse:
    needs = items(data, "a kernel's needs")
    if len(needs) != len(_USE):
        raise FlashtuneError(f"a kernel's needs must be {', '.join(_USE)}")
    kernel, programs, warps, registers, shared_bytes, spilled = needs
    return KernelUse(
        kernel=text(kernel, "a kernel", MOST_NAME),
        programs=count(programs, "programs", 1, _MOST_COUNT),
        warps=count(warps, "warps", 1, _MOST_COUNT),
        registers=count(registers, "registers", 1, _MOST_COUNT),
        shared_bytes=count(shared_bytes, "shared_bytes", 0, _MOST_COUNT),
        spilled=count(spilled, "spilled", 0, _MOST_COUNT),
    )
