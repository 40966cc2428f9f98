"""The fleets that a user asks for, whichever way.

Usage:
    fleets_for(FleetRequest(gpus="all"), device, jobs=8, on_note=print)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashtune.tuner.fleet.gpus import gpus_here
from flashtune.tuner.fleet.machine import Fleet, fleets_of
from flashtune.tuner.fleet.remote import find_machines
from flashtune.tuner.workers.ssh import PYTHON
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetRequest:
    """Where to measure: this machine's GPUs, machines over ssh, or a Ray cluster.

    gpus: `all`, or numbers as `0,2`. ray: the cluster's address, or `auto`. Raises FlashtuneError
    for more than one of the three.
    """

    remote: Sequence[str] = ()
    remote_python: str | None = None
    gpus: str | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        """See that it is one kind of fleet."""
        if self.remote_python is not None and not self.remote:
            raise FlashtuneError(
                "remote_python names the Python on a remote machine: give remote too"
            )
        if sum([bool(self.remote), self.gpus is not None, self.ray is not None]) > 1:
            raise FlashtuneError("remote, gpus and ray exclude one another: give only one of them")

    def __bool__(self) -> bool:
        """Whether anything but this machine's own device is asked for."""
        return bool(self.remote) or self.gpus is not None or self.ray is not None


def fleets_for(
    request: FleetRequest, wanted: Device | None, jobs: int, on_note: Callable[[str], None]
) -> list[Fleet]:
    """The fleets of a request, one for each kind of device; none where nothing is asked for.

    wanted: the only device that may measure. jobs: compilers at a time here. on_note: told, in
    lines, what is there. Raises FlashtuneError where there is nothing to measure on.
    """
    if request.ray is not None:
        from flashtune.tuner.fleet.ray_cluster import ray_fleets

        return ray_fleets(request.ray, wanted, on_note)
    if request.gpus is not None:
        machines = gpus_here(request.gpus, wanted)
    elif request.remote:
        on_note(f"connecting to {', '.join(request.remote)}")
        machines = find_machines(request.remote, wanted, request.remote_python or PYTHON, on_note)
    else:
        return []
    for machine in machines:
        on_note(machine.describe())
    return fleets_of(machines, jobs)
