"""The command line: what it prints, what it refuses, and what it leaves behind."""

import ast
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from flashtune.kernels.backends.cpp.compiler import compiler_version
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.target import default_config, target_of
from flashtune.kernels.model_folder.folder import read_model
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.kernels.predict.correction import expected_figures
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.tuner import table_check
from flashtune.tuner.cli.main import cli
from flashtune.tuner.here import this_device
from flashtune.tuning_db.device import Device, all_devices, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape
from flashtune.tuning_db.record import Outcome, Provenance, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import TuningTable, prebuilt_paths, write_table

TINY = "vocab=512,hidden=64,clusters=32,probes=4"
FROM_DATABASE = {"source": "user database", "shipped": False}
SEARCH = ("search", "--device", "orin", "--shape", TINY, "--jobs", "1")


@pytest.fixture(autouse=True)
def _no_database_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "usual.db"))


def run(*args: object) -> Result:
    """A command in this process; whatever it does not handle is raised here."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="flashtune")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*args: object) -> str:
    """What a command that must succeed prints."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: object) -> str:
    """The one line with which a command must fail."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    [error] = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    assert error == len(lines) - 1, "the error is one line, and the last"
    assert not any(line.startswith(("Usage:", "Try ")) for line in lines)
    return lines[error]


def commands(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


class TestHelp:
    @pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
    def test_every_command_has_help_with_an_example(self, words: tuple[str, ...]) -> None:
        text = done(*words, "--help")
        assert text == done(*words, "-h")
        if words != ("tables",):
            assert f"flashtune {' '.join(words)}" in text.partition("Example")[2]

    def test_the_version(self) -> None:
        import flashtune

        assert flashtune.__version__ in done("--version")


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("search",), ["--shape", "--model"]),
            (("search", "--shape", "nonsense"), ["'--shape'", "nonsense", "qwen3-vl-2b"]),
            (("search", "--shape", "vocab=512,hidden=64"), ["'--shape'", "lacks clusters"]),
            (("search", "--shape", "vocab=511,hidden=64,clusters=32"), ["'--shape'", "multiple"]),
            (("search", "--shape", f"{TINY},tokens=0"), ["'--shape'", "n_tokens"]),
            (("search", "--shape", f"{TINY},dtype=int4"), ["'--shape'", "int4"]),
            (("search", "--shape", f"{TINY},vocab=1e3"), ["'--shape'", "1e3"]),
            ((*SEARCH, "--device", "gtx"), ["'--device'", "gtx", "nvidia-h200"]),
            ((*SEARCH, "--trials", "0"), ["'--trials'"]),
            ((*SEARCH, "--trials", "many"), ["'--trials'"]),
            ((*SEARCH, "--timeout", "0"), ["'--timeout'"]),
            ((*SEARCH, "--timeout", "-1"), ["'--timeout'"]),
            ((*SEARCH, "--timeout", "nan"), ["'--timeout'", "nan"]),
            ((*SEARCH, "--timeout", "inf"), ["'--timeout'", "inf"]),
            ((*SEARCH, "--timeout", "soon"), ["'--timeout'", "soon"]),
            ((*SEARCH, "--seed", "-1"), ["'--seed'", "-1"]),
            ((*SEARCH, "--seed", str(10**30)), ["'--seed'"]),
            (("search", "--shape", f"{TINY},tokens=1000"), ["'--shape'", "more than 32"]),
            (("show", "--db", "absent.db"), ["'--db'", "absent.db"]),
            (("show",), ["no records", "--device"]),
            (("forget",), ["--record", "--failed"]),
            (("search", "--device", "gpu"), ["'--device'", "finds no GPU"]),
            (
                ("quality", "--model", "m", "--device", "h200"),
                ["'--device'", "H200", "cpu or gpu"],
            ),
            ((*SEARCH, "--jobs", "0"), ["'--jobs'"]),
            ((*SEARCH, "--sampler", "anneal"), ["'--sampler'", "anneal", "tpe"]),
            ((*SEARCH, "--fix", "nonsense=1"), ["'--fix'", "nonsense", "selection"]),
            ((*SEARCH, "--fix", "slack=7"), ["'--fix'", "slack must be one of 0, 8"]),
            ((*SEARCH, "--fix", "slack"), ["'--fix'", "slack"]),
            ((*SEARCH, "--fix", "pdl=true"), ["no valid config", "pdl", "fix fewer"]),
            ((*SEARCH, "--no-such-option"), ["--no-such-option"]),
            (("show", "--limit", "0"), ["'--limit'"]),
            (("show", "--device", "gtx"), ["'--device'", "gtx"]),
            (("best", "--device", "h200"), ["'--shape'"]),
            (("best", "--shape", "qwen3-vl-2b"), ["'--device'"]),
            (("render",), ["--record", "--device", "--shape"]),
            (("render", "--device", "h200"), ["--record", "--device", "--shape"]),
            (("tables", "export", "--device", "gtx", "--output", "x.json"), ["gtx"]),
            (("tables", "export", "--device", "h200"), ["'--out'"]),
            (
                ("tables", "export", "--device", "h200", "--output", "x", "--shortlist", "0"),
                ["'--shortlist'"],
            ),
            (("tables", "import"), ["FILES"]),
            (("tables", "merge", "a.json", "-o", "x.json"), ["two tables"]),
            (("tables", "merge", "a.json", "b.json"), ["'--out'"]),
            (("tables", "diff", "a.json"), ["'B'"]),
            (("tables", "check", "not-there.json"), ["not-there.json"]),
            (("nonsense",), ["nonsense"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_a_bad_option_is_one_line_that_names_it(
        self, args: tuple[str, ...], said: Sequence[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        error = refused(*args)
        assert all(word in error for word in said), error


READERS = [
    ("show",),
    ("best", "--device", "orin", "--shape", TINY),
    ("render", "--record", "3f2a"),
    ("tables", "export", "--device", "orin", "--output", "out.json"),
]
WRITERS = [SEARCH]


class TestDatabases:
    @pytest.mark.parametrize("command", READERS + WRITERS, ids=lambda command: command[0])
    def test_a_corrupt_file_is_refused_and_left_alone(
        self, command: tuple[str, ...], tmp_path: Path
    ) -> None:
        database = tmp_path / "corrupt.db"
        database.write_bytes(b"not a database, whatever it is called" * 100)
        before = database.read_bytes(), sorted(os.listdir(tmp_path))
        error = refused(*command, "--db", database)
        assert str(database) in error
        assert (database.read_bytes(), sorted(os.listdir(tmp_path))) == before

    @pytest.mark.parametrize("command", READERS + WRITERS, ids=lambda command: command[0])
    def test_a_database_of_a_newer_version_is_refused(
        self, command: tuple[str, ...], tmp_path: Path
    ) -> None:
        database = tmp_path / "newer.db"
        Store(database).close()
        with sqlite3.connect(database) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        error = refused(*command, "--db", database)
        assert "newer flashtune (schema 99" in error
        assert "upgrade flashtune" in error

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("/proc/tuning.db", "cannot open or write /proc/tuning.db"),
            ("no/such/folder/tuning.db", "the folder no/such/folder does not exist"),
            (".", ". is not a file: name a database file by --db or FLASHTUNE_DB"),
        ],
    )
    def test_a_path_that_cannot_be_written_is_refused(
        self, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert said in refused(*SEARCH, "--db", name)
        assert os.listdir(tmp_path) == []

    def test_the_environment_names_the_database(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "elsewhere.db"))
        assert "elsewhere.db" in refused("render", "--record", "3f2a")


@pytest.fixture
def table(tmp_path: Path, recorded, problem: Problem, device: Device) -> Path:
    """A good table of one record."""
    path = tmp_path / "good.json"
    record = recorded(default_config(problem, device), 12.0)
    write_table(path, TuningTable(device=device.name, records=(record,)))
    return path


class TestTables:
    def test_an_import_that_fails_half_way_leaves_nothing(
        self, table: Path, tmp_path: Path
    ) -> None:
        database = tmp_path / "tuning.db"
        Store(database).close()
        with sqlite3.connect(database) as connection:
            connection.execute(
                "CREATE TRIGGER full BEFORE INSERT ON measurements "
                "WHEN (SELECT count(*) FROM measurements) = 1 "
                "BEGIN SELECT RAISE(ABORT, 'no more'); END"
            )
        connection.close()
        assert "no more" in refused("tables", "import", table, table, "--db", database)
        with Store(database, read_only=True) as store:
            assert store.records() == []

    def test_a_good_table_is_imported(self, table: Path, tmp_path: Path) -> None:
        assert "1 records of orin-nano-super (1 measured), all valid" in done(
            "tables", "check", table
        )
        assert "1 records" in done("tables", "import", table, "--db", tmp_path / "new.db")
        [record] = json.loads(done("show", "--json", "--db", tmp_path / "new.db"))
        assert record["measurement"]["median_us"] == 12.0

    @pytest.mark.parametrize("command", ["import", "check"])
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"plan": "../../x"}, "plan must be one of staged, persistent"),
            ({"plan": ["staged"]}, ""),
            ({"score_rows": "1); import os"}, "score_rows must be one of"),
            ({"score_rows": True}, "score_rows must be one of"),
            ({"score_rows": 1.0}, "score_rows must be one of"),
            ({"score_rows": 3}, "score_rows must be one of"),
            ({"evict": "evict_first'); import os"}, "evict must be one of"),
            ({"extra": 1}, "check extra"),
            ({"score_block": 4096}, "wider than the hidden size"),
            ({"pdl": True}, "sm_90"),
            ({"gather_programs_per_sm": 2}, "has no effect"),
        ],
        ids=str,
    )
    def test_hostile_configs_are_refused_before_anything_renders(
        self,
        table: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: str,
        change: dict[str, Any],
        said: str,
    ) -> None:
        data = json.loads(table.read_text())
        data["records"][0]["config"].update(change)
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(data))
        rendered: list[str] = []

        def render(template: str, values: object) -> str:
            rendered.append(template)
            return ""

        monkeypatch.setattr("flashtune.kernels.plans.candidate.render", render)
        files = [table, bad] if command == "import" else [bad]
        error = refused("tables", command, *files)
        assert len(rendered) == len(files) - 1  # the good one alone
        assert str(bad) in error
        assert said in error
        assert not (tmp_path / "usual.db").exists()  # the good one is not imported either

    @pytest.mark.parametrize(
        "change",
        [
            {"schema_version": 2},
            {"schema_version": "1"},
            {"device": "gtx"},
            {"device": "orin"},
            {"records": {}},
            {"unknown": 1},
        ],
        ids=str,
    )
    def test_tables_of_another_kind_are_refused(self, table: Path, change: dict[str, Any]) -> None:
        table.write_text(json.dumps({**json.loads(table.read_text()), **change}))
        for command in ("import", "check"):
            assert str(table) in refused("tables", command, table)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": NaN}'])
    def test_what_is_no_table_is_refused(self, table: Path, text: str) -> None:
        table.write_text(text)
        assert str(table) in refused("tables", "import", table)

    def test_a_table_that_is_not_as_exported_does_not_pass(self, table: Path) -> None:
        table.write_text(json.dumps(json.loads(table.read_text())))
        assert "export it again" in refused("tables", "check", table)

    def test_a_failure_does_not_pass(
        self, table: Path, recorded, problem: Problem, device: Device
    ) -> None:
        record = recorded(default_config(problem, device), None)
        write_table(table, TuningTable(device=device.name, records=(record,)))
        assert "has the outcome crash" in refused("tables", "check", table)

    def test_tables_are_merged_and_compared(
        self, table: Path, tmp_path: Path, recorded, problem: Problem, device: Device
    ) -> None:
        mine, out = tmp_path / "mine.json", tmp_path / "out.json"
        record = recorded(default_config(problem, device), 6.0)
        write_table(mine, TuningTable(device=device.name, records=(record,)))
        text = done("tables", "merge", table, mine, "-o", out)
        assert f"512x64 c32 p4: {mine}: 6.000 us is faster than 12.000" in text
        assert out.read_text() == mine.read_text()
        data = json.loads(done("tables", "merge", out, table, "--output", out, "--json"))
        [conflict] = data["conflicts"]
        assert (data["records"], conflict["taken_from"]) == (1, str(out))
        assert conflict["left"]["measurement"]["median_us"] == 12.0
        assert out.read_text() == mine.read_text()
        text = done("tables", "diff", table, mine)
        assert text.splitlines() == [
            f"1 shapes changed, 0 only in {table}, 0 only in {mine}, 0 the same",
            "512x64 c32 p4: 12.000 -> 6.000 us (x 0.500)",
        ]
        assert json.loads(done("tables", "diff", mine, out, "--json"))["same"] == 1

    def test_merging_leaves_the_output_alone_when_a_table_is_bad(
        self, table: Path, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.json"
        bad.write_text("{")
        before = table.read_text()
        assert str(bad) in refused("tables", "merge", table, bad, "-o", table)
        assert table.read_text() == before

    def test_exporting_nothing_says_so(self, tmp_path: Path) -> None:
        Store(tmp_path / "usual.db").close()
        error = refused("tables", "export", "--device", "h200", "--output", tmp_path / "out.json")
        assert "no record" in error
        assert not (tmp_path / "out.json").exists()

    def test_a_config_that_does_not_compile_is_named(
        self, table: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Backend:
            def compile(self, *_: object) -> None:
                raise RuntimeError("ptxas fell over")

        monkeypatch.setattr(table_check, "backend_of", lambda device: Backend())
        error = refused("tables", "check", "--compile", table)
        assert "512x64 c32 p4: does not compile: ptxas fell over" in error


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = json.loads(done("devices", "--json"))
    *registered, cpu = rows
    assert [row["name"] for row in registered] == [device.name for device in all_devices()]
    assert not any(row["here"] for row in registered)
    assert all(row["source"] and row["memory_bandwidth"] > 1e10 for row in registered)
    assert cpu["here"] and cpu["aliases"] == ["cpu"]
    assert done("devices").count("this") == 1


def test_devices_say_whose_predictions_miss_what_was_published() -> None:
    text = " ".join(done("devices").split())
    assert "agx-thor: less trusted: predictions miss 7 of 9 published savings" in text
    assert "agx-orin: predictions miss 0 of 5" in text
    rows = {row["name"]: row for row in json.loads(done("devices", "--json"))}
    assert rows["agx-thor"]["less_trusted"].startswith("less trusted: ")
    assert rows["agx-orin"]["less_trusted"] is None
    assert rows["agx-orin"]["evidence"]["missed"] == 0
    assert rows["nvidia-l4"]["evidence"] is None


def test_devices_are_probed_and_the_probe_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orin = find_device("orin")
    half = replace(expected_figures(shipped_model(), orin), bandwidth=5e10, overlapped_us=None)
    target = replace(
        target_of(orin),
        torch_device="cpu",
        probe=lambda device, where: half,
        conditions=lambda where: {"power mode": "15W"},
    )
    for module in ("tuner.probe", "kernels.runtime.correction"):
        monkeypatch.setattr(f"flashtune.{module}.target_of", lambda device: target)
    monkeypatch.setattr("flashtune.tuner.probe.devices_here", lambda: [orin])
    database = tmp_path / "probed.db"
    [probed] = json.loads(done("devices", "--probe", "--json", "--db", database))
    assert probed["figures"]["bandwidth"] == 5e10
    assert probed["figures"]["overlapped_us"] is None
    assert probed["expected"]["bandwidth"] == pytest.approx(0.96 * orin.memory_bandwidth)
    assert probed["conditions"] == {"power mode": "15W"}
    with Store(database, read_only=True) as store:
        records = store.records()
        assert store.probe(orin.name, {"power mode": "15W"}) is not None
    assert len(records) == probed["corrected"] > 100
    assert {each.provenance for each in records} == {Provenance.CORRECTED}
    text = " ".join(done("devices", "--probe", "--db", database).split())
    assert "memory reads GB/s 50.0" in text
    assert "records corrected; power mode 15W" in text
    shown = done("show", "--device", "orin", "--shape", "qwen3-vl-2b", "--db", database)
    assert "corrected" in shown
    best = json.loads(
        done("best", "--device", "orin", "--shape", "qwen3-vl-2b", "--db", database, "--json")
    )
    assert best["provenance"] == "corrected"


def test_tables_show_where_their_times_come_from(tmp_path: Path) -> None:
    [thor] = json.loads(done("tables", "show", shipped("agx-thor"), "--json"))
    assert (thor["measured"], thor["corrected"]) == (0, 0)
    assert (
        thor["predicted"] == thor["records"] == sum(each["records"] for each in thor["contents"])
    )
    text = " ".join(done("tables", "show", shipped("agx-thor")).split())
    assert f"{thor['records']} records of agx-thor ({thor['predicted']} predicted)" in text
    assert "less trusted: predictions miss 7 of 9" in text
    text = done("tables", "check", shipped("agx-thor"))
    assert "less trusted: predictions miss 7 of 9" in text
    [h200] = json.loads(done("tables", "show", shipped("nvidia-h200"), "--json"))
    assert h200["measured"] > 0 and h200["less_trusted"] is None
    [row] = [
        each for each in h200["contents"] if each["problem"] == parse_shape("qwen3-vl-2b").data()
    ]
    assert row["provenance"] == "measured"
    assert "less trusted" not in done("tables", "check", shipped("nvidia-h200"))


def shipped(name: str) -> Path:
    [path] = [each for each in prebuilt_paths() if each.stem == name]
    return path


def test_without_a_gpu_a_search_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_device() == this_cpu()


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A database with a search of three trials, and what that search printed."""
    database = tmp_path_factory.mktemp("predicted") / "tuning.db"
    return database, json.loads(done(*SEARCH, "--trials", 3, "--db", database, "--json"))


Predicted = tuple[Path, dict[str, Any]]


class TestAPredictedSearch:
    def test_its_results_are_data(self, predicted: Predicted, problem: Problem) -> None:
        _, data = predicted
        [result] = data["results"]
        assert (data["device"], data["provenance"]) == ("orin-nano-super", "predicted")
        assert Problem.from_json(result["problem"]) == problem
        assert (result["evaluated"], result["failed"]) == (3, 0)
        assert result["default_us"] > result["floor_us"] > 0
        assert result["winner"]["provenance"] == "predicted"
        assert result["winner"]["measurement"]["median_us"] <= result["default_us"]

    def test_its_records_never_pass_for_measured(self, predicted: Predicted) -> None:
        records = json.loads(done("show", "--db", predicted[0], "--json"))
        assert len(records) == 3
        assert {record["provenance"] for record in records} == {"predicted"}
        assert all("stages" in record["measurement"]["policy"] for record in records)
        assert all(record["toolchain"]["torch"] == "" for record in records)

    def test_a_person_is_told(self, predicted: Predicted) -> None:
        """The same search again has nothing left to evaluate, and says the same."""
        database, data = predicted
        result = run(*SEARCH, "--trials", 3, "--db", database)
        assert result.exit_code == 0
        assert "PREDICTED" in result.stderr
        assert "none are measured" in result.stderr
        assert "predicted" in result.stdout
        again = json.loads(done(*SEARCH, "--trials", 3, "--db", database, "--json"))
        assert again == data

    def test_show_and_best(self, predicted: Predicted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        database, data = predicted
        winner = data["results"][0]["winner"]
        where = ("--device", "orin", "--shape", TINY, "--db", database)
        assert json.loads(done("best", *where, "--json")) == {**winner, **FROM_DATABASE}
        rows = json.loads(done("show", *where, "--json", "--limit", 2))
        assert len(rows) == 2
        assert rows[0] == {**winner, **FROM_DATABASE}
        assert winner["key"][:12] in done("best", *where)
        assert "2 of 3 records" in done("show", *where, "--limit", 2)
        shipped = json.loads(done("show", "--device", "h200", "--db", database, "--json"))
        assert shipped and all(row["shipped"] for row in shipped)
        missing = refused("best", "--device", "a40", "--shape", TINY, "--db", database)
        assert "512x64 c32 p4" in missing
        assert "flashtune search" in missing

    def test_a_folder_of_tables_is_known(
        self, predicted: Predicted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database, data = predicted
        shape, none = ("--device", "orin", "--shape", TINY), ("--db", tmp_path / "none.db")
        Store(tmp_path / "none.db").close()
        folder = tmp_path / "fleet"
        folder.mkdir()
        done("tables", "export", "--device", "orin", "--out", folder / "a.json", "--db", database)
        monkeypatch.setenv("FLASHTUNE_TABLES", str(folder))
        monkeypatch.setenv("COLUMNS", "200")
        best = json.loads(done("best", *shape, *none, "--json"))
        assert (best["source"], best["shipped"]) == ("added table", False)
        assert best["key"] == data["results"][0]["winner"]["key"]
        shown = done("show", *shape, *none)
        assert "predicted+" in shown and "+ of a table in FLASHTUNE_TABLES" in shown
        assert f"{folder / 'a.json'}: 3 records" in done("tables", "check")
        (folder / "b.json").write_text("{")
        assert "b.json" in refused("tables", "check")
        assert json.loads(done("best", *shape, *none, "--json")) == best

    def test_best_can_require_what_was_measured(
        self, predicted: Predicted, tmp_path: Path
    ) -> None:
        where = ("--device", "orin", "--shape", TINY)
        why = refused("best", *where, "--db", predicted[0], "--require")
        assert "no measured record of 512x64 c32 p4 on orin-nano-super (it was only" in why
        with Store(predicted[0], read_only=True) as store:
            [record, *_] = store.records()
        with Store(tmp_path / "measured.db") as store:
            store.add(replace(record, provenance=Provenance.MEASURED))
        found = json.loads(
            done("best", *where, "--db", tmp_path / "measured.db", "--require", "--json")
        )
        assert found["key"] == record.key

    def test_render_prints_the_source_of_the_record(
        self, predicted: Predicted, problem: Problem, device: Device
    ) -> None:
        database, data = predicted
        winner = data["results"][0]["winner"]
        source = done("render", "--record", winner["key"][:10].upper(), "--db", database)
        ast.parse(source)
        config = parse_config(winner["config"])
        assert source == Candidate(problem, config, device).source
        default = done("render", "--device", "orin", "--shape", TINY)
        assert default == Candidate(problem, default_config(problem, device), device).source
        assert "not a record's key" in refused("render", "--record", "xyz", "--db", database)
        assert "no record's key" in refused("render", "--record", "f" * 32, "--db", database)

    def test_a_table_goes_round(self, predicted: Predicted, tmp_path: Path) -> None:
        database, data = predicted
        path, other = tmp_path / "orin.json", tmp_path / "other.db"
        done("tables", "export", "--device", "orin", "--shortlist", 2, "--output", path,
             "--db", database)  # fmt: skip
        assert "2 records" in done("tables", "check", "--compile", path)
        done("tables", "import", path, "--db", other)
        [winner] = [data["results"][0]["winner"]]
        back = json.loads(done("show", "--db", other, "--json"))
        assert len(back) == 2
        assert {**back[0], "measurement": None} == {
            **winner, "measurement": None, **FROM_DATABASE
        }  # fmt: skip
        assert back[0]["measurement"]["median_us"] == pytest.approx(
            winner["measurement"]["median_us"], abs=1e-3
        )
        again = tmp_path / "again.json"
        done("tables", "export", "--device", "orin", "--output", again, "--db", other)
        assert again.read_text() == path.read_text()


class TestOptions:
    def test_earlier_spellings_are_read_and_not_shown(self, table: Path, tmp_path: Path) -> None:
        for name in ("--out", "--output", "-o"):
            done("tables", "merge", table, table, name, tmp_path / f"made{name}.json")
            assert (tmp_path / f"made{name}.json").exists()
        for words in (("tables", "merge"), ("cluster",), ("model", "fit"), ("model", "check")):
            assert "--output" not in done(*words, "--help")
        assert "--model " not in done("model", "check", "--help")

    def test_an_option_means_the_same_in_every_command(self) -> None:
        """Of one name there is one kind of value; but a device may have to be this machine's."""
        kinds: dict[str, set[str]] = {}
        for words, command in commands():
            for option in command.params:
                if isinstance(option, click.Option) and words != ("search",):
                    kinds.setdefault(option.opts[0], set()).add(option.type.name)
        assert {name for name, found in kinds.items() if len(found) > 1} == {"--out"}
        assert kinds["--out"] == {"file", "path"}

    def test_search_help_lists_presets_and_knobs(self) -> None:
        text = " ".join(done("search", "--help").split())
        assert "Presets: qwen3-vl-2b, qwen3-0.6b" in text
        assert "Knobs of plan=staged: selection, widen, score_rows" in text
        assert "Knobs of plan=cpp_fused: " in text

    def test_gp_without_scipy_is_said_before_the_first_trial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "scipy", None)
        error = refused(*SEARCH, "--sampler", "gp", "--db", tmp_path / "a.db")
        assert "install flashtune[gp]" in error
        assert kept(tmp_path / "a.db") == []


@pytest.fixture
def database(tmp_path: Path, recorded, problem: Problem, device: Device) -> Path:
    """Records of three configs: one that is measured, and two that failed."""
    path = tmp_path / "three.db"
    default = default_config(problem, device)
    with Store(path) as store:
        store.add(recorded(default, 12.0))
        store.add(recorded(replace(default, slack=8), None))
        store.add(recorded(default, None, device="nvidia-h200"))
    return path


def test_ctrl_c_while_connecting_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashtune.tuner.fleet.fleets.find_machines", stopped)
    result = run(*SEARCH, "--remote", "there")
    assert (result.exit_code, result.output) == (130, "connecting to there\n")


def test_trouble_with_a_file_is_one_line(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(table_check, "checked_table", locked)
    assert refused("tables", "check", table) == f"Error: {table}: Permission denied"


class TestForget:
    def test_it_shows_what_it_removes_and_wants_a_yes(self, database: Path) -> None:
        result = run("forget", "--failed", "--device", "orin", "--db", database)
        assert result.exit_code == 2 and "give --yes" in result.stderr
        assert "illegal access" in result.stdout
        assert len(kept(database)) == 3
        text = done("forget", "--failed", "--device", "orin", "--yes", "--db", database)
        assert "illegal access" in text and "1 records removed" in text
        left = {(record.device, record.measurement.outcome) for record in kept(database)}
        assert left == {("orin-nano-super", Outcome.OK), ("nvidia-h200", Outcome.CRASH)}

    def test_measurements_go_with_their_record(self, database: Path) -> None:
        [measured] = [each for each in kept(database) if each.measurement.median_us]
        done("forget", "--record", measured.key[:8], "--yes", "--db", database)
        with Store(database, read_only=True) as store:
            assert store.measurements(measured.key) == []
            assert len(store.records()) == 2
        text = done("forget", "--shape", "qwen3-0.6b", "--yes", "--db", database)
        assert "no such record" in text
        assert len(kept(database)) == 2


def test_nothing_that_works_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each config fails here as one does that the model does not cover; then it is tried again."""

    def fails(*_: Any) -> None:
        raise FlashtuneError("no luck today")

    where = (*SEARCH, "--trials", 2, "--db", tmp_path / "a.db")
    with monkeypatch.context() as patch:
        patch.setattr("flashtune.tuner.search.evaluate.predict", fails)
        result = run(*where)
    assert result.exit_code == 1, result.output
    assert "no config worked: invalid: no luck today" in " ".join(result.stdout.split())
    result = run(*where, "--json")
    assert result.exit_code == 1, "failures are not tried again unasked"
    [found] = json.loads(result.stdout)["results"]
    assert found["failure"] == {"reason": "invalid: no luck today", "count": 2, "remedy": ""}
    [found] = json.loads(done(*where, "--retry-failed", "--json"))["results"]
    assert (found["evaluated"], found["failed"]) == (2, 0)
    assert found["winner"]["provenance"] == "predicted"


def test_a_winner_keeps_what_is_fixed(predicted: Predicted, tmp_path: Path) -> None:
    """Another plan's record, however fast, is not the result of a search that leaves it out."""
    [found] = predicted[1]["results"]
    database = shutil.copy(predicted[0], tmp_path / "copy.db")
    [fixed] = json.loads(
        done(*SEARCH, "--trials", 1, "--fix", "plan=persistent", "--json", "--db", database)
    )["results"]
    assert found["winner"]["config"]["plan"] != "persistent"
    assert fixed["winner"]["config"]["plan"] == "persistent"
    slower = fixed["winner"]["measurement"]["median_us"]
    assert slower > found["winner"]["measurement"]["median_us"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_search_on_this_machine_measures(tmp_path: Path) -> None:
    """With a real compiler and real workers: the default and the baseline, then both again."""
    where = ("--device", "cpu", "--shape", TINY, "--db", tmp_path / "tuning.db")
    result = run("search", *where, "--jobs", 1, "--trials", 2, "--json")
    assert result.exit_code == 0, result.output
    assert "PREDICTED" not in result.stderr
    data = json.loads(result.stdout)
    [found] = data["results"]
    assert data["provenance"] == "measured"
    assert (found["evaluated"], found["failed"]) == (2, 0)
    assert found["winner"]["measurement"]["policy"] == "final"
    assert found["winner"]["toolchain"]["compiler"] == compiler_version()
    best = json.loads(done("best", *where, "--require", "--json"))
    assert best == {**found["winner"], **FROM_DATABASE}
    assert 0 < found["default_us"] < 10_000


CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
from flashtune.tuner.cli.main import cli
cli(prog_name="flashtune")
"""


def begin(database: Path, after: int) -> subprocess.Popen[str]:
    """A search in a process of its own that has evaluated more than `after` configs."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *SEARCH, "--trials", "1000", "--db", str(database)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while len(kept(database)) <= after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def kept(database: Path) -> list[Record]:
    try:
        with Store(database, read_only=True) as store:
            return store.records()
    except FlashtuneError:  # not there yet, or nothing in it
        return []


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def test_a_search_that_is_stopped_or_killed_goes_on_later(tmp_path: Path) -> None:
    """Ctrl-C, then kill -9, then to the end: one test, since processes take long to start."""
    database = tmp_path / "tuning.db"
    first = begin(database, after=1)
    workers = children(first.pid)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    stopped = kept(database)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert "predicted" in out  # what there is, is shown
    assert "INTERRUPTED: 1 of 1 shapes begun" in out
    assert len(stopped) > 1

    second = begin(database, after=len(stopped))
    workers += children(second.pid)
    assert len(workers) == 2
    second.kill()
    second.communicate(timeout=60)
    killed = kept(database)
    assert len(killed) > len(stopped)
    assert {each.key for each in stopped} < {each.key for each in killed}

    total = len(killed) + 2
    [result] = json.loads(done(*SEARCH, "--trials", total, "--db", database, "--json"))["results"]
    assert result["evaluated"] == total
    with Store(database, read_only=True) as store:
        records = store.records()
        assert len(records) == total
        assert all(len(store.measurements(each.key)) == 1 for each in records)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
              for pid in workers):  # fmt: skip
        assert time.monotonic() < end, "a worker outlived its search"
        time.sleep(0.05)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A model's folder: `model(hidden_size=128)`; a config of text is written as it is."""

    def make(
        config: dict[str, Any] | str | None = None,
        tensors: dict[str, torch.Tensor] | bytes | None = None,
        below: str = "",
    ) -> Path:
        folder = tmp_path / "model"
        assets = folder / below
        assets.mkdir(parents=True)
        if config is None:
            config = {"hidden_size": 64, "dtype": "bfloat16", "n_probes": 4}
        if config != "absent":
            text = config if isinstance(config, str) else json.dumps(config)
            (folder / "config.json").write_text(text)
        path = assets / "clustering_cache.safetensors"
        if isinstance(tensors, bytes):
            path.write_bytes(tensors)
        else:
            save_file(clustering() if tensors is None else tensors, path)
        return folder

    return make


def clustering(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "centroids": torch.zeros(64, 32),
        "cluster_assignments": torch.zeros(512, dtype=torch.int64),
        **changes,
    }


class TestModels:
    @pytest.mark.parametrize("below", ["", "flash_head_assets", "elsewhere"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_folder_is_read_as_its_problem(
        self, model, problem: Problem, below: str, nested: bool
    ) -> None:
        text = {"hidden_size": 64, "dtype": "bfloat16"}
        config = {"text_config": text} if nested else {**text, "text_config": ["odd"]}
        folder = model(
            {**config, "n_probes": 4, "flash_head_cache_dir": below or "x"}, below=below
        )
        assert read_model(folder) == problem

    @pytest.mark.parametrize(
        ("config", "tensors", "file", "said"),
        [
            ("absent", None, "config.json", "give a model folder"),
            ("{", None, "config.json", "not JSON"),
            ("[]", None, "config.json", "JSON object"),
            ({"hidden_size": 128}, None, "clustering_cache.safetensors", "hidden_size 128"),
            ({}, None, "clustering_cache.safetensors", "hidden_size None"),
            ({"hidden_size": 64, "dtype": "int8"}, None, "config.json", "int8"),
            ({"hidden_size": 64, "n_probes": 33}, None, "config.json", "n_probes 33"),
            ({"hidden_size": 64, "n_probes": "many"}, None, "config.json", "'many'"),
            ({"hidden_size": 64, "n_probes": 0}, None, "config.json", "n_probes"),
            (None, b"", "clustering_cache.safetensors", "is not a complete safetensors file"),
            (
                None,
                b"\xff" * 64,
                "clustering_cache.safetensors",
                "is not a complete safetensors file",
            ),
            (None, {"centroids": torch.zeros(64, 32)}, "clustering_cache.safetensors", "assign"),
            (
                None,
                clustering(centroids=torch.zeros(64)),
                "clustering_cache.safetensors",
                "centroids has shape [64]",
            ),
        ],
    )
    def test_what_is_wrong_is_said_of_the_file(
        self, model, config: Any, tensors: Any, file: str, said: str
    ) -> None:
        folder = model(config, tensors)
        error = refused("search", "--device", "orin", "--model", folder)
        assert "'--model'" in error
        assert str(folder / file) in error
        assert said in error

    def test_a_folder_without_clusters_is_no_flash_head_model(self, model) -> None:
        folder = model()
        (folder / "clustering_cache.safetensors").unlink()
        error = refused("search", "--device", "orin", "--model", folder)
        assert "clustering_cache.safetensors: no such file" in error

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        error = refused("search", "--device", "orin", "--model", tmp_path / "absent")
        assert "absent/config.json" in error
