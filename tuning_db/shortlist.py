"""A few of a problem's many predicted configs, to be raced on the real device.

Usage:
    shortlist(records)        # of one problem and toolchain: up to 8, the fastest first

A cost model's error depends on the kind of config, so its favourites, which are all alike, would
be wrong together. The rule: first the fastest of each family (a plan, and its way to select
clusters), the faster families first; then, one by one, the config with the least `time x (1 + 0.1
/ d)`, where d is the number of knobs in which it differs from the nearest chosen one. A config
that differs in a single knob counts as 10 % slower than it is, one that differs in five as 2 %.
"""

from collections.abc import Iterable

from flashtune.tuning_db.record import ConfigData, Outcome, Record, config_key, family

MOST = 8
LIKENESS = 0.1  # penalty for differing from a chosen config in only one knob


def shortlist(records: Iterable[Record], most: int = MOST) -> list[Record]:
    """Up to `most` of the records that worked, chosen by the rule above, fastest first."""
    left = sorted(
        (record for record in records if record.measurement.outcome is Outcome.OK), key=_time
    )
    families: dict[str, Record] = {}
    for record in left:
        families.setdefault(family(record.config), record)
    chosen = list(families.values())[:most]
    left = [record for record in left if record not in chosen]
    while left and len(chosen) < most:
        chosen.append(min(left, key=lambda record: _cost(record, chosen)))
        left.remove(chosen[-1])
    return sorted(chosen, key=_time)


def knobs_apart(one: ConfigData, other: ConfigData) -> int:
    """The number of knobs in which two configs differ, counting those that only one has."""
    return sum(one.get(name) != other.get(name) for name in {*one, *other})


def _time(record: Record) -> tuple[float, str]:
    return record.measurement.median_us or 0.0, config_key(record.config)


def _cost(record: Record, chosen: Iterable[Record]) -> tuple[float, str]:
    apart = min(knobs_apart(record.config, other.config) for other in chosen)
    time_us, key = _time(record)
    return time_us * (1 + LIKENESS / max(1, apart)), key
