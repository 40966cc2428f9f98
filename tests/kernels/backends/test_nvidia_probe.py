"""The kernels of a probe: what they do, run by the interpreter, and that they compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashtune.kernels.backends.nvidia import probe as nvidia_probe
from flashtune.kernels.backends.nvidia.probe import LINE, TILE, compile_probe, probe_source
from flashtune.kernels.backends.triton.backend import load_source
from flashtune.tuning_db.device import find_device

H100 = find_device("h100")


def compiled_with(name: str) -> Callable[..., Any]:
    return getattr(load_source(probe_source(find_device("orin"))), name)


@pytest.mark.usefixtures("interpreted")
def test_a_read_sums_every_number() -> None:
    source = torch.arange(3 * TILE, dtype=torch.int32) % 1000
    sums = torch.zeros(3, dtype=torch.int32)
    compiled_with("read")[(3,)](source, sums)
    assert sums.tolist() == source.view(3, -1).sum(dim=1).tolist()


@pytest.mark.usefixtures("interpreted")
def test_a_chase_goes_on_where_the_last_one_ended() -> None:
    lines = torch.tensor([0, 3, 1, 2], dtype=torch.int32) * LINE
    places = torch.zeros(4 * LINE, dtype=torch.int32)
    places[lines.long()] = lines.roll(-1)
    place = torch.zeros(1, dtype=torch.int32)
    for expected in (3, 1, 2):
        compiled_with("chase")[(1,)](places, place, 5)
        assert place.item() == expected * LINE


@pytest.mark.usefixtures("interpreted")
def test_programs_meet_as_often_as_they_are_told_to() -> None:
    source = probe_source(find_device("orin")).replace("constexpr(8)", "constexpr(1)")
    state = torch.zeros(1, dtype=torch.int32)
    meet = load_source(source).meet
    for meetings in (3, 6):
        meet[(1,)](state, 3)
        assert state.item() == meetings


def test_it_compiles_for_every_architecture_that_has_a_table() -> None:
    with_pdl = compile_probe(H100, 32)
    assert set(with_pdl) == {"read", "nothing", "overlapped", "chase", "meet"}
    assert with_pdl["overlapped"].metadata.launch_pdl
    assert with_pdl["meet"].metadata.launch_cooperative_grid
    assert not with_pdl["nothing"].metadata.launch_pdl
    assert set(compile_probe(find_device("orin"), 32)) == {"read", "nothing", "chase", "meet"}


def test_without_room_there_is_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_probe, "free_bytes", lambda where: 2**28)
    monkeypatch.setattr(nvidia_probe, "index_of", lambda where: 0)
    with pytest.raises(
        nvidia_probe.FlashtuneError, match="reads 200 MiB, but may only use 64 MiB"
    ):
        nvidia_probe.Gauge(H100, torch.device("cuda"), 32)
