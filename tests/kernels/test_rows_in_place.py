"""Heads that read their rows where the model has them."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flashtune.kernels import head_tensors
from flashtune.kernels.backends.torch import TorchStep
from flashtune.kernels.head import FlashHead
from flashtune.kernels.integrations.flash_linear import FlashLinear
from flashtune.kernels.weights import marks_of
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS

VOCAB, WIDTH, CLUSTERS = 320, 64, 20
FILLED = -9000  # below any logit but the fill


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def parts(vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, WIDTH, generator=generator).bfloat16()
    assignments = torch.randperm(vocab, generator=generator) % CLUSTERS
    sums = torch.zeros(CLUSTERS, WIDTH).index_add_(0, assignments, weight.float())
    return weight, sums.bfloat16(), assignments


def states(n_tokens: int = 40) -> torch.Tensor:
    return torch.randn(n_tokens, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def made(rows: str | None = "in_place", vocab: int = VOCAB, **changes: Any) -> FlashHead:
    return FlashHead(*parts(vocab), **{"n_probes": 5, "rows": rows, **changes})


@pytest.mark.parametrize("n_tokens", [1, MOST_TOKENS + 3])
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 7])  # 7 clusters repeat a token
@pytest.mark.parametrize("special", [(), (3, 8), tuple(range(0, 200, 13))])
def test_it_answers_as_a_head_with_rows_in_order(
    vocab: int, special: tuple[int, ...], n_tokens: int
) -> None:
    """Whether clusters are filled up, pinned, or added in front."""
    ordered = made("in_order", vocab, special_token_ids=special)
    head = made("in_place", vocab, special_token_ids=special)
    hidden = states(n_tokens)
    assert torch.equal(head(hidden), ordered(hidden))
    assert torch.equal(head.logits(hidden), ordered.logits(hidden))
    assert head.logits(hidden).shape == (n_tokens, vocab)
    assert head.explain()["problem"] == {**ordered.explain()["problem"], "in_place": True}


def test_a_step_has_room_for_the_logits_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which there are more than the model has, where clusters are filled up."""
    widths, run = [], TorchStep.__call__

    def noted(step: TorchStep, weights: Any, hidden: torch.Tensor, out: torch.Tensor) -> None:
        widths.append(out.shape[1])
        run(step, weights, hidden, out)

    monkeypatch.setattr(TorchStep, "__call__", noted)
    assert made(vocab=VOCAB - 7).logits(states(2)).shape == (2, VOCAB - 7)
    assert set(widths) == {VOCAB}


@pytest.mark.parametrize("wrap", [lambda w: w, nn.Parameter])
def test_the_models_weight_is_referred_to_and_not_counted(wrap: Any) -> None:
    weight, centroids, assignments = parts()
    model, before = wrap(weight), weight.clone()
    head = FlashHead(model, centroids, assignments, n_probes=5, rows="in_place")
    head(states())
    assert head.model_weight is model and torch.equal(weight, before)
    assert head.decoder.weights.weight.data_ptr() == weight.data_ptr()
    assert list(head.parameters()) == [] and head.state_dict() == {}
    assert head.added_bytes == centroids.nbytes + VOCAB * (4 + 8)
    explained = head.explain()
    assert (explained["rows"], explained["model_weight"]) == ("in_place", "the one given")
    assert explained["added_bytes"] == head.added_bytes
    assert "rows=in_place" in repr(head)
    assert made("in_order").explain()["rows"] == "in_order"


def test_the_docs_say_what_a_head_adds() -> None:
    weight = torch.zeros(4096, 2048, dtype=torch.bfloat16)
    assignments = torch.arange(4096) // 16
    head = FlashHead(weight, weight[::16].clone(), assignments, n_probes=8, rows="in_place")
    share = f'| 16-bit, `rows="in_place"` | {head.added_bytes / weight.nbytes:.2f} |'
    assert share in (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")


def test_a_weight_that_kernels_cannot_read_is_copied_and_said_to_be() -> None:
    weight, centroids, assignments = parts()
    head = FlashHead(weight.T.contiguous().T, centroids, assignments, n_probes=5, rows="in_place")
    assert torch.equal(head(states()), made()(states()))
    assert head.explain()["model_weight"].startswith("a copy: the one given is not contiguous")
    assert head.added_bytes == made().added_bytes + weight.nbytes


@pytest.mark.parametrize(
    ("free", "rows", "changes", "found"),
    [
        (1.9, None, {}, "in_place"),
        (2.0, None, {}, "in_order"),
        (0.0, None, {}, "in_order"),  # nobody knows
        (1.9, "in_order", {}, "in_order"),
        (1e9, "in_place", {}, "in_place"),
        (1.9, None, {"release_weight": True}, "in_order"),
        (1.9, None, {"screen": "int8"}, "in_order"),
    ],
)
def test_rows_stay_in_place_where_memory_is_short(
    free: float,
    rows: str | None,
    changes: dict[str, Any],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copied = VOCAB * WIDTH * 2
    monkeypatch.setattr(head_tensors, "free_bytes", lambda device: int(free * copied))
    with caplog.at_level(logging.INFO, "flashtune"):
        head = made(rows, **changes)
    assert head.rows == found
    said = [each for each in caplog.messages if "rows are read in place" in each]
    assert len(said) == (rows is None and found == "in_place")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": "anywhere"}, "rows must be one of in_order, in_place, not 'anywhere'"),
        ({"screen": "int8"}, "a screen has rows of its own"),
        ({"release_weight": True}, "release_weight moves the rows"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashtuneError, match=message):
        made(**arguments)


def test_a_head_converted_apart_from_its_model_copies_the_weight() -> None:
    head = made().half()
    assert torch.equal(head(states()), made("in_order").half()(states()))
    assert head.explain()["model_weight"] == (
        "a copy: the head was moved or converted separately from its model"
    )


def test_copies_and_pickles_decode_alike() -> None:
    head = made()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other.rows == "in_place"
        assert torch.equal(other(states()), head(states()))


class Model(nn.Module):
    """A tied embedding with a FlashHead in the place of its output layer."""

    def __init__(self) -> None:
        super().__init__()
        weight, centroids, assignments = parts()
        self.embedding = nn.Embedding(VOCAB, WIDTH, _weight=weight)
        dense = nn.Linear(WIDTH, VOCAB, bias=False, device="meta")
        dense.weight = self.embedding.weight
        head = FlashHead(dense.weight, centroids, assignments, n_probes=5, rows="in_place")
        self.output = FlashLinear(dense, head, always=True)


@pytest.mark.parametrize("change", ["half", "deepcopy"])
def test_a_model_takes_its_head_along(change: str) -> None:
    model = Model()
    model = model.half() if change == "half" else copy.deepcopy(model)
    head = model.output.head
    assert head.model_weight is model.output.weight is model.embedding.weight
    assert head.explain()["model_weight"] == "the one given"
    hidden = states(2).to(model.output.weight.dtype)
    with torch.no_grad():
        logits = model.output(hidden)
    assert torch.equal(logits, head.logits(hidden)) and bool((logits < FILLED).any())


def test_other_values_take_the_dense_head_until_they_are_the_old_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, hidden = Model(), states(2)
    with torch.no_grad():
        for scale, flash in ((1.0, True), (2.0, False), (0.5, True)):
            model.output.weight[17] *= scale
            assert bool((model.output(hidden) < FILLED).any()) is flash
    assert sum("the output head's weight has changed" in each for each in caplog.messages) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_marks_tell_rows_apart(dtype: torch.dtype) -> None:
    rows = parts()[0].to(dtype)
    changed = rows.clone()
    changed[5, 7] = torch.nextafter(changed[5, 7], torch.tensor(9.0, dtype=dtype))
    differing = marks_of(rows) != marks_of(changed)
    assert differing.nonzero().tolist() == [[5]]
    assert torch.equal(marks_of(rows.T.contiguous().T), marks_of(rows))
