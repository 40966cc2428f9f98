"""Heads whose candidates are found in 8 or 4 bits and decided by the model's own rows."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtune.kernels.formats.format import format_of
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.head import FlashHead
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS

VOCAB, WIDTH, CLUSTERS = 320, 64, 20
SCREENS = ["int8", "int4", "int4/int8", "int8/int4:40"]


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def parts(
    vocab: int = VOCAB, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    assignments = torch.randperm(vocab, generator=generator) % CLUSTERS
    sums = torch.zeros(CLUSTERS, width).index_add_(0, assignments, weight.float())
    return weight, sums.to(dtype), assignments


def states(n_tokens: int = 40, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(1))


def screened(**changes: Any) -> FlashHead:
    weight, centroids, assignments = parts()
    return FlashHead(
        weight, centroids, assignments, **{"n_probes": 5, "screen": "int8", **changes}
    )


@pytest.mark.parametrize("n_tokens", [1, 7, MOST_TOKENS + 3])
@pytest.mark.parametrize("width", [64, 33])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_best_candidates_are_decided_by_the_models_rows(
    screen: str, width: int, n_tokens: int
) -> None:
    """With all decided again only centroids may differ from a head without a screen."""
    weight, centroids, assignments = parts(width=width)
    kind = Screen.parse(screen)
    everything = Screen(centroids=kind.centroids, rows=kind.rows, n_rescored=VOCAB)
    head = FlashHead(weight, centroids, assignments, n_probes=4, screen=everything)
    packed = format_of(kind.centroids)
    scored = packed.unpack(packed.pack(centroids), width, torch.float32)
    plain = FlashHead(weight, scored, assignments, n_probes=4)
    hidden = states(n_tokens, width)
    assert torch.equal(head(hidden), plain(hidden))
    torch.testing.assert_close(head.logits(hidden), plain.logits(hidden))


@pytest.mark.parametrize("screen", SCREENS)
def test_few_that_are_decided_again_give_the_plain_heads_tokens(screen: str) -> None:
    weight, centroids, assignments = parts()
    plain = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS)
    head = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS, screen=screen)
    hidden = states(200)
    assert torch.equal(head(hidden), plain(hidden))
    problem = head.explain()["problem"]
    kind = Screen.parse(screen)
    assert (problem["weight_dtype"], problem["centroid_dtype"]) == (kind.rows, kind.centroids)
    assert (problem["model_dtype"], problem["n_rescored"]) == ("fp32", kind.n_rescored)
    assert head.explain()["screen"] == str(kind)


def test_without_deciding_again_the_screen_answers_alone() -> None:
    weight, centroids, assignments = parts()
    packed = format_of("int4")
    rows = packed.unpack(packed.pack(weight), WIDTH, torch.float32)
    head = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS, screen="int8/int4:0")
    assert head.model_weight is None
    torch.testing.assert_close(head.logits(states()), states() @ rows.T)
    assert head.explain()["model_weight"] is None
    assert head.half().logits(states()).dtype is torch.float16


@pytest.mark.parametrize("wrap", [lambda w: w, torch.nn.Parameter])
def test_the_models_weight_is_referred_to_and_left_alone(wrap: Any) -> None:
    weight, centroids, assignments = parts()
    model, before = wrap(weight), weight.clone()
    for head in (
        FlashHead(model, centroids, assignments, n_probes=3, screen="int8"),
        FlashHead.screened(model),
    ):
        head(states())
        assert head.model_weight is model
        decoding = head.decoder.weights.model_weight
        assert decoding is not None and decoding.data_ptr() == weight.data_ptr()
        assert torch.equal(weight, before)
        assert list(head.parameters()) == [] and head.state_dict() == {}
        assert head.explain()["model_weight"] == "the one given"


@pytest.mark.parametrize("unfit", ["transposed", "misaligned"])
def test_a_weight_that_kernels_cannot_read_is_copied_and_said_to_be(unfit: str) -> None:
    weight, centroids, assignments = parts()
    other = weight.T.contiguous().T
    if unfit == "misaligned":
        other = torch.zeros(VOCAB * WIDTH + 1)[1:].view(VOCAB, WIDTH).copy_(weight)
    head = FlashHead(other, centroids, assignments, n_probes=5, screen="int8")
    assert torch.equal(head(states()), screened()(states()))
    assert head.explain()["model_weight"].startswith("a copy: the one given is not contiguous")
    assert head.added_bytes == screened().added_bytes + weight.nbytes


def storages(head: FlashHead) -> dict[int, int]:
    """Every storage that the head's decoder reads, with its bytes."""
    weights = head.decoder.weights
    names = ("weight", "centroids", "ids", "weight_scales", "centroid_scales", "model_weight")
    tensors = [getattr(weights, name) for name in names]
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize(("screen", "share"), [("int8", 0.54), ("int4", 0.31), (None, 1.07)])
@pytest.mark.parametrize("without_clusters", [False, True])
def test_added_bytes_are_those_of_storages(
    screen: str | None, share: float, without_clusters: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 512, generator=generator).bfloat16()
    assignments, centroids = torch.arange(2048) // 16, weight[::16].clone()
    if without_clusters:
        if screen is None:
            return
        head = FlashHead.screened(weight, screen)
    else:
        head = FlashHead(weight, centroids, assignments, n_probes=8, screen=screen)
    kept = storages(head)
    kept.pop(weight.data_ptr(), None)
    assert head.added_bytes == sum(kept.values()) == head.explain()["added_bytes"]
    assert head.added_bytes <= share * weight.nbytes
    assert head.added_bytes >= (share - 0.05) * weight.nbytes


def test_a_released_weight_adds_only_centroids_and_ids() -> None:
    weight, centroids, assignments = parts()
    head = FlashHead(weight, centroids, assignments, n_probes=3, release_weight=True)
    assert head.added_bytes == centroids.nbytes + 4 * VOCAB
    plain = FlashHead(parts()[0], centroids, assignments, n_probes=3)
    assert plain.added_bytes == weight.nbytes + centroids.nbytes + 4 * VOCAB
    with pytest.raises(FlashtuneError, match="give only one of them"):
        screened(release_weight=True)


@pytest.mark.parametrize("screen", ["int8", "int4"])
@pytest.mark.parametrize("convert", [torch.bfloat16, torch.float16])
def test_conversion_keeps_the_screen_and_converts_what_decides(
    screen: str, convert: torch.dtype
) -> None:
    weight, centroids, assignments = parts()
    head = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS, screen=screen)
    before = storages(head)
    assert head.to(convert) is head
    packed = head.decoder.weights
    assert packed.weight_scales is not None and packed.model_weight is not None
    assert packed.weight_scales.dtype is format_of(screen).scale_dtype
    assert len(set(before) & set(storages(head))) == len(before) - 1  # all but the model's
    assert packed.model_weight.dtype is convert
    assert weight.dtype is torch.float32
    hidden = states().to(convert)
    own = FlashHead(weight.to(convert), centroids, assignments, n_probes=CLUSTERS)
    assert torch.equal(head(hidden), own(hidden))
    assert head.logits(hidden).dtype is convert
    problem = head.explain()["problem"]
    assert problem["model_dtype"] == {torch.bfloat16: "bf16", torch.float16: "fp16"}[convert]
    assert problem["weight_dtype"] == screen
    assert head.explain()["model_weight"].startswith("a copy: the head was moved or converted")


def test_a_dtype_that_is_no_format_is_refused_until_it_is_one_again() -> None:
    head = screened().double()
    with pytest.raises(FlashtuneError, match="the head must be one of bf16, fp16, fp32"):
        head(states())
    assert torch.equal(head.float()(states()), screened()(states()))


def test_copies_and_pickles_decode_alike() -> None:
    head = screened()
    file = io.BytesIO()
    torch.save(torch.nn.ModuleList([head]), file)
    file.seek(0)
    for other in (
        copy.deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        torch.load(file, weights_only=False)[0],
    ):
        assert torch.equal(other(states()), head(states()))
        assert other.weight.data_ptr() != head.weight.data_ptr()
        assert other.added_bytes == head.added_bytes


def test_a_copy_of_a_model_shares_the_models_weight() -> None:
    """Of the copied model: not the first one's, and not a third."""
    dense = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    model = torch.nn.ModuleList([dense, FlashHead.screened(dense.weight)])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        linear, head = other
        assert head.model_weight is linear.weight
        other.half()
        assert head.model_weight is linear.weight
        assert head.decoder.weights.model_weight.data_ptr() == linear.weight.data_ptr()
        assert head.explain()["model_weight"] == "the one given"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_traces_the_whole_call(backend: str) -> None:
    torch.compiler.reset()
    head = screened(special_token_ids=[3])
    compiled = torch.compile(head, fullgraph=True, backend=backend)
    assert torch.equal(compiled(states()), head(states()))
    logits = torch.compile(head.logits, fullgraph=True, backend=backend)
    assert torch.equal(logits(states()), head.logits(states()))


def test_special_tokens_are_pinned_in_a_screened_head_too() -> None:
    head = screened(n_probes=1, special_token_ids=[7])
    assert bool((head.logits(states())[:, 7] != -1e4).all())
    assert head.explain()["problem"]["n_pinned"] == 1


class TestWithoutClusters:
    @pytest.mark.parametrize("screen", ["int8", "int4", "int4:5"])
    @pytest.mark.parametrize("vocab", [320, 321, 1, 17, 33, 50])
    def test_the_dense_token_is_found(self, vocab: int, screen: str) -> None:
        weight = torch.randn(vocab, WIDTH, generator=torch.Generator().manual_seed(3))
        hidden = states(60)
        dense = hidden @ weight.T
        head = FlashHead.screened(weight, screen)
        assert torch.equal(head(hidden), dense.argmax(dim=1))
        assert head.logits(hidden).shape == dense.shape
        assert bool((head.logits(hidden) > -1e3).all())
        assert head.n_probes == len(head.centroids)

    def test_the_default_is_int4(self) -> None:
        head = FlashHead.screened(parts()[0])
        assert head.screen == Screen.parse("int4")
        assert repr(head) == "FlashHead(320x64, n_clusters=5, n_probes=5, screen=int4:32)"

    @pytest.mark.parametrize(
        ("vocab", "n_clusters"), [(256, 2), (192, 3), (96, 3), (48, 3), (50, 4), (7, 1)]
    )
    def test_clusters_are_as_large_as_divides_the_vocabulary(
        self, vocab: int, n_clusters: int
    ) -> None:
        head = FlashHead.screened(torch.ones(vocab, WIDTH), "int8")
        assert len(head.centroids) == n_clusters
        assert head.ids.unique().tolist() == list(range(vocab))

    def test_rows_that_fill_up_a_cluster_take_no_place_among_those_decided(self) -> None:
        """All rows but two are alike in int8; the last token's would take all 8 places."""
        weight = torch.zeros(49, 16)
        weight[:, 0] = 1.0
        weight[:, 1] = 0.0034  # less than half of what int8 tells apart
        weight[48, 1] = 0.0
        weight[7, 1] = 0.0036
        head = FlashHead.screened(weight, "int8:49")
        assert head.explain()["problem"]["n_rescored"] == len(head.ids)
        assert FlashHead.screened(weight, "int8").explain()["problem"]["n_rescored"] > 8
        assert head(torch.tensor([[1.0, 1.0] + [0.0] * 14])).tolist() == [7]

    def test_what_is_no_screen_or_weight_is_refused(self) -> None:
        with pytest.raises(FlashtuneError, match="needs a screen"):
            FlashHead.screened(parts()[0], "none")
        with pytest.raises(FlashtuneError, match="a screen must have the form int8"):
            FlashHead.screened(parts()[0], "4 bits")
        with pytest.raises(FlashtuneError, match=r"weight must be \[vocab, hidden\]"):
            FlashHead.screened(torch.ones(4))
        with pytest.raises(FlashtuneError, match="weight must be one of bf16"):
            FlashHead.screened(torch.ones(4, 4, dtype=torch.int8))


@pytest.mark.parametrize("screen", ["int8:-1", "bf16", 4])
def test_other_screens_are_refused(screen: Any) -> None:
    with pytest.raises(FlashtuneError, match="a screen"):
        screened(screen=screen)


def test_explain_is_json() -> None:
    json.dumps(screened().explain(3, epilogue="logits"))


def test_a_hidden_state_of_nan_gives_nan() -> None:
    hidden = torch.full((2, WIDTH), float("nan"))
    for head in (screened(), FlashHead.screened(parts()[0])):
        assert bool(head.logits(hidden).isnan().all())
        assert bool(((head(hidden) >= 0) & (head(hidden) < VOCAB)).all())


@pytest.mark.parametrize(
    ("screen", "clusters", "share"),
    [
        ("int8", True, 0.53),
        ("int4", True, 0.30),
        ("int8", False, 0.51),
        ("int4", False, 0.28),
        (None, True, 1.06),
    ],
)
def test_the_docs_say_what_a_head_adds(screen: str | None, clusters: bool, share: float) -> None:
    """At Qwen3-VL-2B's width; the vocabulary matters little."""
    weight = torch.zeros(4096, 2048, dtype=torch.bfloat16)
    if clusters:
        centroids, assignments = weight[::16].clone(), torch.arange(4096) // 16
        head = FlashHead(weight, centroids, assignments, n_probes=8, screen=screen)
    else:
        head = FlashHead.screened(weight, screen or "")
    assert round(head.added_bytes / weight.nbytes, 2) == share
    format_name = f"`{screen}`" if screen else "16-bit"
    line = f"| {format_name}{'' if clusters else ', without clusters'} | {share:.2f} |"
    assert line in (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
