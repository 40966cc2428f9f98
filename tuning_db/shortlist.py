"""A few of a problem's many predicted configs, to be raced on the real device.

Usage:
    shortlist(records)        # of one problem and toolchain: up to 8, the fastest first

A cost model's error depends on the kind of config, so its favourites, which are all alike, would
be wrong together. The rule: first the fastest of each family (a plan, and its way to select
clusters), the faster families first, unless it is predicted much slower than the fastest of all
(1.05 times on the architecture that the cost model was fitted to, 1.2 times elsewhere); then, one
by one, the config with the least `time x (1 + 0.3 / d)`, where d is the number of knobs in which
it differs from the nearest chosen one. A config that differs in a single knob counts as 30 %
slower than it is, one that differs in five as 6 %.

The numbers were chosen on an H200's records; docs/decisions/0016 has what they give on an H100's.
"""

from collections.abc import Iterable, Sequence

from flashtune.tuning_db.device import all_devices
from flashtune.tuning_db.record import ConfigData, Outcome, Record, config_key, family

MOST = 8
FITTED = "sm_90"  # the architecture of the cost model's calibration
NEAR_FITTED, NEAR = 1.05, 1.2  # times the fastest prediction: a slower family has no own place
LIKENESS = 0.3  # penalty for differing from a chosen config in only one knob


def near_of(device: str) -> float:
    """How many times as slow as the fastest a family may be that gets a place on a device."""
    fitted = any(each.name == device and each.arch == FITTED for each in all_devices())
    return NEAR_FITTED if fitted else NEAR


def shortlist(
    records: Iterable[Record], most: int = MOST, *, near: float | None = None
) -> list[Record]:
    """Up to `most` of a device's records that worked, chosen by the rule above, fastest first.

    near: in place of `near_of` the device.
    """
    worked = [record for record in records if record.measurement.outcome is Outcome.OK]
    if near is None:
        near = near_of(worked[0].device) if worked else NEAR
    times = [record.measurement.median_us or 0.0 for record in worked]
    configs = [each.config for each in worked]
    return [worked[at] for at in shortlisted(times, configs, most, near=near)]


def shortlisted(
    times_us: Sequence[float],
    configs: Sequence[ConfigData],
    most: int = MOST,
    *,
    near: float,
    likeness: float = LIKENESS,
) -> list[int]:
    """The places of the shortlisted configs, given their predicted times; fastest first."""
    keys = [config_key(config) for config in configs]
    left = sorted(range(len(configs)), key=lambda at: (times_us[at], keys[at]))
    places = {at: place for place, at in enumerate(left)}
    families: dict[str, int] = {}
    for at in left:
        if times_us[at] <= near * times_us[left[0]]:
            families.setdefault(family(configs[at]), at)
    chosen = list(families.values())[:most]
    left = [at for at in left if at not in chosen]

    def cost(at: int) -> tuple[float, str]:
        apart = min(knobs_apart(configs[at], configs[other]) for other in chosen)
        return times_us[at] * (1 + likeness / max(1, apart)), keys[at]

    while left and len(chosen) < most:
        chosen.append(min(left, key=cost))
        left.remove(chosen[-1])
    return sorted(chosen, key=places.__getitem__)


def knobs_apart(one: ConfigData, other: ConfigData) -> int:
    """The number of knobs in which two configs differ, counting those that only one has."""
    return sum(one.get(name) != other.get(name) for name in {*one, *other})
