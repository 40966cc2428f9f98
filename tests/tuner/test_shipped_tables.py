"""What ships, as `flashtune tables check` judges it; of each device one config is compiled."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.kernels.runtime.choice import PREBUILT, Level, Source, choose, contenders
from flashtune.tuner.cli.main import cli
from flashtune.tuner.predict.floor import floor_us
from flashtune.tuner.search.failure import known_remedy
from flashtune.tuner.search.lookup import best_shipped
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.problem import PRESETS, parse_shape
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table

# Of which tables were predicted; of younger ones heads race what is near, and what is known good
PREDICTED = tuple(PRESETS)[:6]


def test_every_shipped_table_passes_the_check() -> None:
    result = CliRunner().invoke(cli, ["tables", "check", "--json"])
    assert result.exit_code == 0, result.output
    checked = json.loads(result.stdout)["tables"]
    assert [row["device"] for row in checked] == list(prebuilt_devices())
    assert all(row["records"] for row in checked)


@pytest.mark.parametrize("name", prebuilt_devices())
def test_a_problem_has_one_winner_or_a_shortlist(name: str) -> None:
    table = prebuilt_table(name)
    assert table is not None
    for problem in {record.problem for record in table.records}:
        records = [record for record in table.records if record.problem == problem]
        measured = [each for each in records if each.provenance is Provenance.MEASURED]
        assert len(records) <= (1 if measured else MOST)


@pytest.mark.parametrize("screen", ["int8", "int4/int8", "int4"])
@pytest.mark.parametrize("preset", PREDICTED)
@pytest.mark.parametrize("name", [each for each in prebuilt_devices() if each != "nvidia-h200"])
def test_a_screened_head_of_a_preset_has_configs_to_race(
    name: str, preset: str, screen: str
) -> None:
    """With the default it races what was predicted of just this problem."""
    probes = 512 if preset.startswith("gemma") else 256
    problem = Screen.parse(screen).problem(parse_shape(f"{preset},probes={probes}"))
    device, tools = find_device(name), Toolchain(triton="3.6.0")
    table = prebuilt_table(name)
    assert table is not None
    sources = [Source(name=PREBUILT, records=table.records)]
    choice = choose(problem, device, tools, sources)
    assert choice.level is Level.EXACT and choice.record is not None
    if (name, screen) == ("nvidia-h100", "int8"):
        assert choice.record.provenance is Provenance.MEASURED
        return
    assert not choice.settled and choice.record.provenance is Provenance.PREDICTED
    assert len(contenders(problem, device, tools, sources)) >= 4


def test_the_document_says_what_tables_do_of_fewer_bits() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text("utf-8")
    plain, rows = parse_shape("qwen3-vl-2b"), []
    for name in ("orin-nano-super", "agx-orin", "nvidia-a40", "nvidia-l4", "nvidia-a100"):
        device, cells = find_device(name), [name]
        for screen in (None, "int8", "int4/int8", "int4"):
            problem = Screen.parse(screen).problem(plain) if screen else plain
            best, floor = best_shipped(device, problem), floor_us(problem, device)
            assert best is not None
            cells.append(f"{best.measurement.median_us:.0f} ({floor:.0f})")
        rows.append(f"| {' | '.join(cells)} |")
    assert [row for row in rows if row not in text] == []


@pytest.mark.parametrize("name", prebuilt_devices())
def test_its_first_config_compiles_for_the_devices_architecture(name: str) -> None:
    table = prebuilt_table(name)
    assert table is not None
    record = table.records[0]
    device = find_device(name)
    if lacks := known_remedy(device, toolchain(device)):
        pytest.skip(lacks)
    candidate = Candidate(record.problem, parse_config(record.config), device)
    uses = backend_of(candidate).compile(candidate)
    assert uses and not any(use.spilled for use in uses)
