"""Several boards over ssh share a search: each is this machine, behind an sshd of its own."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from told import Told

from flashtune.tuner.cli.main import cli
from flashtune.tuner.fleet import remote
from flashtune.tuner.fleet.machine import fleets_of
from flashtune.tuner.fleet.remote import find_machines
from flashtune.tuner.search.search import Event
from flashtune.tuner.search.session import SearchRequest, Session
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store

H200 = find_device("h200")
BOARDS = ("board0", "board1", "board2")
CHOICE = """#!/bin/sh
config={folder}/board0
for word; do
  case $word in board*) config={folder}/$word ;; esac
done
exec {ssh} -F $config/ssh_config "$@"
"""


@pytest.fixture(scope="module")
def servers(
    ssh_server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, object]]]:
    """An sshd for each board, and the folder with an ssh that finds them by name."""
    folder = tmp_path_factory.mktemp("boards")
    found = {}
    for name in BOARDS:
        (folder / name).mkdir()
        found[name] = type(ssh_server)(ssh_server.sshd, folder / name)
    (folder / "bin").mkdir()
    script = folder / "bin" / "ssh"
    script.write_text(CHOICE.format(folder=folder, ssh=shutil.which("ssh")))
    script.chmod(0o755)
    yield folder / "bin", found
    for server in found.values():
        server.stop()


@pytest.fixture
def boards(servers, far, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, object], str]:
    """The servers by name, and the Python there. What boards say of themselves comes at once."""
    folder, found = servers
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(remote, "FAR_DEVICE", "quick_device")
    return found, far.python()


def test_boards_share_a_search_and_lose_nothing_with_their_connections(
    boards, problem: Problem, store: Store
) -> None:
    servers, python = boards
    notes: list[str] = []
    machines = find_machines([*BOARDS, "refused"], H200, python, notes.append)
    assert [each.place.name for each in machines] == list(BOARDS)
    [left_out] = notes
    assert left_out.startswith("ssh refused: ") and left_out.endswith(": left out")
    [fleet] = fleets_of(machines, jobs=1)
    quick = [
        replace(place, transport=replace(place.transport, module="quick_worker"))
        for place in fleet.places
    ]
    drops = iter([(10, "board1"), (20, "board0"), (30, "board1"), (10**6, "")])
    due = [next(drops)]

    def drop(event: Event) -> None:
        if event.done >= due[0][0]:
            servers[due[0][1]].drop()
            due[0] = next(drops)

    request = SearchRequest(
        device=H200,
        problems=[problem],
        trials=45,
        fleet=replace(fleet, places=quick, compilers=None),
        sampler="random",
    )
    display = Told(drop)
    [result] = Session(request, store).run(display).results
    assert due[0][0] == 10**6
    assert (result.evaluated, result.failed, result.cancelled) == (45, 0, False)
    assert {each.measurement.outcome for each in store.records()} == {Outcome.OK}
    assert len(store.records()) == 45
    lost = [note for note in display.notes if "its work goes to others" in note]
    assert {note.split()[1].rstrip(":") for note in lost} == {"board0", "board1"}


def test_where_no_board_can_be_reached_the_first_reason_is_told(boards) -> None:
    with pytest.raises(FlashtuneError, match=r"^ssh refused: .*Connection refused"):
        find_machines(["refused", "refused"], H200)
    done = CliRunner().invoke(
        cli, ["search", "--remote", "refused", "--remote", "keyless", "--shape", "qwen3-0.6b"]
    )
    assert done.exit_code == 2
    connecting, error = done.stderr.splitlines()
    assert connecting == "connecting to refused, keyless"
    assert error.startswith("Error: ssh refused: ")
