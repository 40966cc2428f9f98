"""Searches that several workers share: what they measure, and what becomes of those that die."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import flashtune
from flashtune.kernels.backends.nvidia import gpu
from flashtune.tuner.cli.main import cli
from flashtune.tuner.fleet import gpus
from flashtune.tuner.fleet.fleets import FleetRequest, fleets_for
from flashtune.tuner.fleet.machine import Fleet, Machine, fleets_of
from flashtune.tuner.search.result_data import SearchData
from flashtune.tuner.search.search import Event
from flashtune.tuner.search.session import SearchRequest, Session, side_by_side
from flashtune.tuner.workers.process import WorkerProcess
from flashtune.tuner.workers.transport import LocalTransport, Place
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store

TINY = "vocab=512,hidden=64,clusters=32,probes=4"
SCRIPT = Path(__file__).with_name("quick_worker.py")
TOOLS = Toolchain(triton="3.6.0")
H200, ORIN = find_device("h200"), find_device("orin")


class FarTransport(LocalTransport):
    """A worker here, of which a killed one is taken for a lost connection."""

    def __init__(self, factor: float, log: Path) -> None:
        super().__init__((sys.executable, "-S", str(SCRIPT), str(factor), str(log)))
        self.started: list[WorkerProcess] = []

    def start(self) -> WorkerProcess:
        self.started.append(WorkerProcess(self))
        return self.started[-1]

    def why_lost(self, code: int, errors: str) -> str | None:
        return "the connection was cut" if code == -9 else None


class Told:
    """A display that keeps what it is told, and lets a test meddle."""

    def __init__(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.notes: list[str] = []
        self.on_event, self.events = on_event, list[Event]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, problem: Problem, trials: int, floor_us: object) -> Callable[[Event], None]:
        return self.tell

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)


@pytest.fixture
def fleet(tmp_path: Path) -> Callable[..., Fleet]:
    """Workers whose times are so many times the true ones: `fleet(1.0, 1.0, 1.5)`."""

    def make(*factors: float, device=H200) -> Fleet:
        places = [
            Place(
                name=f"board {number}",
                transport=FarTransport(factor, tmp_path / "log"),
                site=f"board {number}",
            )
            for number, factor in enumerate(factors)
        ]
        return Fleet(
            device=device, toolchain=TOOLS, places=places, compilers=None, elsewhere=False
        )

    return make


@pytest.fixture
def problems(problem: Problem) -> list[Problem]:
    return [replace(problem, n_probes=number) for number in (4, 5)]


def request(fleet: Fleet, problems: list[Problem], trials: int = 30) -> SearchRequest:
    return SearchRequest(
        device=fleet.device, problems=problems, trials=trials, fleet=fleet, sampler="random"
    )


def tasks(tmp_path: Path) -> list[tuple[str, str, int]]:
    """What workers did: process, kind, configs."""
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return [(process, kind, int(count)) for process, kind, count in lines]


class TestASearch:
    def test_all_workers_measure_and_one_times_the_finalists(
        self, fleet, problems: list[Problem], store: Store, tmp_path: Path
    ) -> None:
        display = Told()
        found = Session(request(fleet(1.0, 1.0, 1.0), problems), store).run(display)
        assert [each.evaluated for each in found.results] == [30, 30]
        assert not found.cancelled and display.notes == []
        assert len(store.records()) == 60
        assert {event.most_workers for event in display.events} == {3}
        assert display.events[-1].workers == 3
        done = tasks(tmp_path)
        measured = Counter(process for process, kind, _ in done if kind == "measure")
        assert len(measured) == 3
        finals = [process for process, kind, count in done if kind == "compare" and count > 1]
        assert len(finals) == 2
        for result in found.results:
            assert result.winner is not None
            assert result.winner.measurement.policy == "final-behind"

    def test_a_worker_whose_times_would_mislead_is_set_aside(
        self, fleet, problems: list[Problem], store: Store, tmp_path: Path
    ) -> None:
        display = Told()
        slow = fleet(1.0, 1.3, 1.0)
        Session(request(slow, problems), store).run(display)
        [note] = display.notes
        assert re.match(
            r"board 1 is set aside, .* takes 5?\d.\d\d us there, but 4\d.\d\d us on", note
        )
        measured = {process for process, kind, _ in tasks(tmp_path) if kind == "measure"}
        assert len(measured) == 2
        assert all((each.measurement.median_us or 0) < 50.1 for each in store.records())

    def test_workers_that_die_lose_nothing(
        self, fleet, problems: list[Problem], store: Store, tmp_path: Path
    ) -> None:
        dying = fleet(1.0, 1.0, 1.0)
        kills = iter((10, 20, 40, 55))
        due = [next(kills)]

        def kill(event: Event) -> None:
            if len(store.records()) >= due[0]:
                last = [place.transport.started[-1].popen for place in dying.places]
                alive = [each for each in last if each.poll() is None]
                os.kill(alive[due[0] % len(alive)].pid, 9)
                due[0] = next(kills, 10**6)

        display = Told(kill)
        found = Session(request(dying, problems), store).run(display)
        assert due == [10**6]
        assert [each.evaluated for each in found.results] == [30, 30]
        assert {each.measurement.outcome for each in store.records()} == {Outcome.OK}
        assert any("its work goes to others" in note for note in display.notes)
        assert {len(store.measurements(each.key)) for each in store.records()} <= {1, 2}

    def test_ctrl_c_keeps_all_and_the_same_request_goes_on(
        self, fleet, problems: list[Problem], store: Store
    ) -> None:
        def press(event: Event) -> None:
            if len(store.records()) >= 25:
                raise KeyboardInterrupt

        cut = Session(request(fleet(1.0, 1.0), problems), store).run(Told(press))
        kept = {each.key for each in store.records()}
        assert cut.cancelled and len(kept) >= 25
        assert sum(each.evaluated for each in cut.results) == len(kept)
        assert all(each.cancelled for each in cut.results)
        done = Session(request(fleet(1.0, 1.0), problems), store).run(Told())
        assert [each.evaluated for each in done.results] == [30, 30]
        assert not done.cancelled and kept <= {each.key for each in store.records()}
        assert all(len(store.measurements(key)) <= 2 for key in kept)

    def test_kinds_of_device_are_searched_for_side_by_side(
        self, fleet, problems: list[Problem], store: Store
    ) -> None:
        fleets = [fleet(1.0, 1.0), fleet(1.0, device=ORIN)]
        sessions = [Session(request(each, problems), store) for each in fleets]
        display = Told()
        add = store.add
        devices: list[str] = []

        def noted(*records) -> None:
            devices.extend(each.device for each in records)
            add(*records)

        store.add = noted
        results = side_by_side(sessions, display)
        assert [each.device.name for each in results] == [H200.name, ORIN.name]
        assert [[each.evaluated for each in found.results] for found in results] == [[30, 30]] * 2
        first_half = Counter(devices[: len(devices) // 2])
        assert min(first_half[each.name] for each in (H200, ORIN)) >= 10


class TestGpus:
    @pytest.fixture(autouse=True)
    def pretended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two H200s and an Orin."""
        devices = [H200, ORIN, H200]
        monkeypatch.delenv(gpus.VISIBLE, raising=False)
        monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(gpus, "device_of", lambda device: devices[device.index])
        monkeypatch.setattr(gpus, "toolchain", lambda device: TOOLS)

    def test_each_has_a_worker_that_sees_it_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = gpus.gpus_here("all", None)
        assert [each.place.name for each in found] == ["gpu 0", "gpu 1", "gpu 2"]

        def visible() -> list[str]:
            machines = gpus.gpus_here("all", None)
            return [each.place.transport.environment[gpus.VISIBLE] for each in machines]

        assert visible() == ["0", "1", "2"]
        monkeypatch.setenv(gpus.VISIBLE, "4,GPU-5ab,7")
        assert visible() == ["4", "GPU-5ab", "7"]

    def test_a_worker_gets_the_environment(self) -> None:
        transport = LocalTransport(
            (
                sys.executable,
                "-S",
                "-c",
                f"import os; os.write(3, os.environb[b'{gpus.VISIBLE}'])",
            ),
            {gpus.VISIBLE: "1"},
        )
        process = WorkerProcess(transport)
        assert process.popen.wait(60) == 0
        assert os.read(process.fileno(), 10) == b"1"
        process.end()

    def test_gpus_of_one_kind_are_a_fleet_and_share_compilers(self) -> None:
        fleets = fleets_for(FleetRequest(gpus="all"), None, 8, lambda text: None)
        assert [(each.device, len(each.places)) for each in fleets] == [(H200, 2), (ORIN, 1)]
        assert [len(each.compilers or ()) for each in fleets] == [4, 4]
        assert not any(each.elsewhere for each in fleets)

    @pytest.mark.parametrize(
        ("which", "wanted", "names"),
        [
            ("0,2", None, ["gpu 0", "gpu 2"]),
            (" 2 ,2", None, ["gpu 2"]),
            ("all", ORIN, ["gpu 1"]),
            ("ALL", H200, ["gpu 0", "gpu 2"]),
        ],
    )
    def test_they_are_named_by_number_or_device(self, which, wanted, names: list[str]) -> None:
        assert [each.place.name for each in gpus.gpus_here(which, wanted)] == names

    @pytest.mark.parametrize(
        ("which", "wanted", "said"),
        [
            ("3", None, "must be all, or numbers from 0 to 2, not '3'"),
            ("0,x", None, "not '0,x'"),
            ("", None, "not ''"),
            ("0", ORIN, f"--gpus 0 selects {H200.name}, not {ORIN.name}"),
        ],
    )
    def test_what_is_not_there_is_one_line(self, which: str, wanted, said: str) -> None:
        with pytest.raises(FlashtuneError, match=said):
            gpus.gpus_here(which, wanted)

    def test_none_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: 0)
        with pytest.raises(FlashtuneError, match="finds no GPU here"):
            gpus.gpus_here("all", None)


def test_machines_of_one_kind_with_the_same_tools_are_a_fleet() -> None:
    def machine(name: str, device=ORIN, tools: Toolchain = TOOLS) -> Machine:
        return Machine(device=device, toolchain=tools, place=Place(name=name))

    other = Toolchain(triton="3.7.0")
    machines = [machine("a"), machine("b", H200), machine("c"), machine("d", tools=other)]
    fleets = fleets_of(machines, jobs=2)
    assert [[place.name for place in each.places] for each in fleets] == [["a", "c"], ["b"], ["d"]]
    assert [each.toolchain for each in fleets] == [TOOLS, TOOLS, other]
    ours = gpu.toolchain().triton.split(".")[:2]
    compiled = [each.compilers is not None for each in fleets]
    assert compiled == [each.toolchain.triton.split(".")[:2] == ours for each in fleets]


@pytest.mark.parametrize(
    "asked",
    [
        {"gpus": "all", "ray": "auto"},
        {"remote": ["a"], "gpus": "0"},
        {"remote": ["a"], "ray": "b"},
    ],
    ids=str,
)
def test_kinds_of_fleet_exclude_one_another(asked) -> None:
    with pytest.raises(FlashtuneError, match="exclude one another"):
        FleetRequest(**asked)


class TestTheCommandAndTheFunction:
    @pytest.fixture
    def asked(self, fleet, monkeypatch: pytest.MonkeyPatch) -> list[FleetRequest]:
        """What fleets were asked for; there are two, of different devices."""
        asked: list[FleetRequest] = []

        def pretended(request: FleetRequest, wanted, jobs: int, on_note) -> list[Fleet]:
            asked.append(request)
            return [fleet(1.0, 1.0), fleet(1.0, device=ORIN)][: 1 if wanted else 2]

        # The API first: were it imported now, it would keep what is pretended for good
        monkeypatch.setattr("flashtune.tuner.api.fleets_for", pretended)
        monkeypatch.setattr("flashtune.tuner.fleet.fleets.fleets_for", pretended)
        return asked

    @staticmethod
    def command(*words: str) -> Result:
        return CliRunner().invoke(
            cli, ["search", "--shape", TINY, "--trials", "3", "--sampler", "random", *words]
        )

    def test_kinds_of_device_are_a_list_in_json_and_tables_else(
        self, asked: list[FleetRequest], tmp_path: Path
    ) -> None:
        database = ("--db", str(tmp_path / "tuning.db"))
        done = self.command("--gpus", "all", "--json", *database)
        assert done.exit_code == 0, done.output
        data = json.loads(done.stdout)
        assert [each["device"] for each in data] == [H200.name, ORIN.name]
        assert [each["results"][0]["evaluated"] for each in data] == [3, 3]
        assert "of 2 workers" in done.stderr
        shown = self.command("--remote", "a", "--remote", "b", *database).stdout
        assert f"{H200.title}: measured" in shown and f"{ORIN.title}: measured" in shown
        assert asked[0] == FleetRequest(gpus="all")
        assert asked[1] == FleetRequest(remote=("a", "b"))

    def test_ray_is_an_address_or_the_cluster_here(self, asked: list[FleetRequest]) -> None:
        for words in (["--ray"], ["--ray", "head:6379"], ["--ray", "--device", "h200"]):
            self.command(*words, "--db", "/no/such/folder/tuning.db")
        assert [each.ray for each in asked] == ["auto", "head:6379", "auto"]

    def test_the_function_searches_one_kind(
        self, asked: list[FleetRequest], tmp_path: Path
    ) -> None:
        def search(**options: object) -> SearchData:
            return flashtune.search(
                shapes=[TINY], trials=3, sampler="random", db=tmp_path / "tuning.db", **options
            )

        with pytest.raises(FlashtuneError, match=f"several kinds .{H200.name}, {ORIN.name}"):
            search(gpus=[0, 1])
        assert search(device="h200", remote=["a", "b"])["device"] == H200.name
        assert search(device="h200", remote="a")["results"][0]["evaluated"] == 3
        assert [each.gpus for each in asked] == ["0,1", None, None]
        assert [list(each.remote) for each in asked] == [[], ["a", "b"], ["a"]]
