"""A worker's place with the device there, and fleets: places whose devices are of one kind.

Usage:
    for fleet in fleets_of(machines, jobs=8):
        fleet.device, fleet.places
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.backends.target import target_of
from flashtune.tuner.workers.transport import Place, Places, here
from flashtune.tuning_db.device import Device, Toolchain


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a worker can measure, on which device, and with which tools.

    elsewhere: whether that is another machine. passed_over: why no device of a kind that goes
    before was taken, where none was asked for.
    """

    device: Device
    toolchain: Toolchain
    place: Place
    elsewhere: bool = True
    passed_over: str = ""

    def describe(self) -> str:
        """The machine in a line: device, and the tools there."""
        tools = self.toolchain
        named = {"triton": tools.triton, "torch": tools.torch, "driver": tools.driver}
        versions = [f"{name} {version}" for name, version in named.items() if version]
        found = ", ".join([f"{self.device.title} ({self.device.arch})", *versions])
        described = ", ".join(filter(None, [found, tools.compiler]))
        return f"{self.place.name}: {'; '.join(filter(None, [described, self.passed_over]))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Workers whose device and tools are the same, so that they share a search.

    places: where they measure. compilers: where kernels are compiled before that; None where the
    workers that measure compile. elsewhere: whether workers are given source, as they have
    neither templates nor what was compiled here.
    """

    device: Device
    toolchain: Toolchain
    places: Places
    compilers: Places | None
    elsewhere: bool


def fleets_of(machines: Sequence[Machine], jobs: int) -> list[Fleet]:
    """The machines by kind, in the order in which each kind comes first.

    jobs: compilers at a time here, which the kinds share.
    """
    kinds: dict[tuple[str, Toolchain], list[Machine]] = {}
    for machine in machines:
        kinds.setdefault((machine.device.name, machine.toolchain), []).append(machine)
    share = max(1, jobs // max(1, len(kinds)))
    return [_fleet(each, share) for each in kinds.values()]


def _fleet(machines: Sequence[Machine], jobs: int) -> Fleet:
    """Machines of one kind. Of CPUs, the bandwidth is the best that was measured."""
    device = max((each.device for each in machines), key=lambda each: each.memory_bandwidth)
    first = machines[0]
    compiles = not first.elsewhere or compiles_as(device, first.toolchain, toolchain(device))
    return Fleet(
        device=device,
        toolchain=first.toolchain,
        places=[each.place for each in machines],
        compilers=here(jobs) if compiles else None,
        elsewhere=first.elsewhere,
    )


def compiles_as(device: Device, there: Toolchain, here: Toolchain) -> bool:
    """Whether what compiles here compiles there: by the same minor version of Triton.

    C++ is compiled by the machine that runs it.
    """
    versions = (each.triton.split(".")[:2] for each in (there, here))
    return target_of(device).compiles_elsewhere and len({tuple(each) for each in versions}) == 1
