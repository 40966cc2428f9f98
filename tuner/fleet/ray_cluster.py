"""The nodes of a Ray cluster as fleets, which nodes join and leave while a search runs.

Usage:
    fleets = ray_fleets("auto", find_device("h100"), on_note=print)

Each node is asked what it has, by an actor there, as a machine over ssh is. Of a node with GPUs
each is a place to measure, and each CPU that is left one to compile; of one that measures its CPU,
the node is one place, with all of its CPUs.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flashtune.kernels.backends.target import target_of
from flashtune.tuner.fleet.inquiry import FAR_DEVICE, Found, Inquiry, inquire
from flashtune.tuner.fleet.machine import Fleet
from flashtune.tuner.fleet.ray_worker import RayTransport
from flashtune.tuner.workers.connection import Connection, Ending
from flashtune.tuner.workers.process import wait_for_any
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import one_line

FIND_SECONDS = 180.0  # for the first node to say what it has
GATHER_SECONDS = 30.0  # for the others, then; those that take longer join late
MOST_TRIES = 3  # to ask a node, before it is left out
LOOK_SECONDS = 2.0  # between two looks at which nodes there are

Kind = tuple[str, Toolchain]


def ray_fleets(address: str, wanted: Device | None, on_note: Callable[[str], None]) -> list[Fleet]:
    """The fleets of a cluster, one for each kind of device, or of the wanted device alone.

    address: the cluster's, or `auto` for the one that this machine is a node of. Without a wish
    GPUs are measured on, where there are any. Raises FlashtuneError where Ray is not installed,
    there is no cluster, or no node has such a device.
    """
    nodes = RayNodes(_connected(address), wanted, on_note)
    nodes.gather()
    kinds = dict.fromkeys(nodes.kinds())
    for (name, _), count in ((kind, len(nodes.places(kind))) for kind in kinds):
        on_note(f"Ray: {count} {'worker has' if count == 1 else 'workers have'} {name}")
    return [nodes.fleet(kind) for kind in kinds]


def _connected(address: str) -> Any:
    """Ray, as the driver of a cluster that runs already; a connection of the caller's is kept."""
    try:
        import ray
    except ImportError as error:
        raise FlashtuneError(f"--ray needs Ray ({error}): install flashtune[ray]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            why = one_line(str(error)).partition(". ")[0]
            raise FlashtuneError(
                f"there is no Ray cluster at {address} ({why}): run `ray start --head`, or give "
                "the address of a cluster that this machine belongs to"
            ) from None
    return ray


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """A node that is alive: its id, its name for a person, and what Ray lends of it."""

    id: str
    name: str
    gpus: int
    cpus: int


class RayNodes:
    """What is known of a cluster's nodes. Looking never waits, but for `gather`."""

    def __init__(self, ray: Any, wanted: Device | None, on_note: Callable[[str], None]) -> None:
        """Nobody is asked yet."""
        self._ray, self._wanted, self._on_note = ray, wanted, on_note
        nodes = self._alive()
        if wanted is None:
            self._on_gpus = any(node.gpus for node in nodes)
        else:
            self._on_gpus = target_of(wanted).torch_device != "cpu"
        self._asked: dict[str, Inquiry] = {}
        self._found: dict[str, Found] = {}
        self._tries: Counter[str] = Counter()
        self._why = ""  # a node could not be used
        self._nodes: dict[str, _Node] = {}
        self._next_look = 0.0

    def gather(self) -> None:
        """Wait for what the nodes have; raises FlashtuneError where none has what is wanted."""
        end = time.monotonic() + FIND_SECONDS
        try:
            while time.monotonic() < end:
                self._next_look = 0.0
                heard = self._look()
                if not self._asked and not any(map(self._may_ask, self._nodes.values())):
                    break
                if self.kinds():
                    end = min(end, time.monotonic() + GATHER_SECONDS)
                wait_for_any(heard, 0.5)
        except BaseException:
            for inquiry in self._asked.values():
                inquiry.close()
            raise
        if not self.kinds():
            what = self._wanted.title if self._wanted else "device that kernels run on"
            why = f" ({self._why})" if self._why else ""
            raise FlashtuneError(f"no node of the Ray cluster offers a {what}{why}")

    def kinds(self) -> list[Kind]:
        """The devices and tools that were found."""
        found = [self._found.get(name) for name in self._nodes]
        return [(each.device.name, each.toolchain) for each in found if each]

    def fleet(self, kind: Kind) -> Fleet:
        """The nodes of a kind, which are looked for again and again."""
        found = [each for each in self._found.values() if _kind(each) == kind]
        device = max((each.device for each in found), key=lambda each: each.memory_bandwidth)
        return Fleet(
            device=device,
            toolchain=kind[1],
            places=partial(self.places, kind),
            compilers=partial(self.compilers, kind) if self._on_gpus else None,
            elsewhere=True,
        )

    def places(self, kind: Kind) -> list[Place]:
        """Where a kind of device can be measured now."""
        if not self._on_gpus:
            return [self._place(node, "", 0, node.cpus) for node in self._of(kind)]
        return [
            self._place(node, f" gpu {number}", 1, _cpus_a_gpu(node))
            for node in self._of(kind)
            for number in range(node.gpus)
        ]

    def compilers(self, kind: Kind) -> list[Place]:
        """Where can be compiled for that: on the CPUs of the same nodes, which share a cache."""
        return [
            self._place(node, f" cpu {number}", 0, 1)
            for node in self._of(kind)
            for number in range(node.cpus - node.gpus * _cpus_a_gpu(node))
        ]

    def _place(self, node: _Node, what: str, num_gpus: int, num_cpus: int) -> Place:
        transport = RayTransport(node=node.id, num_gpus=num_gpus, num_cpus=num_cpus)
        return Place(name=f"{node.name}{what}", transport=transport, site=node.id)

    def _of(self, kind: Kind) -> list[_Node]:
        self._look()
        found = ((node, self._found.get(node.id)) for node in self._nodes.values())
        return [node for node, each in found if each and _kind(each) == kind]

    def _look(self) -> list[Connection]:
        """See which nodes there are, ask those that are new, and hear those that were asked."""
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._nodes = {node.id: node for node in self._alive()}
        for node in self._nodes.values():
            if self._may_ask(node):
                self._asked[node.id] = self._inquiry(node)
                self._tries[node.id] += 1
        waiting = []
        for name in list(self._asked):
            try:
                waiting.append(next(self._asked[name]))
            except StopIteration as end:
                self._found[name] = end.value
                del self._asked[name]
            except FlashtuneError as error:
                del self._asked[name]
                self._why = str(error)
                if name in self._nodes and self._tries[name] == MOST_TRIES:
                    self._on_note(f"{error}: left out")
        return waiting

    def _inquiry(self, node: _Node) -> Inquiry:
        transport = RayTransport(
            node=node.id,
            num_gpus=int(self._on_gpus),
            num_cpus=_cpus_a_gpu(node) if self._on_gpus else node.cpus,
            module=FAR_DEVICE,
        )
        return inquire(node.name, transport, self._wanted, partial(_why_none, node))

    def _may_ask(self, node: _Node) -> bool:
        """Whether a node lends what may be what is wanted, and nobody knows yet."""
        lends = bool(node.gpus if self._on_gpus else node.cpus)
        known = node.id in self._found or node.id in self._asked
        return lends and not known and self._tries[node.id] < MOST_TRIES

    def _alive(self) -> Sequence[_Node]:
        found = []
        for each in self._ray.nodes():
            if each["Alive"]:
                lent = each["Resources"]
                name = f"{each['NodeManagerHostname']}/{each['NodeID'][:6]}"
                gpus, cpus = int(lent.get("GPU", 0)), int(lent.get("CPU", 0))
                found.append(_Node(id=each["NodeID"], name=name, gpus=gpus, cpus=cpus))
        return found


def _kind(found: Found) -> Kind:
    return found.device.name, found.toolchain


def _cpus_a_gpu(node: _Node) -> int:
    """Of those that a worker with a GPU takes: one where each can have one."""
    return int(node.cpus >= node.gpus)


def _why_none(node: _Node, ending: Ending) -> str:
    if ending.why_lost:
        return f"{node.name}: {ending.why_lost}"
    return f"{node.name}: {ending.said or f'the Python there ended with exit code {ending.code}'}"
