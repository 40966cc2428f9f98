"""Selection by threshold, on scores of every shape, and the order of keys that it rests on."""

import math
from collections.abc import Callable

import pytest
import torch

from flashtune.kernels.backends.triton.backend import Scratch, load_source
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.problem import Problem

H200 = find_device("h200")
Draw = Callable[[int, torch.Generator], torch.Tensor]


def _normal(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(number, generator=generator)


def _heavy(number: int, generator: torch.Generator) -> torch.Tensor:
    return _normal(number, generator) / _normal(number, generator)


def _bimodal(number: int, generator: torch.Generator) -> torch.Tensor:
    far = torch.rand(number, generator=generator) < 0.02
    return 0.01 * _normal(number, generator) + 50.0 * far


def _few(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-1, 3, (number,), generator=generator).float()


def _one_outlier(number: int, generator: torch.Generator) -> torch.Tensor:
    scores = 1e-3 * _normal(number, generator)
    scores[number // 2] = 1e30
    return scores


DRAWS: dict[str, Draw] = {
    "normal": _normal,
    "shifted": lambda n, g: 1000.0 + 0.01 * _normal(n, g),
    "negative": lambda n, g: -5.0 - _normal(n, g).abs(),
    "heavy_tailed": _heavy,
    "skewed": lambda n, g: _normal(n, g).mul(3).exp(),
    "bimodal": _bimodal,
    "one_outlier": _one_outlier,
    "few_distinct": _few,
    "constant": lambda n, g: torch.full((n,), 0.3),
    "signed_zeros": lambda n, g: torch.where(_normal(n, g) > 0, 0.0, -0.0),
    "sorted": lambda n, g: torch.linspace(-1, 1, n),
    "huge": lambda n, g: 1e38 * _normal(n, g).clamp(-3, 3),
    "denormal": lambda n, g: 1e-42 * _normal(n, g),
    "some_infinite": lambda n, g: torch.where(_normal(n, g) > 2, math.inf, _normal(n, g)),
}


def select(problem: Problem, slack: int, scores: torch.Tensor) -> list[int]:
    """The clusters that the select kernel lists."""
    config = StagedConfig(slack=slack, select_warps=4, score_block=64, gather_block=64)
    module = load_source(Candidate(problem, config, H200).source)
    scratch = Scratch.create(problem, library_topk=False, device=torch.device("cpu"))
    scratch.scores[0] = scores
    scratch.selected.fill_(2**30)
    unused = scratch.state
    module.select[(1,)](*[unused] * 5, scratch.scores, scratch.selected, scratch.state)
    number = int(scratch.state[module.COUNT.value])
    assert bool((scratch.selected[0, number:] == 2**30).all())
    return scratch.selected[0, :number].tolist()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("n_clusters", "n_probes", "slack"),
    [(97, 8, 8), (97, 1, 0), (97, 97, 16), (700, 32, 16), (700, 699, 0), (1, 1, 0)],
)
def test_the_best_clusters_are_selected_and_few_more(
    draw: str, n_clusters: int, n_probes: int, slack: int
) -> None:
    problem = Problem(
        vocab_size=n_clusters, hidden_size=64, n_clusters=n_clusters, n_probes=n_probes
    )
    for seed in range(2):
        scores = DRAWS[draw](n_clusters, torch.Generator().manual_seed(seed))
        selected = select(problem, slack, scores)
        assert len(selected) >= n_probes
        assert len(set(selected)) == len(selected)
        threshold = scores[selected].min()
        assert set(selected) == set((scores >= threshold).nonzero().flatten().tolist())
        if len(selected) > n_probes + slack:  # only for ties at the threshold
            assert int((scores > threshold).sum()) < n_probes


ORDER_KERNEL = """

@triton.jit
def order(values_ptr, keys_ptr, back_ptr, NUMBER: tl.constexpr):
    index = tl.arange(0, NUMBER)
    keys = ordered(tl.load(values_ptr + index))
    tl.store(keys_ptr + index, keys)
    tl.store(back_ptr + index, unordered(keys))
"""


@pytest.mark.usefixtures("interpreted")
def test_keys_are_ordered_as_floats_are() -> None:
    tiny, most = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    special = [0.0, 2.0**-149, tiny, 1.0, 1.0 + 2.0**-23, 3.5, most, math.inf]
    values = torch.tensor([-value for value in reversed(special)] + special)
    problem = Problem(vocab_size=64, hidden_size=64, n_clusters=64, n_probes=4)
    config = StagedConfig(score_block=64, gather_block=64)
    module = load_source(Candidate(problem, config, H200).source + ORDER_KERNEL)
    keys, back = torch.empty(16, dtype=torch.int32), torch.empty(16)
    module.order[(1,)](values, keys, back, 16)
    assert keys.tolist() == sorted(keys.tolist())
    assert torch.equal(back, values)
    assert keys[7] == keys[8]  # -0.0 and 0.0
    assert len(set(keys.tolist())) == 15
