"""Searches, records and tables from Python: the same data as the commands print."""

import inspect
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import flashtune
from flashtune.tuner.cli.main import cli
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.store import Store

TINY = "vocab=512,hidden=64,clusters=32,probes=4"


@pytest.fixture(autouse=True)
def no_database_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "usual.db"))


def printed(*words: object) -> Any:
    """What a command prints as JSON."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def without_creation(data: Any) -> Any:
    """Records without the second in which they were made."""
    return json.loads(
        json.dumps(data), object_hook=lambda each: {k: each[k] for k in each if k != "created"}
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "tuning.db"


@pytest.fixture(scope="module")
def events() -> list[tuple[Problem, int]]:
    return []


@pytest.fixture(scope="module")
def found(database: Path, events: list[tuple[Problem, int]]) -> Any:
    return flashtune.search(
        device="orin",
        shapes=[TINY],
        trials=2,
        jobs=1,
        fixed={"plan": "staged", "pdl": False},
        db=database,
        on_event=lambda problem, event: events.append((problem, event.done)),
    )


class TestASearch:
    def test_has_the_data_of_the_command(
        self, found: Any, database: Path, tmp_path: Path, problem: Problem
    ) -> None:
        assert found["provenance"] == "predicted"
        assert found["results"][0]["problem"] == problem.data()
        assert found["results"][0]["winner"]["config"]["plan"] == "staged"
        told = printed(
            "search", "--device", "orin", "--shape", TINY, "--trials", 2, "--jobs", 1, "--fix",
            "plan=staged", "--fix", "pdl=false", "--json", "--db", tmp_path / "other.db",
        )  # fmt: skip
        assert without_creation(found) == without_creation(told)

    def test_tells_how_it_goes(
        self, found: Any, events: list[tuple[Problem, int]], problem: Problem
    ) -> None:
        assert events[0] == (problem, 1)
        assert events[-1] == (problem, 2)

    def test_goes_on_from_the_database(self, found: Any, database: Path, problem: Problem) -> None:
        again = flashtune.search(
            device=find_device("orin"), shapes=[problem], trials=2, jobs=1,
            fixed={"plan": "staged", "pdl": False}, db=str(database),
        )  # fmt: skip
        assert again == found

    def test_best_is_what_the_command_prints(self, found: Any, database: Path) -> None:
        best = flashtune.best("orin", TINY, db=database)
        where = ("--device", "orin", "--shape", TINY, "--db", database)
        assert best == printed("best", *where, "--json")
        assert best["key"] == found["results"][0]["winner"]["key"]
        with pytest.raises(FlashtuneError, match="only predicted"):
            flashtune.best("orin", TINY, db=database, require=True)

    def test_its_records_make_a_table(self, found: Any, database: Path, tmp_path: Path) -> None:
        path, other = tmp_path / "orin.json", tmp_path / "other.db"
        row = flashtune.tables.export("orin", path, shortlist=1, db=database)
        expected = {
            "file": str(path), "device": "orin-nano-super", "records": 1, "shapes": 1,
            "measured": 0, "corrected": 0, "predicted": 1, "less_trusted": None,
        }  # fmt: skip
        assert row == expected
        assert flashtune.tables.check(path) == [expected]
        assert printed("tables", "check", path, "--json")["tables"] == [expected]
        assert flashtune.tables.import_(path, db=other) == [expected]
        [shown] = flashtune.tables.show(path)
        [row] = shown.pop("contents")
        assert shown == expected
        assert (row["provenance"], row["records"]) == ("predicted", 1)
        with Store(other, read_only=True) as store:
            [record] = store.records()
        assert record.key == found["results"][0]["winner"]["key"]
        merged = flashtune.tables.merge(path, path, out=tmp_path / "merged.json")
        assert (merged["records"], merged["conflicts"]) == (1, [])
        assert flashtune.tables.diff(path, tmp_path / "merged.json")["same"] == 1


def test_what_ships_is_found_without_a_database(tmp_path: Path) -> None:
    best = flashtune.best("h200", "qwen3-vl-2b", require=True)
    assert (best["source"], best["provenance"]) == ("prebuilt table", "measured")
    with pytest.raises(FlashtuneError, match=r"no database .*none\.db"):
        flashtune.best("h200", "qwen3-vl-2b", db=tmp_path / "none.db")


def test_defaults_are_those_of_the_command() -> None:
    ours = inspect.signature(flashtune.search).parameters
    command = cli.commands["search"]
    for option in command.params:
        if isinstance(option, click.Option) and option.name in ("trials", "sampler", "seed"):
            assert ours[option.name].default == option.default


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shapes": []}, "at least one shape"),
        ({"shapes": TINY}, r"are lists: write shapes=\[…\]"),
        ({"shapes": ["qwen9"]}, "qwen9"),
        ({"device": "toaster"}, "unknown device"),
        ({"trials": 0}, "trials must be a whole number from 1"),
        ({"trials": 2.5}, "trials must be a whole number"),
        ({"jobs": 0}, "jobs must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295"),
        ({"timeout": 0}, "timeout must be a number of seconds"),
        ({"timeout": "1 h"}, "timeout must be a number of seconds"),
        ({"sampler": "luck"}, "sampler must be one of tpe"),
        ({"fixed": {"plan": "magic"}}, "plan must be one of"),
        ({"fixed": {"spin": 1}}, "unknown knob 'spin'"),
        ({"remote_python": "python4"}, "give remote too"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line(wrong: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"device": "orin", "shapes": [TINY], **wrong}
    with pytest.raises(FlashtuneError, match=said):
        flashtune.search(**arguments)
