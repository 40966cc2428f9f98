"""The FlashHead module on a CPU: results, refusals, and what survives copies and moves."""

import copy
import io
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
from typing import Any

import pytest
import torch

import flashtune
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.head import FlashHead
from flashtune.kernels.runtime import decoder
from flashtune.kernels.runtime.binding import Bound
from flashtune.kernels.runtime.decoder import ROUNDED, locked
from flashtune.kernels.weights import Weights, permute_rows_
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS, Problem

VOCAB, WIDTH, CLUSTERS = 96, 16, 12


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers: their sums are exact in float32, so that ties are true ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def parts(
    vocab: int = VOCAB,
    width: int = WIDTH,
    clusters: int = CLUSTERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, centroids that tie rarely, and cluster assignments of a shuffled vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vocab, generator=generator)
    assignments = torch.empty(vocab, dtype=torch.int64)
    assignments[order] = torch.arange(vocab) // (vocab // clusters)
    centroids = torch.nn.functional.normalize(torch.randn(clusters, width, generator=generator))
    return whole_numbers(vocab, width, seed=seed, dtype=dtype), centroids.to(dtype), assignments


def reference(
    weight: torch.Tensor,
    centroids: torch.Tensor,
    assignments: torch.Tensor,
    hidden: torch.Tensor,
    n_probes: int,
) -> list[int]:
    """The same in float64, token by token, from the tensors as the caller has them."""
    tokens = []
    for state in hidden.double():
        probed = set((centroids.double() @ state).topk(n_probes).indices.tolist())
        logits = (weight.double() @ state).tolist()
        allowed = [t for t, cluster in enumerate(assignments.tolist()) if cluster in probed]
        tokens.append(min(allowed, key=lambda token: (-logits[token], token)))
    return tokens


@pytest.mark.parametrize(
    ("vocab", "width", "clusters", "n_probes", "n_tokens", "dtype"),
    [
        (96, 16, 12, 3, 1, torch.float32),
        (96, 16, 12, 3, 5, torch.bfloat16),
        (96, 33, 12, 4, 2, torch.float32),
        (96, 1152, 8, 4, 2, torch.bfloat16),
        (144, 33, 12, 5, 3, torch.float16),
        (96, 16, 12, 1, 4, torch.float32),
        (96, 16, 12, 12, 4, torch.float32),
        (96, 16, 12, 2, 2 * MOST_TOKENS + 3, torch.float32),
    ],
)
def test_tokens_are_those_of_the_float64_reference(
    vocab: int, width: int, clusters: int, n_probes: int, n_tokens: int, dtype: torch.dtype
) -> None:
    weight, centroids, assignments = parts(vocab, width, clusters, dtype)
    head = FlashHead(weight, centroids, assignments, n_probes=n_probes)
    hidden = whole_numbers(n_tokens, width, seed=1, dtype=dtype)
    tokens = head(hidden)
    assert tokens.dtype is torch.int64
    assert tokens.tolist() == reference(weight, centroids, assignments, hidden, n_probes)


def test_all_probes_give_the_dense_argmax() -> None:
    weight, centroids, assignments = parts()
    head = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS)
    hidden = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    assert torch.equal(head(hidden), (hidden @ weight.T).argmax(dim=1))


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 2 * MOST_TOKENS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_the_dense_ones_where_clusters_are_probed(
    n_tokens: int, dtype: torch.dtype
) -> None:
    weight, centroids, assignments = parts(dtype=dtype)
    head = FlashHead(weight, centroids, assignments, n_probes=3)
    hidden = whole_numbers(n_tokens, WIDTH, seed=1, dtype=dtype)
    logits = head.logits(hidden)
    dense = (hidden.double() @ weight.double().T).to(dtype)
    probed = (hidden.double() @ centroids.double().T).topk(3).indices
    candidates = (assignments == probed[:, :, None]).any(dim=1)
    assert torch.equal(logits, torch.where(candidates, dense, torch.tensor(-1e4, dtype=dtype)))
    assert torch.equal(logits.argmax(dim=1), head(hidden)) or dtype is not torch.float32


def test_ties_give_the_smallest_token() -> None:
    _, centroids, assignments = parts()
    weight = torch.ones(VOCAB, WIDTH)
    hidden = torch.ones(1, WIDTH)
    head = FlashHead(weight, centroids, assignments, n_probes=2)
    clusters = (centroids @ hidden[0]).topk(2).indices
    smallest = min(token for token in range(VOCAB) if assignments[token] in clusters)
    assert head(hidden).tolist() == [smallest]
    assert FlashHead(weight, centroids, assignments, n_probes=12)(hidden).tolist() == [0]


def test_negative_logits_are_compared_as_numbers() -> None:
    _, centroids, assignments = parts()
    weight = -torch.arange(1, VOCAB + 1).float()[:, None].expand(-1, WIDTH)
    head = FlashHead(weight, centroids, assignments, n_probes=CLUSTERS)
    assert head(torch.ones(2, WIDTH)).tolist() == [0, 0]
    assert head(-torch.ones(1, WIDTH)).tolist() == [VOCAB - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_vocabulary_that_clusters_do_not_divide(sign: int, dtype: torch.dtype) -> None:
    """Logits all of one sign too: a row of padding that is zero would win where all are below."""
    weight, centroids, assignments = parts(dtype=dtype)
    vocab = VOCAB - 7
    weight, assignments = sign * (weight[:vocab].abs() + 1), assignments[:vocab]
    hidden = whole_numbers(5, WIDTH, seed=3, dtype=dtype).abs() + 1
    for n_probes in (1, 3, CLUSTERS):
        head = FlashHead(weight, centroids, assignments, n_probes=n_probes)
        expected = reference(weight, centroids, assignments, hidden, n_probes)
        assert head(hidden).tolist() == expected
        assert head.vocab_size == vocab and head.ids.max() < vocab


def test_an_uneven_vocabulary_needs_assignments_and_a_second_copy() -> None:
    weight, centroids, assignments = parts()
    weight, assignments = weight[: VOCAB - 1], assignments[: VOCAB - 1]
    maps = torch.zeros(CLUSTERS, VOCAB // CLUSTERS, dtype=torch.int64)
    with pytest.raises(FlashtuneError, match="give cluster_assignments"):
        FlashHead(weight, centroids, vocab_maps=maps, n_probes=3)
    with pytest.raises(FlashtuneError, match="12 does not divide 95"):
        FlashHead(weight, centroids, assignments, n_probes=3, release_weight=True)


class TestSpecialTokens:
    """Tokens that are candidates whether or not their cluster is probed."""

    @pytest.mark.parametrize("special", [[5], [90, 3, 3, 40], list(range(VOCAB))])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_their_clusters_are_candidates_always(
        self, special: list[int], dtype: torch.dtype
    ) -> None:
        weight, centroids, assignments = parts(dtype=dtype)
        hidden = whole_numbers(40, WIDTH, seed=8, dtype=dtype)
        head = FlashHead(weight, centroids, assignments, n_probes=1, special_token_ids=special)
        plain = reference(weight, centroids, assignments, hidden, 1)
        logits = hidden.double() @ weight.double().T
        pinned = torch.isin(assignments, assignments[special]).nonzero()[:, 0].tolist()
        expected = [
            min({*pinned, token}, key=lambda token, row=row: (-row[token], token))
            for row, token in zip(logits.tolist(), plain, strict=True)
        ]
        assert expected != plain
        assert head(hidden).tolist() == expected
        problem = head.explain()["problem"]
        assert problem["n_pinned"] == len(set(assignments[special].tolist()))
        assert (problem["n_probes"], problem["n_clusters"]) == (1, CLUSTERS)

    def test_of_many_clusters_the_tokens_alone_are_pinned(self) -> None:
        """12 of 12 clusters would be a dense head: two clusters of their own have all of them."""
        weight, centroids, assignments = parts()
        weight, assignments = weight[:-5], assignments[:-5]  # some clusters are padded already
        special = [int((assignments == cluster).nonzero()[2]) for cluster in range(CLUSTERS)]
        head = FlashHead(weight, centroids, assignments, n_probes=2, special_token_ids=special)
        problem = head.explain()["problem"]
        assert (problem["n_pinned"], problem["n_clusters"]) == (2, CLUSTERS + 2)
        assert problem["n_probes"] == 2 + 2  # the best two of the others, whatever these score
        hidden = whole_numbers(60, WIDTH, seed=8)
        logits = head.logits(hidden)
        dense = hidden @ weight.T
        probed = (hidden @ centroids.T).topk(2).indices
        least = (assignments == probed[:, :, None]).any(dim=1)
        least[:, special] = True
        known = logits != -1e4
        assert bool(known[least].all())
        assert torch.equal(logits[known], dense[known])
        most = (assignments == (hidden @ centroids.T).topk(4).indices[:, :, None]).any(dim=1)
        most[:, special] = True
        assert not bool(known[~most].any())
        assert torch.equal(head(hidden), logits.argmax(dim=1))

    def test_where_all_clusters_are_probed_none_is_pinned(self) -> None:
        head = FlashHead(**_with(n_probes=CLUSTERS, special_token_ids=range(30)))
        assert "n_pinned" not in head.explain()["problem"]

    def test_a_released_weight_has_their_clusters_first(self) -> None:
        weight, centroids, assignments = parts()
        options = {"n_probes": 2, "special_token_ids": range(30)}
        kept = FlashHead(weight, centroids, assignments, **options)
        owned = weight.clone()
        head = FlashHead(owned, centroids, assignments, release_weight=True, **options)
        assert head.weight.data_ptr() == owned.data_ptr()
        assert head.explain()["problem"]["n_pinned"] == len(set(assignments[:30].tolist())) > 8
        hidden = whole_numbers(9, WIDTH, seed=8)
        assert bool((kept.logits(hidden)[:, :30] == head.logits(hidden)[:, :30]).all())

    def test_they_never_win_by_padding_or_by_another_rows_token(self) -> None:
        weight, centroids, assignments = parts()
        weight, assignments = weight[:-5], assignments[:-5]
        hidden = whole_numbers(MOST_TOKENS, WIDTH, seed=8)
        head = FlashHead(weight, centroids, assignments, n_probes=2, special_token_ids=[7])
        together = head(hidden).tolist()
        assert together == [int(head(state[None])) for state in hidden]

    def test_ties_give_the_smaller_token(self) -> None:
        _, centroids, assignments = parts()
        options = {"cluster_assignments": assignments, "n_probes": 2}
        weight, hidden = torch.ones(VOCAB, WIDTH), torch.ones(1, WIDTH)
        plain = int(FlashHead(weight, centroids, **options)(hidden))
        for special in (0, VOCAB - 1):
            head = FlashHead(weight, centroids, special_token_ids=[special], **options)
            least = int((assignments == assignments[special]).nonzero()[0])
            assert int(head(hidden)) == min(plain, least)

    def test_a_hidden_state_of_nan_changes_nothing(self) -> None:
        hidden = torch.full((2, WIDTH), float("nan"))
        head = FlashHead(**_with(special_token_ids=[3]))
        assert bool(head.logits(hidden).isnan().all())

    def test_they_survive_a_copy_and_a_change_of_dtype(self) -> None:
        head = FlashHead(**_with(special_token_ids=[3, 90]))
        hidden = whole_numbers(9, WIDTH, seed=8)
        for other in (
            copy.deepcopy(head),
            pickle.loads(pickle.dumps(head)),
            head.double().float(),
        ):
            assert torch.equal(other(hidden), head(hidden))


def test_vocab_maps_mean_the_same_as_assignments() -> None:
    weight, centroids, assignments = parts()
    maps = torch.stack([(assignments == c).nonzero()[:, 0].flip(0) for c in range(CLUSTERS)])
    by_maps = FlashHead(weight, centroids, vocab_maps=maps, n_probes=3)
    by_assignments = FlashHead(weight, centroids, assignments, n_probes=3)
    hidden = whole_numbers(6, WIDTH, seed=3)
    assert torch.equal(by_maps(hidden), by_assignments(hidden))
    assert torch.equal(by_maps.ids, by_assignments.ids)


def test_the_callers_weight_is_left_alone_unless_released() -> None:
    weight, centroids, assignments = parts()
    before = weight.clone()
    FlashHead(weight, centroids, assignments, n_probes=3)
    assert torch.equal(weight, before)


def test_a_released_weight_is_permuted_in_its_own_storage() -> None:
    weight, centroids, assignments = parts()
    parameter = torch.nn.Parameter(weight.clone())
    head = FlashHead(parameter, centroids, assignments, n_probes=3, release_weight=True)
    assert head.weight.data_ptr() == parameter.data_ptr()
    kept = FlashHead(weight, centroids, assignments, n_probes=3)
    assert torch.equal(head.weight, kept.weight)
    hidden = whole_numbers(3, WIDTH, seed=4)
    assert torch.equal(head(hidden), kept(hidden))


def test_rows_are_permuted_by_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtune.kernels.weights._CHUNK_BYTES", 3 * 4 * VOCAB)
    weight, _, _ = parts()
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
    expected, sizes = weight[order], []
    select = torch.Tensor.index_select

    def watched(self: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.append(self.shape[1])
        return select(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    permute_rows_(weight, order)
    assert torch.equal(weight, expected)
    assert sizes == [3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("unfit", ["transposed", "misaligned"])
def test_a_weight_that_cannot_be_used_in_place_is_not_released(unfit: str) -> None:
    _, centroids, assignments = parts()
    weight = torch.zeros(WIDTH, VOCAB).T
    if unfit == "misaligned":
        weight = torch.zeros(VOCAB * WIDTH + 1)[1:].view(VOCAB, WIDTH)
    with pytest.raises(FlashtuneError, match="release_weight needs a contiguous weight"):
        FlashHead(weight, centroids, assignments, n_probes=3, release_weight=True)
    assert FlashHead(weight, centroids, assignments, n_probes=3)(torch.ones(1, WIDTH)).shape == (
        1,
    )


def _with(**changes: Any) -> dict[str, Any]:
    weight, centroids, assignments = parts()
    values = {"weight": weight, "centroids": centroids, "cluster_assignments": assignments}
    return {**values, "n_probes": 3, **changes}


def _spoiled(index: int, value: float) -> torch.Tensor:
    tensor = parts()[index].clone()
    tensor[-1, -1] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(VOCAB)}, "weight must have two dimensions"),
        ({"centroids": torch.zeros(2, 6, WIDTH)}, "centroids must have two dimensions"),
        ({"centroids": torch.zeros(CLUSTERS, 8)}, "rows of 16 elements, but centroids of 8"),
        ({"centroids": torch.zeros(7, WIDTH)}, "cluster_assignments must lie in 0 … 6"),
        ({"centroids": torch.zeros(0, WIDTH)}, "centroids must have rows"),
        (
            {"special_token_ids": [0, VOCAB]},
            "special_token_ids must be whole numbers from 0 to 95",
        ),
        ({"special_token_ids": [-1]}, "must be whole numbers from 0 to 95"),
        ({"special_token_ids": [True]}, "must be whole numbers from 0 to 95"),
        ({"weight": torch.zeros(VOCAB, WIDTH).double()}, "weight must be one of bf16"),
        ({"centroids": torch.zeros(CLUSTERS, WIDTH).long()}, "centroids must be one of bf16"),
        ({"centroids": torch.zeros(CLUSTERS, WIDTH, device="meta")}, "centroids on meta"),
        ({"weight": _spoiled(0, float("nan"))}, "weight contains NaN"),
        ({"weight": _spoiled(0, float("inf"))}, "weight contains NaN or infinity"),
        ({"centroids": _spoiled(1, float("-inf"))}, "centroids contains NaN or infinity"),
        ({"n_probes": 0}, "n_probes must be a positive whole number"),
        ({"n_probes": 13}, "n_probes 13 is more than n_clusters 12"),
        ({"n_probes": 2.5}, "n_probes must be a positive whole number"),
        ({"cluster_assignments": None}, "either cluster_assignments or vocab_maps"),
        ({"vocab_maps": torch.arange(VOCAB).view(CLUSTERS, -1)}, "give either"),
        ({"cluster_assignments": torch.zeros(VOCAB)}, "must be whole numbers"),
        ({"cluster_assignments": torch.arange(8)}, r"must be \[96\], not \[8\]"),
        ({"cluster_assignments": torch.full((VOCAB,), -1)}, "must lie in 0 … 11"),
        ({"cluster_assignments": torch.arange(VOCAB) // 9}, "clusters must have equal sizes"),
        (
            {"cluster_assignments": None, "vocab_maps": torch.arange(VOCAB)},
            r"vocab_maps must be \[12, 8\]",
        ),
        (
            {"cluster_assignments": None, "vocab_maps": torch.zeros(12, 8).long()},
            "every token id",
        ),
    ],
)
def test_bad_tensors_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashtuneError, match=message) as caught:
        FlashHead(**_with(**changes))
    assert "\n" not in str(caught.value)


def test_a_bad_hidden_state_is_refused() -> None:
    head = FlashHead(**_with())
    with pytest.raises(FlashtuneError, match=r"hidden must be \[tokens, 16\], not \[16\]"):
        head(torch.zeros(WIDTH))
    with pytest.raises(FlashtuneError, match=r"not \[2, 3, 16\]"):
        head(torch.zeros(2, 3, WIDTH))
    with pytest.raises(FlashtuneError, match=r"not \[1, 15\]"):
        head(torch.zeros(1, 15))
    with pytest.raises(FlashtuneError, match="hidden is on meta, the head on cpu"):
        head(torch.zeros(1, WIDTH, device="meta"))


def test_hidden_states_of_any_layout_and_dtype_are_taken() -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(4, WIDTH, seed=6)
    expected = head(hidden)
    assert torch.equal(head(hidden.T.contiguous().T), expected)
    shifted = torch.zeros(4 * WIDTH + 1)[1:].view(4, WIDTH).copy_(hidden)
    assert torch.equal(head(shifted), expected)
    assert torch.equal(head(hidden.double().requires_grad_()), expected)
    assert torch.equal(head(hidden.bfloat16()), expected)
    assert head(hidden[:0]).shape == (0,)


def test_nothing_is_in_the_state_dict() -> None:
    head = FlashHead(**_with())
    assert head.state_dict() == {}
    head.load_state_dict({})


def test_copies_and_pickles_decode_alike_and_share_nothing() -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(3, WIDTH, seed=7)
    expected = head(hidden)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(hidden), expected)
        assert other.weight.data_ptr() != head.weight.data_ptr()
        assert other._handle != head._handle
    file = io.BytesIO()
    torch.save(torch.nn.ModuleList([head]), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)[0](hidden), expected)


def test_converting_the_module_forgets_what_was_bound() -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(2, WIDTH, seed=8)
    expected = head(hidden)
    assert head.explain(2)["problem"]["weight_dtype"] == "fp32"
    assert head.to(torch.bfloat16) is head
    assert head.explain(2)["problem"]["weight_dtype"] == "bf16"
    assert head.ids.dtype is torch.int32
    assert head(hidden).shape == expected.shape
    nested = torch.nn.Sequential(FlashHead(**_with())).half()
    assert nested[0].explain()["problem"]["centroid_dtype"] == "fp16"


def test_on_a_cpu_centroids_are_converted_once() -> None:
    weight, centroids, assignments = parts(dtype=torch.bfloat16)
    head = FlashHead(weight, centroids, assignments, n_probes=3)
    head(torch.zeros(1, WIDTH))
    converted = vars(head.decoder._steps["argmax", 1, 0])["_scored"]
    assert converted[1].dtype is torch.float32
    head(torch.zeros(1, WIDTH))
    assert vars(head.decoder._steps["argmax", 1, 0])["_scored"] is converted


@pytest.mark.parametrize(
    ("n_tokens", "here", "on_a_gpu"),
    [
        (1, [1], [1]),
        (5, [5], [8]),
        (32, [32], [32]),
        (41, [32, 9], [32, 16]),
        (64, [32], [32]),
    ],
)
def test_the_steps_of_a_call(n_tokens: int, here: list[int], on_a_gpu: list[int]) -> None:
    decoder = FlashHead(*parts(), n_probes=3).decoder
    assert decoder.step_sizes(n_tokens) == here
    decoder._step_sizes = ROUNDED
    assert decoder.step_sizes(n_tokens) == on_a_gpu


def test_a_step_for_more_tokens_gives_those_that_are_there() -> None:
    weight, centroids, assignments = parts()
    exact = FlashHead(weight, centroids, assignments, n_probes=3)
    rounded = FlashHead(weight, centroids, assignments, n_probes=3)
    rounded.decoder._step_sizes = ROUNDED
    for n_tokens in (1, 3, 7, 33, 41, 0):
        hidden = torch.randn(n_tokens, WIDTH)
        assert torch.equal(rounded(hidden), exact(hidden))
        assert torch.equal(rounded.logits(hidden), exact.logits(hidden))
    assert {key[1] for key in rounded.decoder._steps} == {1, 4, 8, 16, 32}


def test_what_is_prepared_is_what_a_call_runs() -> None:
    """However many tokens are asked for: no step is made for a million of them."""
    head = FlashHead(**_with())
    head.prepare(1, 10**6 + 5)
    made = {("argmax", size) for size in (1, 32, 10**6 % 32 + 5)}
    assert set(head.decoder._bounds) == made
    with pytest.raises(FlashtuneError, match="n_tokens"):
        head.prepare(0)


def test_explain_is_json_and_says_what_runs() -> None:
    head = FlashHead(**_with())
    data = json.loads(json.dumps(head.explain(3)))
    assert (data["level"], data["device"], data["troubles"]) == ("torch", "cpu", [])
    assert data["problem"]["n_tokens"] == 3
    assert head.explain(3, epilogue="logits")["problem"]["epilogue"] == "logits"
    with pytest.raises(FlashtuneError, match="epilogue must be one of argmax, logits"):
        head.prepare(1, epilogue="beam")
    assert repr(head) == "FlashHead(96x16, n_clusters=12, n_probes=3)"


def test_a_choice_is_logged_once_and_a_cpu_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    head = FlashHead(**_with())
    with caplog.at_level(logging.INFO, logger="flashtune"):
        for _ in range(3):
            head(torch.zeros(1, WIDTH))
    assert [(line.levelname, line.getMessage()) for line in caplog.records] == [
        (
            "INFO",
            "96x16 c12 p3 fp32 runs torch: no kernels for this kind of device: "
            "plain torch runs instead",
        )
    ]


def test_a_call_that_keeps_waiting_says_for_what(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = decoder.bind

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return bind(*arguments, **options)

    monkeypatch.setattr(decoder, "bind", slow)
    monkeypatch.setattr(decoder, "SILENCE", 0.05)
    head = FlashHead(**_with())
    head._allowance.race_seconds = 20.0
    head.prepare(1)
    head(torch.zeros(1, WIDTH))
    assert not caplog.records
    for _ in range(2):
        head.logits(torch.zeros(3, WIDTH))
    [line] = caplog.records
    assert line.levelname == "WARNING" and "first call with n_tokens=3" in line.getMessage()
    assert "compiles its kernel, after racing several for up to 20 s; " in line.getMessage()
    assert "head.prepare(3, epilogue='logits') does so ahead of time" in line.getMessage()
    FlashHead(**_with(), tune="never")(torch.zeros(1, WIDTH))
    assert "race" not in caplog.records[-1].getMessage() and len(caplog.records) == 2
    monkeypatch.setattr(decoder, "SILENCE", 60.0)
    FlashHead(**_with())(torch.zeros(1, WIDTH))
    assert len(caplog.records) == 2
    monkeypatch.setattr(decoder, "SILENCE", 0.05)
    caplog.set_level(logging.INFO, logger="flashtune")
    FlashHead(**_with())(torch.zeros(1, WIDTH))
    assert {each.levelname for each in caplog.records[2:]} == {"INFO"}
    assert any("first call with n_tokens=1" in each.getMessage() for each in caplog.records[2:])


def test_threads_may_share_a_head() -> None:
    head = FlashHead(**_with())
    states = whole_numbers(8, 2, WIDTH, seed=9)
    expected = [FlashHead(**_with())(state).tolist() for state in states]
    results: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        results[number] = [head(states[number]).tolist() for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(8)] == [[tokens] * 20 for tokens in expected]


@pytest.fixture
def mixtures(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, ...]]:
    """Dtypes with which steps were called, whose kernels were made for others: any would be read
    as the wrong type and beyond their ends.
    """
    found: set[tuple[torch.dtype, ...]] = set()
    bind = decoder.bind

    def checked(problem: Problem, weights: Weights, **options: Any) -> Bound:
        bound = bind(problem, weights, **options)
        step, dtype = bound.take_step(), format_of(problem.weight_dtype).torch_dtype

        def call(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
            dtypes = (weights.weight.dtype, weights.centroids.dtype, hidden.dtype)
            if set(dtypes) != {dtype}:
                found.add((dtype, *dtypes))
            step(weights, hidden, out)

        bound.new_step = lambda: call
        return bound

    monkeypatch.setattr(decoder, "bind", checked)
    return found


def test_a_call_during_which_the_head_is_converted_ends_with_the_old_tensors(
    mixtures: set[tuple[torch.dtype, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(4, WIDTH, seed=6).T.contiguous().T
    expected = head(hidden)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        """In the middle of a call, as another thread may."""
        head.to(torch.bfloat16)
        return tensor.contiguous()

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "aligned", convert)
        assert torch.equal(head(hidden), expected)
    assert head.weight.dtype is head.logits(hidden).dtype is torch.bfloat16
    assert not mixtures


def test_threads_may_call_a_head_while_it_is_converted(
    mixtures: set[tuple[torch.dtype, ...]],
) -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(3, WIDTH, seed=12)
    shapes, errors, over = set(), [], threading.Event()

    def call() -> None:
        try:
            while not shapes or not over.is_set():
                shapes.add((tuple(head(hidden).shape), tuple(head.logits(hidden).shape)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for number in range(100):
            head.to((torch.bfloat16, torch.float16, torch.float32)[number % 3])
            head.explain(3)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
    assert shapes == {((3,), (3, VOCAB))}
    assert not mixtures


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_traces_the_whole_call(backend: str) -> None:
    torch.compiler.reset()
    head = FlashHead(**_with())
    other = FlashHead(**_with(weight=-parts()[0]))
    hidden = whole_numbers(3, WIDTH, seed=10)

    def model(hidden: torch.Tensor) -> torch.Tensor:
        return head(2 * hidden) + VOCAB * other(2 * hidden)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(compiled(hidden), model(hidden))
    assert torch.equal(torch.compile(head, fullgraph=True, backend=backend)(hidden), head(hidden))
    logits = torch.compile(head.logits, fullgraph=True, backend=backend)
    assert torch.equal(logits(hidden), head.logits(hidden))


def test_the_operator_keeps_its_contract() -> None:
    head = FlashHead(**_with())
    hidden = whole_numbers(3, WIDTH, seed=11)
    torch.library.opcheck(torch.ops.flashtune.decode.default, (hidden, head._handle))
    arguments = (hidden.bfloat16(), head.weight, head.vocab_size, head._handle)
    torch.library.opcheck(torch.ops.flashtune.logits.default, arguments)


def test_a_compiled_head_that_is_gone_says_so() -> None:
    with pytest.raises(FlashtuneError, match="no longer exists"):
        torch.ops.flashtune.decode(torch.zeros(1, WIDTH), -1)


def test_the_public_name_is_this_class() -> None:
    assert flashtune.FlashHead is FlashHead


def test_the_exception_of_a_signals_handler_leaves_the_head_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class OutOfTimeError(Exception):
        pass

    def ring(*_: Any) -> None:
        raise OutOfTimeError

    head = FlashHead(*parts(), n_probes=3)
    hidden = torch.randn(1, WIDTH)
    expected = head(hidden)
    key = ("argmax", 1, 0)
    step = head.decoder._steps[key]

    def interrupted(*call: Any) -> None:
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        head.decoder._steps[key] = interrupted
        with pytest.raises(OutOfTimeError):
            head(hidden)
        assert head.decoder._steps[key] is interrupted
    finally:
        signal.signal(signal.SIGALRM, before)
    head.decoder._steps[key] = step
    assert torch.equal(head(hidden), expected)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("hidden", "why"),
    [
        (torch.zeros(1, WIDTH, dtype=torch.complex64), "floating-point, not torch.complex64"),
        (torch.zeros(1, WIDTH, dtype=torch.int64), "floating-point, not torch.int64"),
        (torch.zeros(1, WIDTH).to_sparse(), "a dense tensor, not torch.sparse_coo"),
        ([[0.0] * WIDTH], "a dense tensor, not list"),
        (None, "a dense tensor, not NoneType"),
    ],
)
def test_what_is_no_hidden_state_is_refused(hidden: Any, why: str) -> None:
    head = FlashHead(*parts(), n_probes=3)
    for call in (head, head.logits):
        with pytest.raises(FlashtuneError, match=why):
            call(hidden)


@pytest.mark.parametrize("number", [0, -1, 1.5, "3", None])
def test_what_is_no_number_of_tokens_is_refused(number: Any) -> None:
    head = FlashHead(*parts(), n_probes=3)
    for call in (head.prepare, head.explain):
        with pytest.raises(FlashtuneError, match="n_tokens must be a positive whole number"):
            call(number)


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_answers_are_tensors_as_torch_makes_them(
    public: bool, mode: type[torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a torch that has no other way to make them than its public one."""
    if public:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    head = FlashHead(*parts(), n_probes=3)
    with mode():
        for answer, like in (
            (head(torch.randn(41, WIDTH)), torch.empty(41, dtype=torch.int64)),
            (head.logits(torch.randn(2, WIDTH)), torch.empty(2, VOCAB)),
        ):
            for name in ("shape", "dtype", "device", "layout", "requires_grad"):
                assert getattr(answer, name) == getattr(like, name), name
            assert answer.stride() == like.stride()
            assert answer.is_inference() == like.is_inference()


def test_a_fork_amid_another_threads_call_leaves_a_child_that_decodes() -> None:
    """As if that thread held the locks for ever: in the child it is not there."""
    head = FlashHead(*parts(), n_probes=3)
    hidden = torch.randn(2, WIDTH)
    expected = head(hidden).tolist()
    held, done = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        held.set()
        done.wait()

    def call() -> None:
        with head._allowance.lock:
            head(hidden)

    head.decoder._steps["argmax", 2, 0] = locked(hold)
    thread = threading.Thread(target=call)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if head(hidden).tolist() == expected else 5)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_a_map_of_tokens_far_outside_asks_for_no_memory() -> None:
    weight, centroids, _ = parts()
    maps = torch.full((len(centroids), len(weight) // len(centroids)), 2**40)
    with pytest.raises(FlashtuneError, match="vocab_maps must contain every token id"):
        FlashHead(weight, centroids, vocab_maps=maps, n_probes=3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weight": [[1.0]]}, "weight must be a dense tensor, not list"),
        (
            {"weight": torch.zeros(VOCAB, WIDTH).to_sparse()},
            "weight must be a dense tensor, not t",
        ),
        ({"centroids": None}, "centroids must be a dense tensor, not NoneType"),
        (
            {"cluster_assignments": [0] * VOCAB},
            "cluster_assignments must be a dense tensor, not l",
        ),
        ({"special_token_ids": 3}, "special_token_ids must be a list of token ids, not 3"),
    ],
)
def test_what_is_no_tensor_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(FlashtuneError, match=why):
        FlashHead(**_with(**changes))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_hidden_state_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(1, WIDTH)])
    with pytest.raises(FlashtuneError, match="hidden must be a dense tensor, not nested"):
        FlashHead(*parts(), n_probes=3)(nested)


@pytest.mark.parametrize("screen", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_torch_is_exact_where_the_caller_computes_in_fewer_bits(
    dtype: torch.dtype, screen: str | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, centroids, hidden = (
        torch.randn(rows, 64, generator=generator) for rows in (512, 32, 6)
    )
    head = FlashHead(weight, centroids, torch.arange(512) % 32, n_probes=4, screen=screen)
    with torch.autocast("cpu", dtype=dtype):
        token, logits = head(hidden), head.logits(hidden)
    assert head.explain(6)["level"] == "torch"
    assert torch.equal(token, head(hidden))
    assert torch.equal(logits, head.logits(hidden))
