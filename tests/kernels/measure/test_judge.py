"""The judge catches every kind of wrong token, and plain torch satisfies the judge."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flashtune.kernels.backends.torch import decode
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.weights import Weights, problem_of

IDS = [[2, 5, 11], [0, 7, 8], [1, 3, 10], [4, 6, 9]]
LOGITS = [[1, 7, 3], [7, 6, 2], [9, 8, 7], [5, 11, 1]]
STATE = torch.tensor([[4.0, 3.0, 2.0, 1.0]])  # ranks the clusters 0, 1, 2, 3

ByHand = Callable[..., Weights]


@pytest.fixture
def by_hand() -> ByHand:
    """Weights whose logits for STATE are LOGITS."""

    def make(logits: list[list[float]] = LOGITS) -> Weights:
        weight = torch.zeros(12, 4)
        weight[:, 0] = torch.tensor(logits).flatten() / 4
        ids = torch.tensor(IDS, dtype=torch.int32).flatten()
        return Weights(weight=weight, centroids=torch.eye(4), ids=ids)

    return make


def judge_of(weights: Weights, n_probes: int, exact: bool = False) -> Judge:
    problem = problem_of(weights.weight, weights.centroids, n_probes, n_tokens=1)
    return Judge(weights, problem, exact=exact)


def verdict(weights: Weights, token: int, n_probes: int, slack: int = 0) -> str | None:
    judge = judge_of(weights, n_probes, exact=True)
    return judge.why_wrong(torch.tensor([token]), STATE, slack)


@pytest.mark.parametrize(
    ("n_probes", "slack", "right"),
    [
        (1, 0, {5}),
        (2, 0, {0}),  # ties with 5, of the cluster before
        (3, 0, {1}),
        (4, 0, {6}),
        (1, 1, {5, 0}),  # whether cluster 1 is probed is the kernel's choice
        (1, 3, {5, 0, 1, 6}),
        (2, 1, {0, 1}),
        (3, 9, {1, 6}),
    ],
)
def test_just_the_right_tokens_pass(
    n_probes: int, slack: int, right: set[int], by_hand: ByHand
) -> None:
    weights = by_hand()
    passed = {t for t in range(12) if verdict(weights, t, n_probes, slack) is None}
    assert passed == right


@pytest.mark.parametrize(
    ("token", "n_probes", "message"),
    [
        (1, 2, "row 0: token 1 is in the cluster ranked 3, but only 2 are probed"),
        (6, 3, "token 6 is in the cluster ranked 4, but only 3 are probed"),
        (11, 2, "token 11 has logit 3, but the best has 7"),
        (5, 2, "token 5 ties with the smaller id 0"),
        (12, 4, "token 12 is not in the vocabulary"),
        (-7, 4, "token -7 is not in the vocabulary"),
    ],
)
def test_a_verdict_says_why(token: int, n_probes: int, message: str, by_hand: ByHand) -> None:
    assert message in (verdict(by_hand(), token, n_probes) or "")


def test_the_first_wrong_row_is_named(by_hand: ByHand) -> None:
    judge = judge_of(by_hand(), 1, exact=True)
    reason = judge.why_wrong(torch.tensor([5, 2]), STATE.expand(2, -1), 0)
    assert reason is not None
    assert reason.startswith("row 1: token 2 has logit 1")


def test_a_token_for_each_state_is_wanted(by_hand: ByHand) -> None:
    with pytest.raises(ValueError, match="longer"):
        judge_of(by_hand(), 1).why_wrong(torch.tensor([5]), STATE.expand(2, -1), 0)


def test_only_rounding_excuses_a_lower_logit(by_hand: ByHand) -> None:
    nearly = [[1, 7, 7 - 2**-20], *LOGITS[1:]]
    far = [[1, 7, 7 - 2**-10], *LOGITS[1:]]
    lower = torch.tensor([11])
    assert judge_of(by_hand(nearly), 1).why_wrong(lower, STATE, 0) is None
    assert judge_of(by_hand(nearly), 1, exact=True).why_wrong(lower, STATE, 0) is not None
    assert judge_of(by_hand(far), 1).why_wrong(lower, STATE, 0) is not None


def test_clusters_that_tie_at_the_last_probe_may_be_probed_or_not(by_hand: ByHand) -> None:
    weights = by_hand()
    state = torch.tensor([[4.0, 3.0, 3.0, 1.0]])
    judge = judge_of(weights, 2, exact=True)
    passed = {t for t in range(12) if judge.why_wrong(torch.tensor([t]), state, 0) is None}
    assert passed == {0, 1, 5}  # 5: of a cluster before both


@pytest.mark.parametrize("n_probes", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_satisfies_the_judge(n_probes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n_probes)
    weights = Weights(
        weight=torch.randn(96, 33, generator=generator).to(dtype),
        centroids=torch.randn(16, 33, generator=generator).to(dtype),
        ids=torch.randperm(96, generator=generator).view(16, -1).sort(dim=1).values.flatten(),
    )
    hidden = torch.randn(20, 33, generator=generator).to(dtype)
    tokens = decode(weights, hidden, n_probes)
    assert tokens.dtype is torch.int64
    assert judge_of(weights, n_probes).why_wrong(tokens, hidden, 0) is None


def test_plain_torch_gives_the_smallest_of_tied_ids(by_hand: ByHand) -> None:
    assert [decode(by_hand(), STATE, n).item() for n in (1, 2, 3, 4)] == [5, 0, 1, 6]


@pytest.mark.parametrize("n_probes", [1, 2, 4])
def test_a_nan_shows_in_its_row_alone(n_probes: int, by_hand: ByHand) -> None:
    """As in a dense head: every logit of the row is NaN, and the first is the greatest."""
    weights, states = by_hand(), STATE.repeat(3, 1)
    states[1, 2] = torch.nan
    logits = decode(weights, states, n_probes, "logits")
    assert logits[1].isnan().all()
    assert not logits[::2].isnan().any()
    assert torch.equal(logits[0], decode(weights, STATE, n_probes, "logits")[0])
    tokens = decode(weights, states, n_probes)
    assert tokens[1] == 0
    assert tokens[0] == tokens[2] == decode(weights, STATE, n_probes)[0]


def test_an_infinity_gives_a_token_of_the_vocabulary(by_hand: ByHand) -> None:
    """Its products with zeros are NaN, and not a dense head's greatest logit only."""
    states = STATE.repeat(2, 1)
    states[0, 1], states[1, 0] = torch.inf, torch.inf
    dense = states @ by_hand().weight.T
    order = by_hand().ids.long()
    tokens = decode(by_hand(), states, 4)
    assert (
        tokens.tolist() == torch.empty_like(dense).index_copy_(1, order, dense).argmax(1).tolist()
    )


@pytest.mark.parametrize(("centroid_dtype", "allowed"), [("int8", 2.0**-15), ("int4", 0.0)])
def test_states_may_be_whole_multiples_where_int8_is_read(
    centroid_dtype: str, allowed: float
) -> None:
    """A number that is tiny beside the largest may be taken as none at all; not so elsewhere."""
    weights = Weights(
        weight=torch.eye(4), centroids=torch.eye(4), ids=torch.arange(4, dtype=torch.int32)
    )
    judge = judge_of(weights, n_probes=1)
    multiples = centroid_dtype == "int8"
    state = torch.tensor([[1.0, 2.0**-30, 0.0, 0.0]]).double()
    _, bounds = judge.products(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), state, multiples=multiples)
    rounding = (4 / 32 + 16) * 2.0**-24 * 2.0**-30
    assert float(bounds) == pytest.approx(rounding + allowed, rel=1e-12)


def on_tensor_cores(
    rows: torch.Tensor, state: torch.Tensor, *, at_once: int, bits: int
) -> torch.Tensor:
    """`rows @ state` as tensor cores add it up: so many products to a sum at a time, all cut.

    An A100 takes 8 and cuts after 24 bits behind the largest's first, an H100 16 and 25 (Khattak
    and Mikaitis, Accurate Models of NVIDIA Tensor Cores, 2025).
    """

    def cut(numbers: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        return (numbers / unit).trunc() * unit

    def unit_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.exp2(torch.frexp(numbers.abs()).exponent.double() - 1 - bits)

    sums = torch.zeros(len(rows), 1, dtype=torch.float64)
    for products in (rows.double() * state.double()).split(at_once, dim=1):
        terms = torch.cat([sums, products], dim=1)
        whole = cut(terms, unit_of(terms.abs().amax(dim=1, keepdim=True), bits)).sum(1, True)
        sums = cut(whole, unit_of(whole, 23))
    return sums[:, 0]


@pytest.mark.parametrize(
    ("width", "at_once", "bits", "least", "most"),
    [
        (2048, 8, 24, 0.0058, 0.0082),
        (2048, 16, 25, 0.0028, 0.0038),
        (4096, 8, 24, 0.0231, 0.0278),
        (4096, 16, 25, 0.0108, 0.0130),
    ],
    ids=["Ampere", "Hopper", "Ampere, wide", "Hopper, wide"],
)
def test_what_tensor_cores_cut_off_is_no_error(
    width: int, at_once: int, bits: int, least: float, most: float
) -> None:
    """It is more than rounding would be: sums of products of one sign lose the most.

    least, most: of what is lost of these, as docs/notebook.md has it.
    """
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(64, width, generator=generator).bfloat16()
    rows = (states * (12 / states.float().norm(dim=1, keepdim=True))).bfloat16()
    ids = torch.arange(64, dtype=torch.int32)
    weights = Weights(weight=rows, centroids=rows, ids=ids)
    rounding = judge_of(weights, n_probes=1)
    judge = replace(rounding, tensor_cores=True)
    lost, beyond = [], 0
    for row, state in zip(rows, states, strict=True):
        exact, bound = judge.products(row[None], state[None].double())
        _, small = rounding.products(row[None], state[None].double())
        lost.append(
            float(exact[0] - on_tensor_cores(row[None], state, at_once=at_once, bits=bits))
        )
        assert 0 <= lost[-1] <= float(bound)
        beyond += lost[-1] > float(small)
    assert beyond == len(rows)  # or rounding's bound would do
    assert (round(min(lost), 4), round(max(lost), 4)) == (least, most)


@pytest.mark.parametrize("width", [640, 1152, 2048])
def test_a_product_that_tensor_cores_leave_out_is_an_error(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    state = torch.randn(1, width, generator=generator).bfloat16()
    weights = Weights(weight=state, centroids=state, ids=torch.zeros(1, dtype=torch.int32))
    judge = replace(judge_of(weights, n_probes=1), tensor_cores=True)
    exact, bound = judge.products(state, state.double())
    without = exact[0, 0] - state.double().square()[0, state.abs().argmax()]
    assert float(exact - without) > float(bound)
