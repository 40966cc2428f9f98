"""From config to source: what is valid renders, and its numbers fit together."""

import ast
import random
from collections.abc import Callable

import pytest

from flashtune.kernels.backends.triton.backend import load_source
from flashtune.kernels.plans.batched import BatchedConfig
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.plans.dense import DenseConfig
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.tuning_db.device import find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem, parse_shape

QWEN = parse_shape("qwen3-vl-2b")
ORIN, H200 = find_device("orin"), find_device("h200")
DEVICES = [find_device(name) for name in ("orin", "l4", "h200", "rtx-5090")]


def test_an_invalid_config_is_not_rendered() -> None:
    with pytest.raises(FlashtuneError, match=r"staged config not valid for .*: programmatic"):
        _ = Candidate(QWEN, StagedConfig(pdl=True), ORIN).source


def test_rendering_is_a_function_of_its_arguments() -> None:
    sources = [Candidate(QWEN, StagedConfig(), H200).source for _ in range(2)]
    assert sources[0] == sources[1]


def test_any_valid_config_renders_source_whose_numbers_fit_together(
    random_config: Callable[[random.Random], Config],
    random_problem: Callable[[random.Random], Problem],
) -> None:
    rng = random.Random(0)
    rendered: list[Config] = []
    while len(rendered) < 150:
        problem, config, device = random_problem(rng), random_config(rng), rng.choice(DEVICES)
        if (
            PLANS[config.plan].builder != "triton"
            or Candidate(problem, config, device).why_invalid()
        ):
            continue
        rendered.append(config)
        source = Candidate(problem, config, device).source
        ast.parse(source)
        _check_numbers(source, problem, config)
    kinds = {getattr(config, "selection", config.plan) for config in rendered}
    assert kinds == {"torch_topk", "threshold", "in_gather", "persistent", "batched", "dense"}
    assert any(config.pdl for config in rendered)
    assert any(getattr(config, "visit", "all") == "listed" for config in rendered)
    assert any(getattr(config, "prefetch_margin", -1) >= 0 for config in rendered)


def _check_numbers(source: str, problem: Problem, config: Config) -> None:
    module = load_source(source)
    numbers = {name: getattr(value, "value", value) for name, value in vars(module).items()}
    programs = {launch["kernel"]: launch.get("programs") for launch in module.LAUNCHES}
    assert numbers["CLUSTERS"] * numbers["CLUSTER_SIZE"] == problem.vocab_size
    if isinstance(config, PersistentConfig):
        assert programs["decode"] == numbers["PROGRAMS"]
        assert numbers["SLAB"] * numbers["PROGRAMS"] >= problem.n_clusters
        assert 1 <= numbers["PARTS"] * problem.n_tokens <= numbers["PROGRAMS"]
    elif isinstance(config, BatchedConfig | DenseConfig):
        assert programs["gather"] == numbers["PROGRAMS"]
        assert numbers["TOKENS_PADDED"] >= max(16, problem.n_tokens)
        share = numbers.get("SHARE", numbers["GATHER_ROWS"])
        if getattr(config, "visit", "all") == "listed":
            probed = problem.n_probes + config.slack + problem.n_pinned
            assert numbers["LISTED_AT_ONCE"] >= probed
            listed = min(problem.n_clusters, problem.n_tokens * probed) * problem.cluster_size
            assert numbers["PROGRAMS"] * share >= min(problem.vocab_size, listed)
        else:
            assert numbers["PROGRAMS"] * share >= problem.vocab_size
            assert isinstance(config, DenseConfig) or share % problem.cluster_size == 0
        if isinstance(config, BatchedConfig):
            assert programs["score"] * numbers["SCORE_ROWS"] >= problem.n_clusters
            assert programs["select"] == problem.n_tokens
    else:
        assert programs["score"] <= numbers["SCORE_TILES"]
        assert numbers["SCORE_TILES"] * numbers["SCORE_ROWS"] >= problem.n_clusters
        assert programs["gather"] == numbers["PARTS"] * problem.n_tokens
    if "LANES" in numbers:
        assert numbers["LANES"] * numbers["MEMBERS"] >= problem.n_clusters
        assert numbers["MOST"] == problem.n_probes + config.slack
        assert numbers["HAZARD"] > 0
    if getattr(config, "prefetch_margin", -1) >= 0:
        groups = numbers["PARTS"] // numbers["SPREAD"]
        assert numbers["STRIPE"] * groups >= problem.n_clusters
        pieces = numbers["PIECES"] * numbers["SPREAD"]
        assert pieces * numbers["PIECE"] == problem.cluster_bytes
        assert numbers["PIECE"] % 16 == 0


@pytest.mark.parametrize("name", ["staged", "persistent"])
def test_offsets_are_64_bits_wide_just_where_they_must_be(name: str) -> None:
    config = {"staged": StagedConfig(), "persistent": PersistentConfig()}[name]
    below = Problem(vocab_size=262128, hidden_size=8192, n_clusters=16383, n_probes=8)
    above = Problem(vocab_size=262144, hidden_size=8192, n_clusters=16384, n_probes=8)
    assert "rows.to(tl.int64)" not in Candidate(below, config, H200).source
    source = Candidate(above, config, H200).source
    assert source.count("rows.to(tl.int64)") == 1  # not of centroids
