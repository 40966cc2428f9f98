"""Which config to run: of the available records, the one expected to be fastest here.

Usage:
    choice = choose(problem, device, toolchain, [Source(name=USER, records=…), …])
    choice.config
    choice.explain()    # plain data: what was chosen, and what differs from what was wanted

Levels, best first: the same problem on the same device; the nearest shape on the same device;
the nearest device (its architecture first, then `device_distance`) with the nearest shape; the
default config; plain torch. Inside a level a measured record goes before a corrected one, and
that before a predicted one, then the nearer one, then the source given first, then one made with
this toolchain, then one timed behind another kernel, then one of a search's final timing, then the
fastest.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

from flashtune.kernels.backends.target import (
    default_config,
    known_good,
    target_of,
    timed_otherwise,
)
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.tuning_db.device import Device, Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.evidence import why_less_trusted
from flashtune.tuning_db.policy import is_final, is_of_a_race, taken_behind
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome, Provenance, Record, config_key
from flashtune.tuning_db.shortlist import MOST

USER, ADDED, PREBUILT = "user database", "added table", "prebuilt table"
BUILT_IN = "built in"
TIMING = "the way of timing"
NEAR_WINNERS = 4  # of other shapes or devices, raced if this shape has no record
ALIKE = 4  # more winners, those for as many tokens, raced with them
BESIDE = 2  # of near winners, raced beside what was only predicted for this shape
SHAPE_FIELDS = ("hidden_size", "n_clusters", "n_probes", "cluster_size", "n_tokens")
_SAME_FIELDS = ("weight_dtype", "centroid_dtype", "model_dtype")
SMALL_FIELDS = (
    "epilogue",
    "n_rescored",
    "n_pinned",
    "in_place",
)  # which hardly change which config is fast
SMALL_OCTAVES = 0.1  # distance of a different value
PROBLEM_FIELDS = ("vocab_size", *SHAPE_FIELDS, *SMALL_FIELDS)


class Level(str, Enum):
    """How near the chosen record is to what was wanted."""

    EXACT = "exact"
    NEAREST_SHAPE = "nearest_shape"
    NEAREST_DEVICE = "nearest_device"
    DEFAULT = "default"
    TORCH = "torch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Records, and where they come from: `USER`, `ADDED` or `PREBUILT`.

    left_out: one line on what could not be read.
    """

    name: str
    records: Sequence[Record]
    left_out: str = ""


class Difference(NamedTuple):
    """A field in which the record differs from what was wanted."""

    field: str
    wanted: int | float | str
    found: int | float | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What to run and why. `record` is None at the last two levels.

    `skipped` counts the better placed records that were passed over, by reason. `outdated` names
    the tools that have changed since a record was measured, and `TIMING` where that has.
    """

    config: Config
    level: Level
    why: str
    record: Record | None = None
    source: str = BUILT_IN
    differences: tuple[Difference, ...] = ()
    skipped: tuple[str, ...] = ()
    toolchain_matches: bool | None = None
    outdated: tuple[str, ...] = ()

    @property
    def stale(self) -> bool:
        """Whether the record's time was measured with tools, or in a way, that changed since."""
        return bool(self.outdated)

    @property
    def settled(self) -> bool:
        """Whether the config was measured for exactly this problem, here, with these tools.

        Pinned clusters make no difference: they are a few of the probed ones.
        """
        measured = self.record is not None and self.record.provenance is Provenance.MEASURED
        here = self.level in (Level.EXACT, Level.NEAREST_SHAPE)
        differing = {one.field for one in self.differences} & {*PROBLEM_FIELDS}
        return here and measured and not self.stale and differing <= {"n_pinned"}

    def _less_trusted(self) -> str | None:
        """Why predictions for the record's device are less trusted; None if they are not."""
        if self.record is None or self.record.provenance is Provenance.MEASURED:
            return None
        return why_less_trusted(self.record.device) or None

    def explain(self) -> dict[str, Any]:
        """The choice as plain data for `json.dumps`."""
        record = self.record
        return {
            "level": self.level.value,
            "why": self.why,
            "config": dict(config_data(self.config)),
            "source": self.source,
            "provenance": record.provenance.value if record else None,
            "less_trusted": self._less_trusted(),
            "record": record.key if record else None,
            "record_device": record.device if record else None,
            "median_us": record.measurement.median_us if record else None,
            "raced": record is not None and is_of_a_race(record.measurement.policy),
            "stale": self.stale,
            "toolchain_matches": self.toolchain_matches,
            "differences": [difference._asdict() for difference in self.differences],
            "skipped": list(self.skipped),
        }


def shape_distance(wanted: Problem, found: Problem) -> float | None:
    """The sum of |log2 ratio| over `SHAPE_FIELDS`; None if dtypes differ.

    Different values of `SMALL_FIELDS` add only a small distance.
    """
    if any(getattr(wanted, name) != getattr(found, name) for name in _SAME_FIELDS):
        return None
    octaves = sum(_octaves(getattr(wanted, name), getattr(found, name)) for name in SHAPE_FIELDS)
    small = [name for name in SMALL_FIELDS if getattr(wanted, name) != getattr(found, name)]
    return octaves + SMALL_OCTAVES * len(small)


def device_distance(wanted: Device, found: Device) -> float:
    """|log2 ratio| of bandwidth plus that of SM count; an unknown bandwidth counts as equal."""
    return _octaves(wanted.memory_bandwidth, found.memory_bandwidth) + _octaves(
        wanted.sm_count, found.sm_count
    )


def _octaves(one: float, other: float) -> float:
    return abs(math.log2(one / other)) if one > 0 and other > 0 else 0.0


def choose(
    problem: Problem, device: Device, toolchain: Toolchain, sources: Iterable[Source]
) -> Choice:
    """The config to run for `problem` on `device`; plain torch if the device has no kernels.

    Every record's config is checked for this problem and device before it is chosen. Failed
    records are never chosen, nor is a config that failed here, on this problem and toolchain. A
    prediction for another number of tokens does not go before the default, which is made for this
    number: several tokens need another plan than one.
    """
    sources = list(sources)
    skipped = Counter(f"{each.name}: {each.left_out}" for each in sources if each.left_out)
    for candidate, config in _usable(problem, device, toolchain, sources, skipped):
        record = candidate.record
        measured = record.provenance is Provenance.MEASURED
        if not measured and record.problem.n_tokens != problem.n_tokens:
            continue
        return _chosen(candidate, config, problem, device, toolchain, _counted(skipped))
    return default_choice(problem, device, skipped=_counted(skipped))


def contenders(
    problem: Problem, device: Device, toolchain: Toolchain, sources: Iterable[Source]
) -> list[Config]:
    """What to race: the default, then up to 8 configs, the most promising first.

    They come from the records for exactly this problem and device, and if none of these was
    measured, the last are up to 2 winners that were measured for near shapes, or on a near device
    of this architecture: a prediction can be wrong about what a measurement knows. If there are no
    such records, they are the winners of up to 4 other shapes or devices, the nearest first, then
    of up to 4 for as many tokens, since tokens matter more than the device, then configs known to
    be good in general. Raises FlashtuneError when there is no default.
    """
    sources = list(sources)
    default = default_config(problem, device)
    found: dict[Config, None] = {}
    near: dict[tuple[str, Problem], Config] = {}
    beside: dict[tuple[str, Problem], Config] = {}
    measured = False
    for candidate, config in _usable(problem, device, toolchain, sources, Counter()):
        record = candidate.record
        was_measured = record.provenance is Provenance.MEASURED
        if candidate.level is Level.EXACT:
            found[config] = None
            measured |= was_measured
            continue
        near.setdefault((record.device, record.problem), config)
        if was_measured and _arch_of(record.device) in (None, device.arch):
            beside.setdefault((record.device, record.problem), config)
    if found and not measured:
        found.pop(default, None)
        added = list(beside.values())[:BESIDE]
        found = dict.fromkeys([*list(found)[: MOST - len(added)], *added])
    if not found:
        failed = _failures(problem, device, toolchain, sources)
        good = (
            config
            for config in known_good(problem, device)
            if _why_not_built(config, problem, device) is None
            and config_key(config_data(config)) not in failed
        )
        alike = [config for of, config in near.items() if of[1].n_tokens == problem.n_tokens]
        nearest = [*list(near.values())[:NEAR_WINNERS], *alike[:ALIKE]]
        found = dict.fromkeys([*nearest, *good])
    found.pop(default, None)
    return [default, *list(found)[:MOST]]


def default_choice(problem: Problem, device: Device, *, skipped: tuple[str, ...] = ()) -> Choice:
    """The default config, or plain torch for a problem that no kernel can solve."""
    try:
        config = default_config(problem, device)
    except FlashtuneError as error:
        why = f"no kernel for {problem.describe()} on {device.name}: {error}"
        return fallback_choice(why, skipped)
    if config.plan == FALLBACK.name:
        why = "no kernels for this kind of device: plain torch runs instead"
        return fallback_choice(why, skipped)
    why = f"no usable record for {problem.describe()} on {device.name} or any other device"
    return Choice(config=config, level=Level.DEFAULT, why=why, skipped=skipped)


def fallback_choice(why: str, skipped: tuple[str, ...] = ()) -> Choice:
    """Plain torch, and why."""
    return Choice(config=FALLBACK.config(), level=Level.TORCH, why=why, skipped=skipped)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class _Candidate:
    """A record and its rank; candidates are tried in their sort order."""

    place: tuple[float, ...]
    config: str
    record: Record = field(compare=False)
    level: Level = field(compare=False)
    source: str = field(compare=False)


def _candidates(
    problem: Problem, device: Device, toolchain: Toolchain, sources: Sequence[Source]
) -> list[_Candidate]:
    """The OK records that could serve, best first."""
    devices: dict[str, Device | None] = {}
    candidates = []
    for rank, source in enumerate(sources):
        for record in source.records:
            distance = shape_distance(problem, record.problem)
            if record.measurement.outcome is not Outcome.OK or distance is None:
                continue
            nearness: tuple[float, ...] = (0.0, 0.0, distance)
            level = Level.EXACT if record.problem == problem else Level.NEAREST_SHAPE
            if record.device != device.name:
                if record.device not in devices:
                    devices[record.device] = _registered(record.device)
                other = devices[record.device]
                if other is None or other.vendor != device.vendor:
                    continue
                level = Level.NEAREST_DEVICE
                nearness = (other.arch != device.arch, device_distance(device, other), distance)
            place = (
                list(Level).index(level),
                record.provenance.rank,
                *nearness,
                rank,
                record.toolchain != toolchain,
                not taken_behind(record.measurement.policy),
                not is_final(record.measurement.policy),
                record.measurement.median_us or 0.0,
            )
            candidates.append(
                _Candidate(
                    place=place,
                    config=config_key(record.config),
                    record=record,
                    level=level,
                    source=source.name,
                )
            )
    return sorted(candidates)


def _usable(
    problem: Problem,
    device: Device,
    toolchain: Toolchain,
    sources: Sequence[Source],
    skipped: Counter[str],
) -> Iterator[tuple[_Candidate, Config]]:
    """Candidates whose configs can be built here and have not failed; for the others, why not."""
    failed = _failures(problem, device, toolchain, sources)
    for candidate in _candidates(problem, device, toolchain, sources):
        data = candidate.record.config
        try:
            config = parse_config(data)
            reason = failed.get(config_key(data)) or _why_not_built(config, problem, device)
        except FlashtuneError as error:
            reason = str(error)
        if reason is None:
            yield candidate, config
        else:
            skipped[f"{candidate.source}: {reason}"] += 1


def _why_not_built(config: Config, problem: Problem, device: Device) -> str | None:
    """Why a config is not valid here, or this machine cannot build it; None if it can."""
    invalid = Candidate(problem, config, device).why_invalid()
    return invalid or target_of(device).why_missing(PLANS[config.plan])


def _arch_of(name: str) -> str | None:
    """A registered device's architecture; None for one that only its own machine can describe."""
    device = _registered(name)
    return device.arch if device else None


def _registered(name: str) -> Device | None:
    try:
        return find_device(name)
    except FlashtuneError:  # a device that only its own machine can describe
        return None


def _failures(
    problem: Problem, device: Device, toolchain: Toolchain, sources: Sequence[Source]
) -> dict[str, str]:
    """The configs that failed for this problem, here, with these tools, and why."""
    return {
        config_key(record.config): f"failed here before ({record.measurement.outcome.value})"
        for source in sources
        for record in source.records
        if record.measurement.outcome not in (Outcome.OK, Outcome.PRUNED)
        and (record.device, record.problem, record.toolchain) == (device.name, problem, toolchain)
    }


def _counted(skipped: Counter[str]) -> tuple[str, ...]:
    return tuple(
        f"{reason} ({number} records)" if number > 1 else reason
        for reason, number in skipped.items()
    )


def _chosen(
    candidate: _Candidate,
    config: Config,
    problem: Problem,
    device: Device,
    toolchain: Toolchain,
    skipped: tuple[str, ...],
) -> Choice:
    record = candidate.record
    differences = [
        Difference(name, getattr(problem, name), getattr(record.problem, name))
        for name in PROBLEM_FIELDS
    ]
    differences.append(Difference("device", device.name, record.device))
    differences += [
        Difference(name, getattr(toolchain, name), getattr(record.toolchain, name))
        for name in (part.name for part in fields(Toolchain))
    ]
    differing = tuple(one for one in differences if one.wanted != one.found)
    why = f"{record.provenance.value} on {record.device} for {record.problem.describe()}"
    if is_of_a_race(record.measurement.policy):
        why += " in a race"
    measured = record.provenance is Provenance.MEASURED
    outdated = record.toolchain.outdated(toolchain) if measured else ()
    if candidate.level is not Level.NEAREST_DEVICE and timed_otherwise(record, device):
        outdated += (TIMING,)
    if differing:
        why += "; differs in " + ", ".join(
            f"{one.field} (wanted {one.wanted}, found {one.found})" for one in differing
        )
    if outdated:
        why += f"; stale, for {' and '.join(outdated)} changed since"
    return Choice(
        config=config,
        level=candidate.level,
        why=why,
        record=record,
        source=candidate.source,
        differences=differing,
        skipped=skipped,
        toolchain_matches=record.toolchain == toolchain,
        outdated=outdated,
    )
