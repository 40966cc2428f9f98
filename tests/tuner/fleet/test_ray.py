"""A search on a real Ray of several nodes on this machine, whose raylets are killed meanwhile.

The nodes pretend to have GPUs: what they say of themselves, and their workers, are quick scripts.
"""

import functools
import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from told import Told

import flashtune
from flashtune.tuner.cli.main import cli
from flashtune.tuner.fleet import ray_cluster
from flashtune.tuner.fleet.ray_cluster import ray_fleets
from flashtune.tuner.fleet.ray_worker import RayTransport, relay
from flashtune.tuner.search.search import Event
from flashtune.tuner.search.session import SearchRequest, Session
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store

H200 = find_device("h200")
OURS = str(Path(flashtune.__file__).parents[1])
PATIENCE = 120.0
needs_ray = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]


def test_without_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = CliRunner().invoke(cli, ["search", "--ray", "--shape", "qwen3-0.6b"])
    assert done.exit_code == 2
    [error] = done.stderr.splitlines()
    assert error.startswith("Error: --ray needs Ray (")
    assert error.endswith("install flashtune[ray]")


class Nodes:
    """A cluster whose nodes come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes: list[Any] = []

    def add(self, count: int = 1) -> None:
        """Nodes with a GPU, one CPU for its worker and one to compile."""
        for _ in range(count):
            self.nodes.append(self.cluster.add_node(num_cpus=2, num_gpus=1, wait=False))
        self.cluster.wait_for_nodes()

    def kill(self, node: Any) -> None:
        """As a machine that fails."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="class")  # Ray finds a cluster by its processes: later tests want none
def nodes() -> Iterator[Nodes]:
    path = os.pathsep.join([OURS, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        import ray

        nodes = Nodes()
        nodes.add(2)
        ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.cluster.shutdown()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and workers that answer at once; nodes are looked for all the time."""
    monkeypatch.setattr(ray_cluster, "FAR_DEVICE", "quick_device")
    monkeypatch.setattr(ray_cluster, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr("flashtune.tuner.workers.pool.ROSTER_SECONDS", 0.2)
    quick = functools.partial(RayTransport, module="quick_worker")

    def transport(**options: Any) -> RayTransport:
        return RayTransport(**options) if "module" in options else quick(**options)

    monkeypatch.setattr(ray_cluster, "RayTransport", transport)


class TestACluster:
    pytestmark = needs_ray

    def test_its_nodes_are_places_to_measure_and_to_compile(self, nodes: Nodes, quick) -> None:
        notes: list[str] = []
        [fleet] = ray_fleets(nodes.cluster.address, H200, notes.append)
        assert fleet.device == H200 and fleet.elsewhere
        assert notes == [f"Ray: 2 workers have {H200.name}"]
        assert callable(fleet.places) and callable(fleet.compilers)
        places: list[Place] = [*fleet.places(), *fleet.compilers()]
        assert sorted(place.name.partition("/")[2][7:] for place in places) == (
            ["cpu 0", "cpu 0", "gpu 0", "gpu 0"]
        )
        assert len({place.site for place in places}) == 2

    def test_another_device_is_one_line(self, nodes: Nodes, quick) -> None:
        notes: list[str] = []
        with pytest.raises(
            FlashtuneError, match="no node of the Ray cluster offers a NVIDIA H100"
        ):
            ray_fleets(nodes.cluster.address, find_device("h100"), notes.append)
        assert len(notes) == 2 and all("not NVIDIA H100" in each for each in notes)

    def test_nodes_that_die_and_join_lose_nothing(
        self, nodes: Nodes, quick, problem: Problem, store: Store
    ) -> None:
        generator = random.Random(5)
        kills = iter((12, 30))
        due = [next(kills)]
        most: list[int] = []

        def kill(event: Event) -> None:
            most.append(event.workers)
            if event.done >= due[0]:
                due[0] = next(kills, 10**6)
                nodes.kill(generator.choice(nodes.nodes))
                nodes.add()

        display = Told(kill)
        [fleet] = ray_fleets(nodes.cluster.address, H200, display.note)
        request = SearchRequest(
            device=H200, problems=[problem], trials=60, fleet=fleet, sampler="random"
        )
        found = Session(request, store).run(display)
        assert due == [10**6]
        assert (found.results[0].evaluated, found.results[0].failed) == (60, 0)
        assert {each.measurement.outcome for each in store.records()} == {Outcome.OK}
        assert found.results[0].winner is not None
        assert found.results[0].winner.measurement.policy == "final-behind"
        assert max(most) == 2

    def test_what_goes_to_the_nodes_needs_nothing_of_ours_there(self, nodes: Nodes) -> None:
        from ray import cloudpickle

        program = (
            "import sys\nsys.modules['flashtune'] = None\n"
            "from ray import cloudpickle\n"
            "found = cloudpickle.loads(sys.stdin.buffer.read())()\n"
            "line, code, said = found.begin('print(\"hello\")', b'', 'hello')\n"
            "assert code is None, said\n"
            "assert found.ask(b'', 9) == (b'', 0, '')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=cloudpickle.dumps(relay()),
            capture_output=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr.decode()


class TestWithoutACluster:
    pytestmark = needs_ray

    def test_it_is_one_line(self, tmp_path: Path) -> None:
        """In a process of its own: Ray keeps what it connected to."""
        program = "from flashtune.tuner.cli.main import cli; cli(prog_name='flashtune')"
        path = os.pathsep.join([OURS, os.environ.get("PYTHONPATH", "")])
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, "search", "--ray", "--shape", "qwen3-0.6b"],
            env={**os.environ, "PYTHONPATH": path, "RAY_TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert time.monotonic() - began < PATIENCE
        assert (done.returncode, done.stdout) == (2, "")
        error = done.stderr.splitlines()[-1]
        assert error.startswith("Error: there is no Ray cluster at auto (")
