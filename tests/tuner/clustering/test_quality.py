"""A study says of each form of a head what plain torch answers in it, for any number of probes."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loaded import loaded

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.model_folder.clusters import Clusters
from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.kernels.weights import problem_of
from flashtune.tuner.clustering import head_latency, six_bits
from flashtune.tuner.clustering.dense_step import dense_step
from flashtune.tuner.clustering.head_form import HeadForm, forms_of, rounded, with_clusters
from flashtune.tuner.clustering.head_latency import HeadLatency
from flashtune.tuner.clustering.quality import Agreement, QualityRow, Study
from flashtune.tuner.clustering.quality_report import TimedRow, _fastest
from flashtune.tuning_db.errors import FlashtuneError

VOCAB, WIDTH, CLUSTERS = 208, 32, 26
PLAIN = with_clusters("fp32", None)
SCREENS = ("int8", "int4/int8:2", "int4:3", "int8:0", "int4:0", "int8/int4:6")


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def screened(text: str) -> HeadForm:
    return with_clusters("fp32", Screen.parse(text))


@pytest.fixture(scope="module")
def parts() -> HeadParts:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    assignments = torch.randperm(VOCAB, generator=generator) % CLUSTERS
    centroids = torch.stack([weight[assignments == each].mean(0) for each in range(CLUSTERS)])
    return HeadParts(
        weight=weight,
        clusters=Clusters(centroids=centroids, assignments=assignments),
        n_probes=4,
        special_token_ids=[],
    )


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return torch.randn(150, WIDTH, generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def dense(parts: HeadParts, states: torch.Tensor) -> torch.Tensor:
    return states @ parts.weight.T


def head_of(parts: HeadParts, form: HeadForm, n_probes: int) -> FlashHead:
    if not form.clustered:
        screen = Screen(centroids=form.rows, rows=form.rows, n_rescored=form.n_rescored)
        return FlashHead.screened(parts.weight, screen)
    clusters = parts.clusters
    return FlashHead(
        parts.weight,
        clusters.centroids,
        clusters.assignments,
        n_probes=n_probes,
        screen=form.screen,
    )


def answer(parts: HeadParts, form: HeadForm, n_probes: int, states: torch.Tensor) -> torch.Tensor:
    """What a head of the form answers."""
    return head_of(parts, form, n_probes)(states)


@pytest.mark.parametrize("text", ["plain", *SCREENS])
def test_agreement_is_that_of_the_step_for_any_number_of_probes(
    parts: HeadParts, states: torch.Tensor, dense: torch.Tensor, text: str
) -> None:
    form = PLAIN if text == "plain" else screened(text)
    study = Study.of(parts, states, forms=[PLAIN, form])
    right = dense.argmax(dim=1)
    for n_probes in (1, 2, 3, 5, 9, 16, CLUSTERS):
        agree = (answer(parts, form, n_probes, states) == right).double().mean()
        assert study.row(n_probes, form).top1 == pytest.approx(float(agree), abs=1e-12), n_probes


@pytest.mark.parametrize("text", ["plain", "int8", "int4:3", "int4:0"])
def test_an_answer_is_the_same_where_all_of_its_tokens_are(
    parts: HeadParts, states: torch.Tensor, dense: torch.Tensor, text: str
) -> None:
    form = PLAIN if text == "plain" else screened(text)
    lengths = [1, 5, 2, 30, 1, 1, 60, 50]
    agreement = Study.of(parts, states, forms=[form], lengths=lengths).of_form(form)
    right = dense.argmax(dim=1)
    for n_probes in (1, 5, 9, 16, CLUSTERS):
        same = answer(parts, form, n_probes, states) == right
        whole = sum(bool(each.all()) for each in same.split(lengths))
        assert int(agreement.answers[n_probes - 1]) == whole, n_probes
        assert agreement.row(n_probes).answers == whole / len(lengths)
    least = agreement.least_for_answers(3 / 8)
    if least is not None:
        assert agreement.answers[least - 1] >= 3 > agreement.answers[: least - 1].max()
    with pytest.raises(FlashtuneError, match="lengths add up to 3 states, but there are 150"):
        Study.of(parts, states, forms=[form], lengths=[3])


def test_the_fewest_probes_where_more_of_them_find_less() -> None:
    """As they may with a screen: other tokens take the places. Bisection would miss it."""
    counts = torch.tensor([3, 8, 7, 7, 6])
    found = Agreement(
        n_states=10, n_answers=10, top1=counts, top5=counts, mass=counts / 10, answers=counts
    )
    assert [found.least_probes(share) for share in (0.1, 0.3, 0.31, 0.7, 0.8)] == [1, 1, 2, 2, 2]
    assert found.least_probes(0.81) is None


@pytest.mark.parametrize("text", ["int8:7", "int4:5", "int4:0"])
def test_the_top_five_are_all_among_those_that_are_decided(
    parts: HeadParts, states: torch.Tensor, dense: torch.Tensor, text: str
) -> None:
    form = screened(text)
    study = Study.of(parts, states, forms=[form])
    five = dense.topk(5).indices
    for n_probes in (1, 3, 9, CLUSTERS):
        plain = replace(form, n_rescored=0)
        logits = head_of(parts, plain, n_probes).logits(states)
        decided = logits.topk(max(5, form.n_rescored)).indices
        inside = (five[:, :, None] == decided[:, None]).any(dim=2).all(dim=1).double().mean()
        assert study.row(n_probes, form).top5 == pytest.approx(float(inside), abs=1e-12)


def test_mass_is_that_of_the_clusters_that_the_screened_centroids_probe(
    parts: HeadParts, states: torch.Tensor, dense: torch.Tensor
) -> None:
    form = screened("int4/int8")
    special = replace(parts, special_token_ids=[7, 90])
    centroids = rounded("int4", parts.clusters.centroids)
    probed = (states @ centroids.T).topk(5).indices
    inside = (parts.clusters.assignments[None, :, None] == probed[:, None]).any(dim=2)
    more = inside.index_fill(1, torch.tensor([7, 90]), True)
    for each, candidates in ((parts, inside), (special, more)):
        mass = (dense.softmax(dim=1) * candidates).sum(dim=1).mean()
        found = Study.of(each, states, forms=[form]).row(5, form).mass
        assert found == pytest.approx(float(mass), abs=1e-5)


@pytest.mark.parametrize("n_rescored", [0, 2])
def test_a_head_without_clusters(
    parts: HeadParts, states: torch.Tensor, dense: torch.Tensor, n_rescored: int
) -> None:
    form = HeadForm(rows="int4", n_rescored=n_rescored)
    found = Study.of(parts, states, forms=[form]).row(1, form)
    screen = Screen(centroids="int4", rows="int4", n_rescored=n_rescored)
    all_probed = answer(parts, with_clusters("fp32", screen), CLUSTERS, states)
    agree = (all_probed == dense.argmax(dim=1)).double().mean()
    assert found.top1 == pytest.approx(float(agree), abs=1e-12) and found.mass == 1
    assert found.top1 < 1
    if n_rescored:
        assert torch.equal(answer(parts, form, 1, states), all_probed)


def test_forms_and_their_names() -> None:
    screens = [Screen.parse(text) for text in ("int8", "int4/int8", "int4:0")]
    assert [str(form) for form in forms_of("bf16", screens)] == [
        "bf16", "int8:8", "int4/int8:8", "int4:0",
        "no clusters int8:8", "dense int4", "dense int8", "dense q6_k",
    ]  # fmt: skip
    assert [str(form) for form in forms_of("bf16", [])] == ["bf16"]


@pytest.mark.parametrize("text", ["plain", "int8", "int4/int8:2", "int4", "no clusters"])
def test_added_bytes_are_those_of_the_head(parts: HeadParts, text: str) -> None:
    forms = {"plain": PLAIN, "no clusters": HeadForm(rows="int4", n_rescored=4)}
    form = forms[text] if text in forms else screened(text)
    head, exact = head_of(parts, form, 4), form.clustered
    problem = problem_of(parts.weight, parts.clusters.centroids, 4, 1)
    # Without clusters it has empty ones all the same, 13 of 16 tokens
    right = head.added_bytes - (0 if exact else head.centroids.nbytes + 13 * 2)
    assert form.added_bytes(problem, VOCAB) == right


def test_read_bytes() -> None:
    problem = problem_of(torch.zeros(320, 64, dtype=torch.bfloat16), torch.zeros(20, 64), 5, 1)
    problem = replace(problem, centroid_dtype="bf16")

    def read(form: HeadForm) -> int:
        return form.read_bytes(problem, 320)

    assert read(with_clusters("bf16", None)) == (20 + 80) * 128
    assert read(with_clusters("bf16", Screen.parse("int4/int8:3"))) == 20 * 36 + 80 * 68 + 3 * 128
    assert read(HeadForm(rows="int4", n_rescored=32)) == 320 * 36 + 32 * 128
    assert read(HeadForm(rows="q6_k")) == 320 * 64 * 6.5625 / 8
    assert read(HeadForm(rows="bf16")) == 320 * 128
    assert HeadForm(rows="bf16").added_bytes(problem, 320) == 0


class TestSixBits:
    def test_it_lies_between_four_and_eight(self, parts: HeadParts) -> None:
        errors = [
            float((rounded(name, parts.weight) - parts.weight).square().mean())
            for name in ("int8", six_bits.NAME, "int4")
        ]
        assert errors == sorted(errors) and errors[2] > 4 * errors[1]

    def test_each_block_has_its_own_scale(self) -> None:
        row = torch.cat([torch.full((16,), 1.0), torch.full((16,), 100.0), torch.zeros(8)])
        found = six_bits.rounded(torch.stack([row, -row, row * 0]))
        torch.testing.assert_close(found, torch.stack([row, -row, row * 0]), rtol=0.5, atol=0)
        torch.testing.assert_close(found[:, 16:], torch.stack([row, -row, row * 0])[:, 16:],
                                   rtol=1e-3, atol=0)  # fmt: skip

    def test_an_error_is_bounded_by_the_steps(self, parts: HeadParts) -> None:
        """A step of the block, at the end that has one number less, and what rounding its scale to
        a multiple of the row's smallest one adds to 32 of them.
        """
        most = parts.weight.view(VOCAB, -1, 16).abs().amax(dim=2)
        finest = most.amax(dim=1, keepdim=True) / 127
        error = (six_bits.rounded(parts.weight) - parts.weight).abs().view(VOCAB, -1, 16)
        assert bool((error.amax(dim=2) <= (most + 17 * finest) / 32 * 1.001).all())


class TestDenseStep:
    @pytest.mark.parametrize("rows", ["int8", "int4", "fp32"])
    def test_torchs_products_answer_as_the_format_does(
        self, parts: HeadParts, states: torch.Tensor, rows: str
    ) -> None:
        step = dense_step(rows, parts.weight)
        if step is None:
            pytest.skip(f"this torch has no product of {rows}")
        out = torch.empty(len(states), dtype=torch.int64)
        weights = head_of(parts, PLAIN, 4).decoder.weights
        for state, token in zip(states.split(1), out.split(1), strict=True):
            step(weights, state, token)
        right = (states @ rounded(rows, parts.weight).T).argmax(dim=1)
        assert (out == right).double().mean() > 0.97  # it may round the hidden state

    @pytest.mark.parametrize("rows", ["int8", "int4"])
    def test_a_hidden_state_need_not_be_aligned(
        self, parts: HeadParts, states: torch.Tensor, rows: str
    ) -> None:
        """Torch's operator ended the process for one that lay at an odd place of a mapped file."""
        step = dense_step(rows, parts.weight.bfloat16())
        if step is None:
            pytest.skip(f"this torch has no product of {rows}")
        weights = head_of(parts, PLAIN, 4).decoder.weights
        found = []
        for start in (0, 1):
            room = torch.zeros(WIDTH + 1, dtype=torch.bfloat16)
            room[start : start + WIDTH] = states[0]
            out = torch.empty(1, dtype=torch.int64)
            step(weights, room[start : start + WIDTH][None], out)
            found.append(int(out))
        assert found[0] == found[1]

    def test_none_where_torch_has_none(
        self, parts: HeadParts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert dense_step(six_bits.NAME, parts.weight) is None

        def missing(*_: object) -> None:
            raise NotImplementedError

        monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
        assert dense_step("int8", parts.weight) is None


class TestLatency:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head_latency, "_REPLAYS", 3)

    @pytest.mark.parametrize("special", [[], [3, 77]])
    def test_any_form_is_timed(
        self, parts: HeadParts, states: torch.Tensor, special: list[int]
    ) -> None:
        latency = HeadLatency(replace(parts, special_token_ids=special), states)
        for form in forms_of("fp32", [Screen.parse("int4/int8:2")]):
            found = latency.of(form, 3)
            if form.rows == six_bits.NAME:
                assert found is None
            elif found is not None:
                assert found[0].median_us > 0 and found[1] == "torch"


class TestFastest:
    def row(self, text: str, top1: float, median: float | None, read: int, added: int) -> TimedRow:
        form = PLAIN if text == "plain" else screened(text)
        timing = None if median is None else Timing(median, 2.0, 30)
        quality = QualityRow(n_probes=4, top1=top1, top5=0.5, mass=0.5)
        return TimedRow(
            form=form, quality=quality, read_bytes=read, added_bytes=added, timing=timing
        )

    def test_the_fastest_that_reaches_the_recall(self) -> None:
        rows = [
            self.row("plain", 0.99, 100, 1000, 1000),
            self.row("int8", 0.99, 60, 500, 500),
            self.row("int4", 0.98, 30, 250, 250),
        ]
        assert _fastest(rows, 0.99) is rows[1]
        assert _fastest(rows, 0.98) is rows[2]

    def test_within_noise_the_one_that_adds_fewer_bytes(self) -> None:
        rows = [
            self.row("int8", 0.99, 60, 500, 500),
            self.row("int4/int8", 0.99, 61.5, 400, 490),
            self.row("int4", 0.99, 63, 250, 250),
        ]
        assert _fastest(rows, 0.99) is rows[1]

    def test_untimed_the_one_that_reads_fewest(self) -> None:
        rows = [
            self.row("plain", 0.99, 10, 1000, 1000),
            self.row("int8", 0.99, None, 500, 500),
        ]
        assert _fastest(rows, 0.99) is rows[1]


def benchmark() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "screen_quality.py"
    return loaded(path)


@pytest.mark.parametrize("text", SCREENS)
def test_the_benchmark_takes_the_tokens_and_logits_of_the_step(
    parts: HeadParts, states: torch.Tensor, text: str
) -> None:
    module, form = benchmark(), screened(text)
    heads = module.Heads(parts, [PLAIN, form])
    heads.load(states)
    for each in (PLAIN, form):
        logits = heads.logits(each, 5)
        assert torch.equal(heads.token(each, logits), answer(parts, each, 5, states))
        written = head_of(parts, each, 5).logits(states)
        candidates = written > -1e4
        assert torch.equal(candidates, logits > module._NEVER)
        torch.testing.assert_close(logits[candidates], written[candidates])


def test_the_benchmarks_distances() -> None:
    module = benchmark()
    never = module._NEVER
    first = torch.tensor([[0.0, 1.0, never, 2.0], [0.0, 1.0, 2.0, never]])
    second = torch.tensor([[1.0, 1.0, never, never], [0.0, 1.0, 2.0, never]])
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([0.5, 0.5])
    right = float((p * (p / q).log()).sum())
    assert module.divergence(first, second).tolist() == pytest.approx([right, 0.0], abs=1e-6)
