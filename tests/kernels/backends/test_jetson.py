"""A Jetson whose torch finds no GPU says so, once, where its CPU is taken instead."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flashtune.kernels.backends import host
from flashtune.kernels.backends.nvidia import jetson
from flashtune.kernels.head import FlashHead
from flashtune.kernels.plans.candidate import TARGETS
from flashtune.tuner import here
from flashtune.tuner.cli.main import cli

ORIN = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretends a machine: `machine(model="…", release=True, cuda=None, found=False)`."""

    def pretend(
        model: str | None = None,
        *,
        release: bool = False,
        cuda: str | None = None,
        found: bool = False,
    ) -> None:
        if model is not None:
            (tmp_path / "model").write_bytes(model.encode() + b"\0")
        if release:
            (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3\n", "utf-8")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found)

    monkeypatch.setattr(jetson, "_MODEL", tmp_path / "model")
    monkeypatch.setattr(jetson, "_RELEASE", tmp_path / "release")
    host._warn_of_unused.cache_clear()
    yield pretend
    host._warn_of_unused.cache_clear()


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in log.records if each.levelno == logging.WARNING]


def test_a_jetson_is_told_by_its_model_or_its_release(machine: Machine, tmp_path: Path) -> None:
    machine()
    assert jetson.jetson() is None
    machine("Raspberry Pi 5 Model B Rev 1.0")
    assert jetson.jetson() is None
    machine("Raspberry Pi 5 Model B Rev 1.0", release=True)
    assert jetson.jetson() == "a Jetson"
    machine(ORIN)
    assert jetson.jetson() == ORIN


def test_why_its_gpu_is_not_used(machine: Machine) -> None:
    machine(ORIN)
    why = jetson.why_unused()
    assert why is not None
    assert why.startswith(f"{ORIN}: torch {torch.__version__} was built without CUDA")
    assert "docs/jetson.md" in why
    assert TARGETS["nvidia"].trouble() == why  # type: ignore[attr-defined]
    machine(ORIN, cuda="12.6")
    assert "finds no CUDA device" in str(jetson.why_unused())
    machine(ORIN, cuda="12.6", found=True)
    assert jetson.why_unused() is None


@pytest.mark.parametrize("chosen", ["search", "model", "head", "devices"])
@pytest.mark.parametrize("model", [ORIN, None], ids=["jetson", "other"])
def test_it_is_said_once_where_the_cpu_is_taken(
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    without_kernels: None,
    chosen: str,
    model: str | None,
) -> None:
    machine(model)
    monkeypatch.setattr(here, "this_cpu", here.describe_cpu)  # nothing is measured

    def choose() -> None:
        if chosen == "search":
            here.this_device()
        elif chosen == "model":
            assert here.torch_device_named(None) == "cpu"
        elif chosen == "devices":
            CliRunner().invoke(cli, ["devices"], catch_exceptions=False)
        else:
            FlashHead(torch.eye(4), torch.eye(4), torch.arange(4), n_probes=2).explain()

    choose()
    choose()
    assert len(warnings(caplog)) == (0 if model is None else 1)
    assert all(text.startswith(ORIN) for text in warnings(caplog))
