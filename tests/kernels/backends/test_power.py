"""Power modes, clocks and energy: NVML by a pretended library, a Jetson by pretended files."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.nvidia import jetson, nvml, power
from flashtune.tuning_db.errors import FlashtuneError

UUID = "5e0c6b0a-1111-2222-3333-444455556666"


class Library:
    """An NVML with one board; what is in `refused` gives an error."""

    def __init__(self) -> None:
        self.millijoules = 5_000_000
        self.refused: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name in self.refused:
                return 3
            value = getattr(type(self), f"_{name}")(self, *arguments[:-1])
            arguments[-1]._obj.value = value
            return 0

        return call

    def _nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> int:
        assert uuid == f"GPU-{UUID}".encode()
        return 77

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        assert handle.value == 77
        return self.millijoules

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return 350_000

    def _nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def _nvmlDeviceGetApplicationsClock(self, handle: Any, kind: int) -> int:
        return 1755


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(nvml, "_library", lambda: found)
    monkeypatch.setattr(jetson, "jetson", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID)
    )
    return found


def test_a_board_tells_its_conditions_and_its_energy(library: Library) -> None:
    assert power.conditions(0) == {
        "power limit": "350 W",
        "highest clock": "1980 MHz",
        "highest memory clock": "2619 MHz",
        "set clock": "1755 MHz",
    }
    with power.energy_counter(0) as joules:
        before = joules()
        library.millijoules += 1500
        assert joules() - before == pytest.approx(1.5)


def test_what_a_board_does_not_tell_is_left_out(library: Library) -> None:
    library.refused = {"nvmlDeviceGetApplicationsClock", "nvmlDeviceGetEnforcedPowerLimit"}
    assert set(power.conditions(0)) == {"highest clock", "highest memory clock"}
    library.refused = {"nvmlDeviceGetHandleByUUID"}
    assert power.conditions(0) == {}


def test_a_board_without_a_counter_is_refused_in_one_line(library: Library) -> None:
    library.refused = {"nvmlDeviceGetTotalEnergyConsumption"}
    with pytest.raises(FlashtuneError, match="returned error 3"), power.energy_counter(0):
        pass


def test_without_the_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    nvml._library.cache_clear()
    monkeypatch.setattr(jetson, "jetson", lambda: None)
    monkeypatch.setattr(nvml.ctypes, "CDLL", missing)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=UUID)
    )
    assert power.conditions(0) == {}
    with pytest.raises(FlashtuneError, match="cannot be loaded"), power.energy_counter(0):
        pass


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Orin Nano's files: three rails of which one is of the whole board, and its clocks."""
    sensors = tmp_path / "ina3221" / "1-0040" / "hwmon" / "hwmon1"
    sensors.mkdir(parents=True)
    rails = {"VDD_IN": (5000, 2000), "VDD_CPU_GPU_CV": (5000, 800), "VDD_SOC": (5000, 400)}
    for number, (name, (millivolt, milliampere)) in enumerate(rails.items(), start=1):
        (sensors / f"in{number}_label").write_text(f"{name}\n")
        (sensors / f"in{number}_input").write_text(f"{millivolt}\n")
        (sensors / f"curr{number}_input").write_text(f"{milliampere}\n")
    (sensors / "in7_label").write_text("sum of shunt voltages\n")  # which has no current
    (sensors / "in7_input").write_text("9\n")
    for name, hertz in (("17000000.gpu", 1_020_000_000), ("31b0000.emc", 3_199_000_000)):
        (tmp_path / "devfreq" / name).mkdir(parents=True)
        (tmp_path / "devfreq" / name / "max_freq").write_text(f"{hertz}\n")
    monkeypatch.setattr(jetson, "_SENSORS", tmp_path / "ina3221")
    monkeypatch.setattr(jetson, "_DEVFREQ", tmp_path / "devfreq")
    monkeypatch.setattr(jetson, "jetson", lambda: "an Orin")
    answer = SimpleNamespace(stdout="NV Power Mode: MAXN_SUPER\n2\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    return sensors


def test_a_jetson_tells_its_power_mode_and_clocks(orin: Path) -> None:
    assert power.conditions(0) == {
        "power mode": "MAXN_SUPER",
        "highest clock": "1020 MHz",
        "highest memory clock": "3199 MHz",
    }


def test_a_jetson_without_nvpmodel_has_clocks_alone(
    orin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvpmodel")

    monkeypatch.setattr(subprocess, "run", missing)
    assert "power mode" not in power.conditions(0)


def test_a_jetsons_energy_is_its_power_over_time(
    orin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [rail.name for rail in jetson.power_rails()] == ["VDD_IN"]
    now = [100.0]
    monkeypatch.setattr(jetson, "_METER_SECONDS", 3600.0)  # only these readings count
    with jetson.energy_counter(lambda: now[0]) as joules:
        before = joules()
        now[0] += 2.0
        assert joules() - before == pytest.approx(2.0 * 10.0)
        (orin / "curr1_input").write_text("1000\n")
        now[0] += 1.0
        assert joules() - before == pytest.approx(2.0 * 10.0 + 1.0 * 5.0)


def test_a_jetsons_power_is_read_in_between(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    watts = jetson.Rail.watts
    monkeypatch.setattr(jetson.Rail, "watts", lambda rail: reads.append(rail) or watts(rail))
    with jetson.energy_counter() as joules:
        while len(reads) < 3:
            pass
        assert joules() > 0


def test_rails_are_added_up_where_none_is_of_the_whole_board(orin: Path) -> None:
    (orin / "in1_label").write_text("VDD_GPU_SOC\n")
    assert len(jetson.power_rails()) == 3


def test_a_jetson_without_sensors_is_refused_in_one_line(
    orin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jetson, "_SENSORS", tmp_path / "none")
    with pytest.raises(FlashtuneError, match="shows no power sensor"), power.energy_counter(0):
        pass
