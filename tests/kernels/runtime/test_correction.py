"""A device is probed once under each of its conditions, and predictions for it ranked again."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.predict.correction import expected_figures
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.kernels.runtime import correction, race
from flashtune.kernels.runtime.choice import ADDED, USER, Source, choose
from flashtune.kernels.runtime.records import look
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.probe import Figures
from flashtune.tuning_db.problem import parse_shape
from flashtune.tuning_db.record import Provenance
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table

ORIN, QWEN = find_device("orin"), parse_shape("qwen3-vl-2b")
HERE = torch.device("cpu")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHTUNE_DB", str(tmp_path / "tuning.db"))
    return tmp_path / "tuning.db"


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An Orin whose memory is half as fast as published; set its power `mode`."""
    expected = asdict(expected_figures(shipped_model(), ORIN))
    figures = Figures(**{**expected, "bandwidth": expected["bandwidth"] / 2})
    found = SimpleNamespace(mode="15W", probes=0)

    def probe(device: Any, where: Any) -> Figures:
        found.probes += 1
        return figures

    target = SimpleNamespace(conditions=lambda where: {"power mode": found.mode}, probe=probe)
    monkeypatch.setattr(correction, "target_of", lambda device: target)
    yield found


def start(database: Path) -> tuple[race.Start, Any]:
    weights = SimpleNamespace(weight=torch.empty(0))
    troubles: list[str] = []
    begun = race.Start(
        problem=QWEN,
        weights=weights,  # type: ignore[arg-type]
        device=ORIN,
        toolchain=Toolchain(triton="3.6.0"),
        seconds=20.0,
        troubles=troubles,
    )
    return begun, look(QWEN, ORIN, begun.toolchain, troubles)[1]


def test_what_ships_is_corrected_before_it_is_raced(database: Path, board: Any) -> None:
    begun, sources = start(database)
    before, _ = look(QWEN, ORIN, begun.toolchain, [])
    assert before.record is not None and before.record.provenance is Provenance.PREDICTED
    assert race._corrected(begun, sources, database)
    after, _ = look(QWEN, ORIN, begun.toolchain, [])
    assert after.record is not None and after.source == USER
    assert after.record.provenance is Provenance.CORRECTED
    assert after.explain()["provenance"] == "corrected"
    assert "corrected on orin-nano-super" in after.why
    assert not after.settled, "it is a prediction still, and is raced"
    times = [each.record.measurement.median_us for each in (before, after) if each.record]
    assert times[1] > 1.5 * times[0]
    assert begun.troubles == []


def test_a_device_is_probed_once_under_the_same_conditions(database: Path, board: Any) -> None:
    begun, sources = start(database)
    for _ in range(2):
        race._corrected(begun, sources, database)
    assert board.probes == 1
    board.mode = "MAXN_SUPER"
    race._corrected(begun, sources, database)
    assert board.probes == 2
    with Store(database, read_only=True) as store:
        for mode in ("15W", "MAXN_SUPER"):
            assert store.probe(ORIN.name, {"power mode": mode}) is not None
        assert store.probe(ORIN.name, {}) is None


def test_where_nothing_is_predicted_there_is_no_probe(database: Path, board: Any) -> None:
    begun, sources = start(database)
    other = replace(begun, problem=replace(QWEN, n_tokens=3))
    assert not race._corrected(other, sources, database)
    of_cpu = replace(sources[-1].records[0], config={"plan": "cpp_fused"})
    with Store(database) as store:
        assert correction.correct(ORIN, HERE, [of_cpu], store) == 0
    assert board.probes == 0


def test_a_probe_that_fails_leaves_the_race_as_it_was(
    database: Path, board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel image\nat all")

    monkeypatch.setattr(correction, "fresh_probe", fails)
    begun, sources = start(database)
    assert not race._corrected(begun, sources, database)
    assert begun.troubles == [
        "predictions are not corrected by a probe: RuntimeError: no such kernel image"
    ]


def test_what_is_corrected_goes_before_what_is_predicted_wherever_it_is_from() -> None:
    table = prebuilt_table(ORIN.name)
    assert table is not None
    one, other = [each for each in table.records if each.problem == QWEN][:2]
    slower = replace(one.measurement, median_us=2 * (one.measurement.median_us or 0))
    added = replace(one, provenance=Provenance.CORRECTED, measurement=slower)
    sources = [Source(name=USER, records=[other]), Source(name=ADDED, records=[added])]
    choice = choose(QWEN, ORIN, one.toolchain, sources)
    assert (choice.source, choice.record) == (ADDED, added)
