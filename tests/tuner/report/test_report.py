"""The page of a report and Optuna's studies, of a few dozen records that nobody measured."""

import html
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.config import config_data
from flashtune.tuner.cli.main import cli
from flashtune.tuner.report import figure
from flashtune.tuner.report.comparison import cost_of_choice, coverage, crossings
from flashtune.tuner.report.content import read_sections
from flashtune.tuner.report.figure import history, importance, require_plotly
from flashtune.tuner.search.space import Space
from flashtune.tuner.search.study import searches, space_of, trials_of
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import TuningTable, write_table

EVIL = "</script><script>alert(1)</script> & <b>"
LOOK = """<script>
let errors = 0;
addEventListener("error", () => { errors += 1; });
addEventListener("load", () => setTimeout(() => {
  const all = (words) => [...document.querySelectorAll(words)];
  const cut = all(".legend").filter((legend) => {
    const [one, plot] = [legend, legend.closest(".js-plotly-plot")]
      .map((each) => each.getBoundingClientRect());
    return one.left < plot.left || one.right > plot.right || one.bottom > plot.bottom + 1;
  });
  document.body.dataset.seen = JSON.stringify({
    errors, cut: cut.length, plots: all(".js-plotly-plot").length, legends: all(".legend").length,
    scrolled: all(".legend .scrollbar").filter((bar) => +bar.getAttribute("height") > 0).length,
    too_wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
  });
}, 1000));
</script>"""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def database(
    tmp_path_factory: pytest.TempPathFactory,
    problem: Problem,
    device: Device,
    recorded: Callable[..., Record],
    free_space: Callable[..., Space],
) -> Path:
    """Random configs of a plan, whose time is that of `slack` above all; every fifth failed.

    The first, the default, is timed again as a finalist. One record is of a CPU elsewhere.
    """
    path = tmp_path_factory.mktemp("report") / "tuning.db"
    default = default_config(problem, device)
    data = config_data(default)
    space = free_space("slack", "evict", "score_rows", "score_warps")
    others = [config for config in space.configs() if config != default]
    configs = [default, *random.Random(0).sample(others, 47)]
    failed = Measurement(outcome=Outcome.CRASH, error=f"illegal access {EVIL}")
    slow = Measurement(outcome=Outcome.PRUNED, median_us=90.0, error="too slow")
    with Store(path) as store:
        for number, config in enumerate(configs):
            time_us = 20.0 + abs(config_data(config)["slack"] - data["slack"]) + number / 50
            record = recorded(config, time_us)
            if number % 5 == 4:
                record = recorded(config, 20.0, measurement=failed)
            elif number == 7:
                record = recorded(config, 20.0, measurement=slow)
            store.add(record)
        final = Measurement(outcome=Outcome.OK, median_us=18.0, policy="final-behind")
        store.add(recorded(default, 18.0, measurement=final))
        store.add(recorded(default, 700.0, device="cpu-of-another-machine"))
    return path


def run(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


class TestSearchesOnRecord:
    def test_are_told_apart_and_in_their_order(self, database: Path, device: Device) -> None:
        with Store(database, read_only=True) as store:
            elsewhere, found = searches(store)
            assert searches(store, device.name) == [found]
        assert len(found.evaluated) == 48
        assert found.evaluated[0].first.median_us == 20.0
        assert found.evaluated[0].record.measurement.median_us == 18.0, "timed again at the end"
        assert found.name == "orin-nano-super 512x64 c32 p4 measured triton 3.6.0"
        assert (elsewhere.device, space_of(elsewhere)) == ("cpu-of-another-machine", None)

    def test_become_trials(self, database: Path, device: Device) -> None:
        with Store(database, read_only=True) as store:
            [found] = searches(store, device.name)
        space = space_of(found)
        assert space is not None
        trials = trials_of(found, space)
        assert len(trials) == len(found.evaluated)
        states = [trial.state.name for trial in trials]
        assert states[0] == "COMPLETE" and trials[0].value == 18.0
        assert states[4] == "FAIL" and EVIL in trials[4].user_attrs["error"]
        assert states[7] == "PRUNED" and trials[7].intermediate_values == {0: 90.0}
        assert trials[0].user_attrs["record"] == found.evaluated[0].record.key

    def test_say_which_knob_matters(self, database: Path, device: Device) -> None:
        [section] = read_sections(database, device)
        [study] = section.studies.values()
        found = importance(study)
        assert max(found, key=lambda name: found[name]) == "slack"
        assert section.default_us == 18.0 == section.best.measurement.median_us  # type: ignore[union-attr]
        assert section.outcomes["crash"] == sum(section.reasons.values()) > 0
        assert section.choice is not None and section.choice.record == section.best

    def test_can_be_opened_by_optuna(self, database: Path, tmp_path: Path) -> None:
        storage = f"sqlite:///{tmp_path / 'studies.db'}"
        text = run("studies", "export", "--storage", storage, "--db", database)
        assert "left out: 1 searches on devices that only" in text
        [name] = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=name, storage=storage)
        assert f"{name}: {len(study.trials)} trials" in text
        assert study.best_value == 18.0
        for words, said in (
            (("--storage", storage), "a study named 'orin-nano-super"),
            (("--storage", "nonsense"), "cannot write to the storage nonsense"),
            (("--storage", f"sqlite:///{tmp_path}/no/a.db"), "cannot write to the storage"),
            (("--storage", storage, "--device", "a40"), "no such record"),
        ):
            result = CliRunner().invoke(cli, ["studies", "export", *words, "--db", str(database)])
            assert isinstance(result.exception, SystemExit) and result.exit_code == 2
            assert said in result.stderr and len(result.stderr.splitlines()) == 1


class TestComparisons:
    def test_show_how_much_of_each_knob_was_tried(self, database: Path, device: Device) -> None:
        [section] = read_sections(database, device)
        knobs = {each.knob: each for each in coverage(section.trials)}
        slack = knobs["slack"]
        tried = Counter(trial.params["staged.slack"] for trial in section.trials)
        assert {
            choice: each.configs for choice, each in slack.choices.items() if each.configs
        } == (tried)
        assert slack.tried == len(tried) > 1
        default = config_data(default_config(section.search.problem, device))
        assert slack.choices[default["slack"]].best_us == 18.0
        never = [each for each in knobs["gather_block"].choices.values() if not each.configs]
        assert never and all(each.best_us == math.inf for each in never)

    @pytest.fixture
    def two_shapes(
        self, problem: Problem, device: Device, recorded: Callable[..., Record], tmp_path: Path
    ) -> Path:
        """Two shapes, whose winners differ; of one, the other's winner was not timed."""
        wider = replace(problem, n_probes=8)
        one = default_config(problem, device)
        other = replace(one, slack=2 * one.slack)
        path = tmp_path / "two.db"
        with Store(path) as store:
            store.add(recorded(one, 10.0), recorded(other, 12.0))
            store.add(recorded(other, 20.0, problem=wider))
        return path

    def test_show_what_one_config_for_all_shapes_costs(
        self, two_shapes: Path, device: Device
    ) -> None:
        sections = read_sections(two_shapes, device)
        [crossing] = crossings(sections)
        assert crossing.device == device.name and len(crossing.configs) == 2
        names = [f"{each.search.problem.describe()} measured" for each in sections]
        assert [row[0] for row in crossing.rows] == names
        both, single = sorted(crossing.rows, key=lambda row: None in row[1])
        assert sorted(each or 0 for each in both[1]) == [1.0, 1.2] and both[1][both[2]] == 1.0
        assert single[1][single[2]] == 1.0 and None in single[1]
        assert crossings(sections[:1]) == []
        assert [cost_of_choice(each) for each in sections] == [1.0, 1.0]

    def test_are_of_all_given_shapes(self, two_shapes: Path, device: Device) -> None:
        every = [each.search.problem for each in read_sections(two_shapes, device)]
        assert len(every) == 2
        for problems in (every[:1], every[1:], every):
            sections = read_sections(two_shapes, device, problems)
            assert [each.search.problem for each in sections] == problems

    def test_show_what_changed_since_a_table(
        self, two_shapes: Path, problem: Problem, recorded: Callable[..., Record],
        device: Device, tmp_path: Path,
    ) -> None:  # fmt: skip
        pytest.importorskip("plotly")
        table = tmp_path / "before.json"
        slower = recorded(default_config(problem, device), 15.0)
        write_table(table, TuningTable(device=device.name, records=(slower,)))
        out = tmp_path / "report.html"
        run("report", "-o", out, "--db", two_shapes, "--before", table)
        read = _Page()
        read.feed(out.read_text("utf-8"))
        words = " ".join(read.text.split())
        assert f"Since the earlier table of {device.name}" in words
        assert "1 shapes changed, 0 the same, 0 only in the table, 1 only in the database" in words
        assert f"{problem.describe()}15.010.0 0.67measured" in words, "cells of one row"
        assert "What one config for several shapes costs" in words
        assert "1.20" in words and "1.00 *" in words
        assert "Choices that were tried" in words
        result = CliRunner().invoke(
            cli, ["report", "-o", str(out), "--db", str(two_shapes), "--before", str(two_shapes)]
        )
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


class _Page(HTMLParser):
    """What of a page a browser would fetch, and which elements it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")
        names = ("src", "data", "poster") if tag != "link" else ("href",)
        self.fetched += [str(value) for name, value in attrs if name in names]

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


class TestAReport:
    @pytest.fixture
    def page(self, database: Path, tmp_path: Path) -> Path:
        pytest.importorskip("plotly")
        out = tmp_path / "report.html"
        said = run("report", "-o", out, "--db", database)
        assert re.fullmatch(rf"{re.escape(str(out))}: 2 searches, \d+ trials\n", said)
        return out

    def test_is_one_page_that_fetches_nothing(self, page: Path) -> None:
        read = _Page()
        read.feed(page.read_text("utf-8"))
        assert read.fetched == []
        assert len(read.scripts[0]) > 1_000_000, "plotly itself"
        drawn = [script for script in read.scripts if "Plotly.newPlot" in script]
        for title in (
            "Time against the byte floor", "Trials", "Importance of the knobs of plan staged",
            "Knobs of plan staged: the 38 fastest of 38 configs", "Outcomes",
        ):  # fmt: skip
            assert title in read.text, title
        for name in ("best so far", "byte floor", "parcoords"):
            assert name in "\n".join(drawn), name

    def test_says_what_failed_and_what_a_head_would_run(self, page: Path, device: Device) -> None:
        read = _Page()
        text = page.read_text("utf-8")
        read.feed(text)
        assert f"crash: illegal access {EVIL}" in read.text
        assert "<script>alert(1)" not in text and html.escape(EVIL) in text
        assert "A head would run: staged" in read.text
        assert "user database: measured on orin-nano-super" in read.text
        assert "Only its own machine can describe this device" in read.text

    def test_shows_the_best_so_far(self, database: Path, device: Device) -> None:
        pytest.importorskip("plotly")
        [section] = read_sections(database, device)
        traces = {trace.name: trace for trace in history(section).data}
        line = list(traces["best so far"].y)
        assert len(line) == len(section.search.evaluated)
        assert line == sorted(line, reverse=True) and line[-1] == 20.0
        assert len(traces["failed"].x) == section.outcomes["crash"]
        assert list(traces["too slow"].y) == [90.0]

    def test_is_of_the_device_and_shape_that_are_named(
        self, database: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("plotly")
        out = tmp_path / "orin.html"
        words = ("report", "-o", out, "--db", database)
        assert "1 searches" in run(*words, "--device", "orin")
        assert "another-machine" not in out.read_text("utf-8")
        result = CliRunner().invoke(cli, [*map(str, words), "--shape", "qwen3-vl-2b"])
        assert result.exit_code == 2 and "run `flashtune search`" in result.stderr

    def test_without_plotly_one_line_says_what_to_install(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
        with pytest.raises(FlashtuneError, match=r"pip install 'flashtune\[report\]'"):
            require_plotly()
        out = tmp_path / "report.html"
        result = CliRunner().invoke(cli, ["report", "-o", str(out), "--db", str(database)])
        assert result.exit_code == 2 and "flashtune[report]" in result.stderr
        assert not out.exists()

    def test_draws_the_fastest_configs_of_a_plan_through_the_knobs_that_matter_most(
        self, database: Path, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("plotly")
        monkeypatch.setattr(figure, "PARALLEL_TRIALS", 10)
        monkeypatch.setattr(figure, "PARALLEL_KNOBS", 2)
        [section] = read_sections(database, device)
        [(plan, study)] = section.studies.items()
        [lines] = figure.parallel_coordinates(plan, study, figure.importance(study)).data
        times, first, _ = lines.dimensions
        assert list(times["values"]) == sorted(trial.value for trial in study.trials)[:10]
        assert list(lines.line.color) == [-each for each in times["values"]]
        assert first.label == "slack"
        chosen = [first.ticktext[place] for place in first["values"]]
        best = min(study.trials, key=lambda trial: trial.value)
        assert chosen[0] == str(best.params["staged.slack"])

    @pytest.mark.skipif(CHROMIUM is None, reason="no browser")
    @pytest.mark.parametrize("width", [500, 1280])
    def test_is_drawn_by_a_browser(self, page: Path, width: int) -> None:
        """Without errors, no wider than the window, each legend as a whole within its plot."""
        page.write_text(page.read_text("utf-8").replace("<head>", f"<head>{LOOK}", 1), "utf-8")
        command = (str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
        options = (f"--window-size={width},900", "--virtual-time-budget=10000", page.as_uri())
        shown = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=120, check=True
        )
        assert shown.stdout.count("main-svg") > 4
        found = re.search(r'data-seen="([^"]*)"', shown.stdout)
        assert found is not None
        seen = json.loads(html.unescape(found[1]))
        assert seen.pop("plots") >= 5
        assert seen.pop("legends") == 3
        assert seen == {"errors": 0, "cut": 0, "scrolled": 0, "too_wide": 0}
