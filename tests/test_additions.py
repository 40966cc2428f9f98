"""A format, an epilogue, a plan and a target are each one file: toys of each, and what they reach.

Also that the how-to pages name the files that an addition really touches.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys.epilogue import BEST_LOGIT
from toys.format import TERNARY
from toys.plan import EVERYTHING, EverythingConfig
from toys.target import ABACUS, DEVICE

from flashtune.kernels.backends.target import backend_of, default_config, known_good, target_of
from flashtune.kernels.epilogues.epilogue import epilogue_of
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans.candidate import PLANS, TARGETS, Candidate
from flashtune.kernels.plans.config import config_data, parse_config
from flashtune.kernels.weights import Weights
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import EPILOGUES, FORMATS, Problem, parse_shape

ROOT = Path(__file__).parent.parent
PROBLEM = Problem(
    vocab_size=60, hidden_size=33, n_clusters=5, n_probes=2, n_tokens=3, weight_dtype="fp32",
    centroid_dtype="fp32",
)  # fmt: skip


def why_wrong(problem: Problem, candidate: Candidate) -> str | None:
    """What the judge has against a candidate, on fresh inputs."""
    where = torch.device("cpu")
    workload = Workload.create(problem, where, cold_bytes=0, seed=1)
    step = backend_of(candidate).loader(candidate, where)()
    return workload.why_wrong(step, **candidate.leeway)


def plain(problem: Problem) -> Candidate:
    """Plain torch as a candidate."""
    device = TARGETS["torch"].describe(torch.device("cpu"))  # type: ignore[attr-defined]
    return Candidate(problem, default_config(problem, device), device)


class TestFormat:
    def test_a_problem_may_have_it(self) -> None:
        with pytest.raises(FlashtuneError, match="must be one of bf16"):
            parse_shape("vocab=60,hidden=33,clusters=5,probes=2,weight=ternary")
        with FORMATS.added(TERNARY):
            problem = parse_shape("vocab=60,hidden=33,clusters=5,probes=2,weight=ternary")
            assert problem.cluster_bytes == 12 * (33 + 4)
            assert Problem.from_json(problem.data()) == problem
            assert "ternary" in problem.describe()

    @pytest.mark.parametrize("n_rescored", [0, 8])
    @pytest.mark.parametrize("epilogue", ["argmax", "logits"])
    def test_plain_torch_decodes_it(self, n_rescored: int, epilogue: str) -> None:
        with FORMATS.added(TERNARY):
            problem = replace(
                PROBLEM, weight_dtype="ternary", centroid_dtype="ternary", model_dtype="fp16",
                n_rescored=n_rescored, epilogue=epilogue,
            )  # fmt: skip
            assert why_wrong(problem, plain(problem)) is None

    def test_the_judge_reads_it(self) -> None:
        """What is stored is the truth: the numbers before they were packed are not."""
        with FORMATS.added(TERNARY):
            problem = replace(PROBLEM, weight_dtype="ternary", model_dtype="fp32")
            workload = Workload.create(problem, torch.device("cpu"), cold_bytes=0, seed=1)

            def unpacked(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
                rows = torch.randn(60, 33, generator=torch.Generator().manual_seed(1))
                out.copy_(weights.ids[(hidden @ rows.T).argmax(dim=1)])

            assert workload.why_wrong(unpacked, slack=5) is not None

    def test_kernels_without_it_say_so(self) -> None:
        from flashtune.kernels.plans.staged import StagedConfig
        from flashtune.tuning_db.device import find_device

        with FORMATS.added(TERNARY):
            problem = replace(
                PROBLEM, hidden_size=1024, weight_dtype="ternary", model_dtype="bf16"
            )
            reason = Candidate(problem, StagedConfig(), find_device("orin")).why_invalid()
            assert reason and "ternary" in reason
        assert format_of("int8").quantised


class TestEpilogue:
    @pytest.mark.parametrize("weight", ["fp32", "int8"])
    def test_plain_torch_writes_it(self, weight: str) -> None:
        with EPILOGUES.added(BEST_LOGIT):
            model = "fp16" if weight == "int8" else ""
            problem = replace(
                PROBLEM, weight_dtype=weight, model_dtype=model, epilogue="best_logit"
            )
            assert problem.written_bytes == 12
            assert why_wrong(problem, plain(problem)) is None

    def test_the_judge_asks_it(self) -> None:
        with EPILOGUES.added(BEST_LOGIT):
            problem = replace(PROBLEM, epilogue="best_logit")
            workload = Workload.create(problem, torch.device("cpu"), cold_bytes=0, seed=1)

            def zeros(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
                out.zero_()

            reason = workload.why_wrong(zeros, slack=5)
            assert reason and "is not the best logit" in reason
            assert epilogue_of("best_logit") is BEST_LOGIT
        assert "best_logit" not in EPILOGUES


class TestPlan:
    def test_tables_and_searches_know_it(self, abacus: None) -> None:
        config = EverythingConfig(rows=256)
        assert parse_config(config_data(config)) == config
        with pytest.raises(FlashtuneError, match="knob rows must be one of"):
            parse_config({"plan": "everything", "rows": 3})
        space = Space(PROBLEM, DEVICE)
        assert space.plans == ["everything", "torch"]
        assert known_good(PROBLEM, DEVICE) == [EverythingConfig(rows=16)]

    def test_its_rules_are_heard(self, abacus: None) -> None:
        many = replace(PROBLEM, n_tokens=17)
        assert Candidate(PROBLEM, EverythingConfig(), DEVICE).why_invalid() is None
        reason = Candidate(many, EverythingConfig(), DEVICE).why_invalid()
        assert reason == "everything is for 16 tokens at most, not 17"

    def test_it_is_unknown_elsewhere(self) -> None:
        with pytest.raises(FlashtuneError, match="plan must be one of staged"):
            parse_config({"plan": "everything", "rows": 16})
        with PLANS.added(EVERYTHING):
            from flashtune.tuning_db.device import find_device

            reason = Candidate(PROBLEM, EverythingConfig(), find_device("orin")).why_invalid()
            assert reason and "not a plan for" in reason


class TestTarget:
    @pytest.mark.parametrize("rows", [16, 64, 256])
    @pytest.mark.parametrize("epilogue", ["argmax", "logits"])
    def test_its_steps_are_judged_as_all_are(self, abacus: None, rows: int, epilogue: str) -> None:
        problem = replace(PROBLEM, epilogue=epilogue)
        candidate = Candidate(problem, EverythingConfig(rows=rows), DEVICE)
        assert why_wrong(problem, candidate) is None

    def test_heads_run_on_it(self, abacus: None) -> None:
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(60, 33, generator=generator)
        head = FlashHead(weight, weight[::12].clone(), torch.arange(60) // 12, n_probes=2)
        hidden = torch.randn(4, 33, generator=generator)
        assert torch.equal(head(hidden), (hidden @ weight.T).argmax(dim=1))
        told = head.explain(4)
        assert told["device"] == "abacus-10"
        assert told["config"] == {"plan": "everything", "rows": 64}
        assert target_of(DEVICE) is ABACUS


PAGES = ("add-a-plan", "add-a-format", "add-an-epilogue", "add-a-backend")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_names_files_that_are_there(page: str) -> None:
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text("utf-8")
    names = re.findall(r"`([\w./]+/[\w./]*)`", text)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("page", "registry", "toy"),
    [
        ("add-a-plan", PLANS, "plan"),
        ("add-a-format", FORMATS, "format"),
        ("add-an-epilogue", EPILOGUES, "epilogue"),
        ("add-a-backend", TARGETS, "target"),
    ],
)
def test_the_page_names_the_room_and_the_toy(page: str, registry: object, toy: str) -> None:
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text("utf-8")
    room = registry._room.removeprefix("flashtune.").replace(".", "/")  # type: ignore[attr-defined]
    assert f"`{room}/__init__.py`" in text
    assert f"`tests/toys/{toy}.py`" in text
