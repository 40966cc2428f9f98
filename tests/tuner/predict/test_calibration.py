"""Calibrations: what goes in comes out, and what is wrong is said."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flashtune.kernels.plans.candidate import KernelUse
from flashtune.kernels.plans.config import config_data
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.tuner.cli.main import cli
from flashtune.tuner.predict.calibration import (
    Calibration,
    Sample,
    calibrate,
    dump_calibration,
    read_calibration,
    usable,
    write_calibration,
)
from flashtune.tuner.workers.pool import WorkerPool
from flashtune.tuner.workers.transport import here
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome, Provenance
from flashtune.tuning_db.store import Store

USE = KernelUse(kernel="score", programs=16, warps=4, registers=32, shared_bytes=512, spilled=0)


@pytest.fixture
def calibration(problem: Problem, device: Device, toolchain: Toolchain) -> Calibration:
    samples = tuple(
        Sample(
            problem=replace(problem, n_probes=probes),
            config=StagedConfig(score_block=64, gather_block=64, slack=8),
            uses=(USE, replace(USE, kernel="gather")),
            measurement=Measurement(outcome=outcome, median_us=12.345, spread_us=0.5, samples=10),
        )
        for probes, outcome in ((2, Outcome.OK), (4, Outcome.PRUNED))
    )
    return Calibration(device=device.name, toolchain=toolchain, samples=samples)


def test_it_goes_round(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json.gz"
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration
    assert path.read_bytes() == dump_calibration(calibration)
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path: Path, calibration: Calibration, **config: Any) -> Path:
    """The calibration's file with knobs of its first config changed, or, if None, left out."""
    data = json.loads(gzip.decompress(dump_calibration(calibration)))
    first = data["samples"][0]["config"]
    first |= config
    data["samples"][0]["config"] = {k: v for k, v in first.items() if v is not None}
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


def test_a_younger_knob_has_its_default(calibration: Calibration, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "old.json.gz", calibration, evict=None)
    assert read_calibration(path) == calibration


def test_a_config_that_is_none_of_today_is_dropped(
    calibration: Calibration, tmp_path: Path
) -> None:
    for change in ({"score_rows": 3}, {"plan": "bygone"}, {"bygone": 1}):
        found = read_calibration(rewritten(tmp_path / "old.json.gz", calibration, **change))
        assert (found.samples, found.dropped) == (calibration.samples[1:], 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"{}"),
        gzip.compress(b"[1]"),
        gzip.compress(b"{}")[:-9],
        gzip.compress(b"[" * 10**5),
        gzip.compress(b'{"version": ' + b"9" * 5000 + b"}"),
        gzip.compress(b"\xff"),
        gzip.compress(b"null"),
    ],
    ids=[
        "empty",
        "no gzip",
        "no calibration",
        "a list",
        "cut off",
        "deep",
        "huge",
        "bytes",
        "null",
    ],
)
def test_what_is_no_calibration_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json.gz"
    path.write_bytes(content)
    with pytest.raises(FlashtuneError, match="flashtune model calibrate") as raised:
        read_calibration(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlashtuneError, match=r"cannot read .*none\.json\.gz"):
        read_calibration(tmp_path / "none.json.gz")


def test_only_measured_times_of_valid_configs_are_usable(recorded, device: Device) -> None:
    good = StagedConfig(score_block=64, gather_block=64)
    wide = StagedConfig(score_block=4096)  # wider than the hidden size
    records = [
        recorded(good, 12.0),
        recorded(good, 13.0),
        recorded(replace(good, slack=8), 11.0, provenance=Provenance.PREDICTED),
        recorded(replace(good, slack=32), None),
        recorded(wide, 10.0),
        replace(recorded(good, 10.0), config={**config_data(good), "score_rows": 3}),
    ]
    assert list(usable(records, device).values()) == records[:1]


class TestCalibrate:
    def test_configs_are_compiled_and_those_that_fail_left_out(
        self, recorded, device: Device
    ) -> None:
        good = StagedConfig(score_block=64, gather_block=64)
        told: list[tuple[int, int]] = []
        with WorkerPool(here(1)) as pool:
            found = calibrate([recorded(good, 12.0)], device, pool, lambda *at: told.append(at))
        assert told == [(1, 1)]
        [sample] = found.samples
        assert (sample.config, sample.time_us) == (good, 12.0)
        assert [use.kernel for use in sample.uses] == ["score", "select", "gather"]
        assert all(use.registers > 0 for use in sample.uses)

    def test_a_known_calibrations_configs_are_kept_and_not_compiled(
        self, recorded, problem: Problem, device: Device
    ) -> None:
        good = StagedConfig(score_block=64, gather_block=64)
        new = replace(good, slack=32)
        old = Sample(
            problem=problem, config=good, uses=(), measurement=recorded(good, 9.0).measurement
        )
        toolchain = recorded(good, 12.0).toolchain
        known = Calibration(device=device.name, toolchain=toolchain, samples=(old,))
        told: list[tuple[int, int]] = []
        with WorkerPool(here(1)) as pool:
            records = [recorded(good, 12.0), recorded(new, 13.0)]
            found = calibrate(records, device, pool, lambda *at: told.append(at), known)
            assert told == [(1, 1)]
            assert {sample.config: sample.time_us for sample in found.samples} == {
                good: 9.0, new: 13.0
            }  # fmt: skip
            other = replace(known, toolchain=Toolchain(triton="3.5.0"))
            with pytest.raises(FlashtuneError, match="to add to is of orin-nano-super with"):
                calibrate(records, device, pool, known=other)
        assert pool.pending() == 0

    @pytest.mark.parametrize(
        ("tools", "message"),
        [
            ((), "no measured record"),
            ((Toolchain(triton="3.6.0"), Toolchain()), "2 different toolchains"),
        ],
    )
    def test_what_cannot_be_calibrated_is_said(
        self, tools: Sequence[Toolchain], message: str, recorded, device: Device
    ) -> None:
        records = [
            recorded(
                StagedConfig(score_block=64, gather_block=64, slack=8 * number),
                12.0,
                toolchain=each,
            )
            for number, each in enumerate(tools, start=1)
        ]
        with WorkerPool(here(1)) as pool, pytest.raises(FlashtuneError, match=message):
            calibrate(records, device, pool)
        assert pool.pending() == 0


def test_the_commands_say_what_they_wrote_and_what_is_wrong(recorded, tmp_path: Path) -> None:
    database, file, model = (tmp_path / name for name in ("a.db", "a.json.gz", "model.json"))
    good = StagedConfig(score_block=64, gather_block=64)
    with Store(database) as store:
        store.add(recorded(good, 12.0))
        store.add(recorded(replace(good, slack=32), None))

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, ["model", *map(str, args)])

    made = run("calibrate", "--device", "orin", "--db", database, "--output", file)
    assert made.exit_code == 0, made.output
    assert made.stdout == f"{file}: 1 configs of orin-nano-super, from 2 records\n"
    assert [sample.config for sample in read_calibration(file).samples] == [good]
    fitted = run("fit", "--calibration", file, "--output", model)
    assert (fitted.exit_code, model.exists()) == (2, False)
    assert fitted.stderr.splitlines()[-1].startswith("Error: a fit needs records of at least two")
    checked = run("check", "--calibration", file)
    assert checked.exit_code == 2
    assert "another calibration" in checked.stderr
