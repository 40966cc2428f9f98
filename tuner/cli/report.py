"""Devices and records, formatted for the terminal."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from flashtune.kernels.plans.config import parse_config, short_config
from flashtune.kernels.runtime.choice import ADDED, PREBUILT, USER
from flashtune.tuner.cli.terminal import print_rows
from flashtune.tuner.probe import Probed
from flashtune.tuner.search.lookup import KnownRecord
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.evidence import published_evidence, why_less_trusted
from flashtune.tuning_db.one_line import one_line
from flashtune.tuning_db.record import Outcome, Provenance, Record

_MARKS = {USER: "", ADDED: "+", PREBUILT: "*"}  # after a record's outcome
_FIGURES = {  # of a probe: label, unit, factor, digits
    "bandwidth": ("memory reads", "GB/s", 1e-9, 1),
    "launch_us": ("launch alone", "us", 1.0, 2),
    "overlapped_us": ("launch overlapped", "us", 1.0, 2),
    "load_us": ("dependent load", "us", 1.0, 3),
    "barrier_us": ("grid-wide barrier", "us", 1.0, 2),
}
_TABLES = {
    ADDED: "of a table in FLASHTUNE_TABLES, not of the database",
    PREBUILT: "of a shipped table, not of the database",
}


def number(time_us: float | None) -> str:
    """Microseconds; empty if there is no time."""
    return "" if time_us is None else f"{time_us:.1f}"


def time_of(record: Record) -> str:
    """The time of a record, with the 80 % interval if it was predicted."""
    from flashtune.kernels.predict.cost_model import interval_us

    text = number(record.measurement.median_us)
    if record.provenance is Provenance.MEASURED:
        return text
    try:
        interval = interval_us(record.problem, parse_config(record.config), record.measurement)
    except FlashtuneError:  # from another version of its plan
        return text
    return text if interval is None else f"{text} ({interval[0]:.1f}-{interval[1]:.1f})"


def print_records(known: Sequence[KnownRecord]) -> None:
    """Print records, one line each, with whole configs."""
    rows = []
    for each in known:
        record, measurement = each.record, each.record.measurement
        failed = measurement.outcome not in (Outcome.OK, Outcome.PRUNED)
        rows.append(
            (
                record.key[:12],
                record.device,
                record.problem.describe(),
                time_of(record),
                (measurement.outcome.value if failed else record.provenance.value)
                + _MARKS[each.source],
                one_line(measurement.error) if failed else short_config(record.config),
            )
        )
    notes = predicted_notes([each.record for each in known])
    sources = {each.source for each in known}
    notes += [f"{_MARKS[each]} {text}" for each, text in _TABLES.items() if each in sources]
    print_rows(
        "",
        ("record", "device", "problem", ">us", "outcome", "config"),
        rows,
        notes=notes,
    )


def predicted_notes(records: Iterable[Record]) -> list[str]:
    """Notes on predicted times, above all those that are guesses for formats and plans."""
    from flashtune.kernels.predict.cost_model import unfitted

    predicted = [each for each in records if each.provenance is not Provenance.MEASURED]
    if not predicted:
        return []
    words = [each.value for each in Provenance if each in {one.provenance for one in predicted}]
    kinds = " and ".join(words)
    notes = [f"{kinds} times; in brackets, an interval that held 80 % of measured times"]
    for name in sorted({each.device for each in predicted}):
        if why_less_trusted(name):
            notes.append(f"{name}: {why_less_trusted(name)}")
    guessed = sorted({name for each in predicted for name in unfitted(each.problem, each.config)})
    if guessed:
        notes.append(
            f"{', '.join(guessed)}: no measured times to fit to, so the widest interval of the "
            "others is given (see `flashtune model check`)"
        )
    return notes


def print_devices(devices: Sequence[Device], here: Collection[Device]) -> None:
    """Print devices and their published figures, with those of this machine marked."""
    rows = [
        (
            device.name,
            device.arch,
            str(device.sm_count),
            f"{device.memory_bandwidth / 1e9:.0f}",
            f"{device.l2_bytes / 2**20:.0f}",
            ", ".join(device.aliases),
            f"{device.title} (this machine)" if device in here else device.title,
        )
        for device in devices
    ]
    notes = [
        f"{device.name}: {evidence.describe()}"
        for device in devices
        if (evidence := published_evidence().get(device.name))
    ]
    headings = ("device", "arch", ">SMs", ">GB/s", ">L2 MiB", "aliases", "title")
    print_rows("", headings, rows, notes=notes)


def print_probes(probed: Sequence[Probed]) -> None:
    """Print devices' probes beside the values expected from published figures."""
    rows = []
    for each in probed:
        measured, expected = (asdict(part) for part in (each.probe.figures, each.expected))
        for name, (what, unit, scale, digits) in _FIGURES.items():
            one, other = (values[name] for values in (measured, expected))
            rows.append(
                (
                    each.probe.device,
                    what,
                    unit,
                    *(f"{value * scale:.{digits}f}" if value else "" for value in (one, other)),
                    f"{one / other:.2f}" if one and other else "",
                )
            )
    notes = []
    for each in probed:
        probe = each.probe
        conditions = ", ".join(f"{name} {text}" for name, text in probe.conditions.items())
        notes.append(
            f"{probe.device}: {probe.seconds:.1f} s, {each.corrected} records corrected; "
            f"{conditions or 'power mode and clocks cannot be read'}"
        )
    headings = ("device", "what", "unit", ">measured", ">expected", ">ratio")
    print_rows("", headings, rows, notes=notes)


def device_data(device: Device, here: bool) -> dict[str, Any]:
    """A device as plain data.

    evidence: predictions against published figures, None if there are none.
    """
    evidence = published_evidence().get(device.name)
    return {
        "name": device.name,
        "title": device.title,
        "arch": device.arch,
        "sm_count": device.sm_count,
        "memory_bandwidth": device.memory_bandwidth,
        "l2_bytes": device.l2_bytes,
        "aliases": device.aliases,
        "source": device.source,
        "here": here,
        "evidence": asdict(evidence) if evidence else None,
        "less_trusted": why_less_trusted(device.name) or None,
    }
