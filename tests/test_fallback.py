"""benchmarks/fallback.py: what it leaves out, and that what it compares runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from loaded import loaded

from flashtune.kernels.backends.cpp.compiler import compiler_version
from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.backends.target import default_config, known_good
from flashtune.kernels.runtime.choice import PREBUILT, Source, choose
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.table import prebuilt_table

TOOLS = Toolchain(triton="3.6.0")


@pytest.fixture(scope="module")
def fallback() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "fallback.py"
    return loaded(path)


def test_a_shape_does_without_all_of_its_own_records(fallback: ModuleType) -> None:
    device, table = find_device("h200"), prebuilt_table("nvidia-h200")
    assert table is not None
    problems = fallback.usual_problems(table.records)
    assert len(problems) == 44  # six of them in int8, and six with rows in int4
    for problem in problems:
        compared = fallback.contenders(problem, device, TOOLS, table.records)
        shape = fallback.shape_of(problem)
        assert fallback.shape_of(compared.choice.record.problem) != shape
        own = choose(problem, device, TOOLS, [Source(name=PREBUILT, records=table.records)])
        assert compared.winner == own.config
        assert compared.default == default_config(problem, device)


def test_a_problem_without_a_record_has_no_winner(fallback: ModuleType) -> None:
    device, table = find_device("h200"), prebuilt_table("nvidia-h200")
    assert table is not None
    problem = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
    assert fallback.contenders(problem, device, TOOLS, table.records) is None


@pytest.mark.skipif(not compiler_version(), reason="no C++ compiler")
def test_what_is_compared_is_verified_and_timed(
    fallback: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
    device = replace(this_cpu(), l2_bytes=1)
    default = default_config(problem, device)
    other = next(each for each in known_good(problem, device) if each != default)
    choice = choose(problem, device, TOOLS, [])
    compared = fallback.Contenders(winner=default, nearest=other, default=default, choice=choice)
    row = fallback.compare(problem, device, compared, seed=1)
    assert row["slowdown"]["default"] == 1.0
    assert row["slowdown"]["nearest"] == row["times_us"]["nearest"] / row["times_us"]["winner"]
    assert min(row["times_us"].values()) > 0
    fallback.print_table([json.loads(json.dumps(row))])
    assert "median 1.000, worst 1.000 x the winner" in capsys.readouterr().out
