"""What ships, as `flashtune tables check` judges it; of each device one config is compiled."""

import json

import pytest
from click.testing import CliRunner

from flashtune.kernels.backends.host import toolchain
from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import parse_config
from flashtune.tuner.cli.main import cli
from flashtune.tuner.search.failure import known_remedy
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.shortlist import MOST
from flashtune.tuning_db.table import prebuilt_devices, prebuilt_table


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
