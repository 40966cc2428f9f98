import collections
import json

import pytest

from flashtune.tuning_db.device import (
    ARCH_LIMITS,
    Device,
    Toolchain,
    all_devices,
    find_device,
    match_device,
)
from flashtune.tuning_db.errors import FlashtuneError

REQUIRED = {
    "orin-nano-super": "sm_87",
    "orin-nx": "sm_87",
    "agx-orin": "sm_87",
    "agx-thor": "sm_110",
    "nvidia-a40": "sm_86",
    "nvidia-l4": "sm_89",
    "rtx-3500-ada": "sm_89",
    "rtx-4090": "sm_89",
    "rtx-5090": "sm_120",
    "nvidia-a100": "sm_80",
    "nvidia-h100": "sm_90",
    "nvidia-h200": "sm_90",
    "nvidia-b200": "sm_100",
    "gb10": "sm_121",
}


def test_the_registry_holds_what_the_documents_promise() -> None:
    assert {name: find_device(name).arch for name in REQUIRED} == REQUIRED


@pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
def test_every_device_is_well_formed(device: Device) -> None:
    assert device.name == device.name.lower().strip()
    assert device.title and device.source.endswith(".")
    assert device.vendor == "nvidia"
    assert device.limits is ARCH_LIMITS[device.arch]
    assert device.capability == int(device.arch[3:])
    assert type(device.sm_count) is int and 1 <= device.sm_count <= 256
    assert 50e9 < device.memory_bandwidth < 20e12
    assert type(device.l2_bytes) is int and 2**20 <= device.l2_bytes <= 2**28
    assert 0.5e9 < device.clock_hz < 4e9
    assert all(alias == alias.lower() for alias in device.aliases)


def test_no_name_means_two_devices() -> None:
    names = collections.Counter(
        name for device in all_devices() for name in (device.name, *device.aliases)
    )
    reported = collections.Counter(
        name.lower() for device in all_devices() for name in device.reported_names
    )
    assert max(names.values()) == max(reported.values()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("h200", "nvidia-h200"), (" Orin ", "orin-nano-super"), ("THOR", "agx-thor")],
)
def test_devices_are_found_by_alias(name: str, expected: str) -> None:
    assert find_device(name).name == expected


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(FlashtuneError, match=r"unknown device 'h900': use one of orin-nano-super"):
        find_device("h900")


def test_devices_are_matched_by_the_driver_s_name() -> None:
    found = match_device("NVIDIA H200")
    assert found is not None and found.name == "nvidia-h200"
    assert match_device("Orin") is None  # what every Orin calls itself
    assert match_device("h200") is None


def test_toolchain_keys_are_canonical_and_read_back() -> None:
    chain = Toolchain(triton="3.6.0", torch="2.13.0")
    assert chain.key == '{"compiler":"","driver":"","torch":"2.13.0","triton":"3.6.0"}'
    assert Toolchain.from_json(json.loads(chain.key)) == chain


@pytest.mark.parametrize(
    "data", [None, {"triton": "3"}, {"triton": 3, "torch": "", "driver": "", "compiler": ""}]
)
def test_a_toolchain_is_text_under_its_own_keys(data: object) -> None:
    with pytest.raises(FlashtuneError, match="toolchain"):
        Toolchain.from_json(data)
