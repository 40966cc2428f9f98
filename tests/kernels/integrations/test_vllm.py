"""The vLLM plugin against as much of vLLM as it touches: which head answers, and what is said."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.kernels.integrations import vllm as plugin
from flashtune.kernels.integrations import vllm_head
from flashtune.kernels.integrations.vllm_gate import RequestGate
from flashtune.kernels.integrations.vllm_head import SIZES
from flashtune.kernels.measure.contest import Verdict
from flashtune.kernels.runtime.decoder import Decoder

VOCAB, WIDTH, CLUSTERS = 96, 16, 12
Folder = Callable[..., str]


@dataclass
class Config:
    """The parts of a VllmConfig that matter."""

    model: str
    compilation_config: Any = field(default_factory=SimpleNamespace)
    parallel_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            tensor_parallel_size=1, distributed_executor_backend="uni"
        )
    )
    scheduler_config: Any = field(default_factory=lambda: SimpleNamespace(max_num_seqs=4))
    lora_config: Any = None
    speculative_config: Any = None
    use_v2_model_runner: bool = True

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(model=self.model)


class StubVllm:
    """The modules, and what an engine would do with them."""

    def __init__(self) -> None:
        self.current: Config | None = None
        self.replaced: dict[str, type] = {}
        self.modules: dict[str, ModuleType] = {}
        self._layers()
        self._registry()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def add(self, name: str, **contents: Any) -> None:
        module = self.modules.setdefault(name, ModuleType(name))
        for key, value in contents.items():
            setattr(module, key, value)
        parent = name.rpartition(".")[0]
        if parent:
            self.add(parent)

    def engine(self, config: Config, weight: torch.Tensor, **layer: Any) -> "Engine":
        self.current = config
        return Engine(self, config, weight, **layer)

    def _layers(self) -> None:
        stub = self

        class PluggableLayer(nn.Module):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return super().__new__(stub.replaced.get(cls.__name__, cls))

            @classmethod
            def register_oot(cls, layer: type) -> type:
                assert cls.__name__ not in stub.replaced, f"Duplicate layer name: {cls.__name__}"
                stub.replaced[cls.__name__] = layer
                return layer

        class UnquantizedEmbeddingMethod:
            def process_weights_after_loading(self, layer: Any) -> None:
                pass

            def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
                return nn.functional.linear(x, layer.weight, bias)

        class ParallelLMHead(PluggableLayer):
            def __init__(self, weight: torch.Tensor, vocab: int) -> None:
                super().__init__()
                self.weight = nn.Parameter(weight, requires_grad=False)
                self.org_vocab_size = vocab
                self.quant_method = UnquantizedEmbeddingMethod()
                self.register_parameter("bias", None)

        class LogitsProcessor(PluggableLayer):
            def __init__(self, vocab: int, soft_cap: Any = None, scale: float = 1.0) -> None:
                super().__init__()
                self.vocab, self.soft_cap, self.scale = vocab, soft_cap, scale
                self.head_dtype = None

            def forward(self, lm_head: Any, hidden: Any, bias: Any = None) -> Any:
                return self.finished(self._apply_head(lm_head, hidden, bias)[..., : self.vocab])

            def finished(self, logits: Any) -> Any:
                if self.soft_cap is not None:
                    logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
                return logits if self.scale == 1.0 else logits * self.scale

            def _apply_head(self, lm_head: Any, hidden: Any, bias: Any) -> Any:
                return lm_head.quant_method.apply(lm_head, hidden, bias=bias)

        layers = "vllm.model_executor.layers"
        self.LogitsProcessor, self.ParallelLMHead = LogitsProcessor, ParallelLMHead
        self.add(f"{layers}.logits_processor", LogitsProcessor=LogitsProcessor)
        self.add(
            f"{layers}.linear", UnquantizedLinearMethod=type("UnquantizedLinearMethod", (), {})
        )
        self.add(
            f"{layers}.vocab_parallel_embedding",
            ParallelLMHead=ParallelLMHead,
            UnquantizedEmbeddingMethod=UnquantizedEmbeddingMethod,
        )
        self.add("vllm.config", get_current_vllm_config=lambda: self.current)
        self.add("vllm.compilation.backends", model_tag="backbone")

    def _registry(self) -> None:
        class Registry:
            def __init__(self) -> None:
                self.models: dict[str, Any] = {}

            def register_model(self, name: str, where: str) -> None:
                module, _, class_name = where.partition(":")
                self.models[name] = SimpleNamespace(module_name=module, class_name=class_name)

        registry = Registry()
        registry.register_model("LlamaForCausalLM", "models.llama:LlamaForCausalLM")
        registry.register_model("Gemma3ForConditionalGeneration", "models.gemma3:Gemma3")
        registry.register_model("BertModel", "models.bert:BertModel")
        self.registry = registry
        self.config_checks = {"LlamaForCausalLM": object(), "BertModel": object()}
        self.add("vllm", ModelRegistry=registry)
        self.add("vllm.model_executor.models.config", MODELS_CONFIG_MAP=self.config_checks)


class Engine:
    """One model's head, as an engine makes, loads and calls it."""

    def __init__(
        self,
        stub: StubVllm,
        config: Config,
        weight: torch.Tensor,
        *,
        padding: int = 0,
        **layer: Any,
    ) -> None:
        vocab = weight.shape[0]
        padded = nn.functional.pad(weight, (0, 0, 0, padding))
        self.lm_head = stub.ParallelLMHead(padded, vocab)
        self.processor = stub.LogitsProcessor(vocab, **layer)
        self.config = config

    def load(self) -> None:
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def __call__(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.processor(self.lm_head, hidden, bias)
        return logits

    def dense(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ self.lm_head.weight[: self.processor.vocab].T
        finished: torch.Tensor = self.processor.finished(logits)
        return finished


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


@pytest.fixture(autouse=True)
def unscreened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests asks for."""
    for name in ("SCREEN", "PROBES", "TUNE", "VERIFY"):
        monkeypatch.delenv(f"FLASHTUNE_{name}", raising=False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StubVllm:
    """A vLLM that has loaded the plugin."""
    stub = StubVllm()
    stub.install(monkeypatch)
    monkeypatch.setattr(plugin, "_done", set())
    plugin.register()
    return stub


def weight() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def states(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A FlashHead model folder: `folder(n_probes)`, with assets for a vocabulary."""

    def write(n_probes: int = CLUSTERS, vocab: int = VOCAB) -> str:
        (tmp_path / "flash_head_assets").mkdir(exist_ok=True)
        config = {
            "architectures": ["FlashHeadLlamaForCausalLM"],
            "flash_head_cache_dir": "flash_head_assets",
            "n_probes": n_probes,
            "hidden_size": WIDTH,
            "vocab_size": vocab,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        centroids = nn.functional.normalize(torch.randn(CLUSTERS, WIDTH))
        save_file(
            {
                "centroids": centroids.T[None, None].contiguous(),
                "cluster_assignments": torch.randperm(vocab) % CLUSTERS,
            },
            tmp_path / "flash_head_assets" / "clustering_cache.safetensors",
        )
        return str(tmp_path)

    return write


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def probed(logits: torch.Tensor) -> list[int]:
    """How many candidates each row has."""
    return (logits != FILL).sum(dim=1).tolist()


def test_with_all_clusters_probed_logits_are_the_dense_ones(
    vllm: StubVllm, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(folder())
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    for rows in range(1, SIZES[-1] + 1):
        torch.testing.assert_close(engine(states(rows)), engine.dense(states(rows)))
    assert not gate.dense
    assert warnings(caplog) == []


def test_few_rows_are_answered_by_flash_head_and_many_by_the_dense_head(
    vllm: StubVllm, folder: Folder
) -> None:
    config = Config(folder(n_probes=3), scheduler_config=SimpleNamespace(max_num_seqs=SIZES[-1]))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight(), padding=32)
    engine.load()
    for rows in (1, 3, SIZES[-1]):
        logits = engine(states(rows))
        assert logits.shape == (rows, VOCAB)
        assert probed(logits) == [3 * VOCAB // CLUSTERS] * rows
        chosen = logits != FILL
        torch.testing.assert_close(logits[chosen], engine.dense(states(rows))[chosen])
    for rows in (0, SIZES[-1] + 1):
        assert torch.equal(engine(states(rows)), engine.dense(states(rows)))
    del gate


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """FlashHead's times by rows, 1 us where nothing is said, against 10 of the dense head."""
    times: dict[int, float] = {}

    def contest(head: Any, dense: Any, hidden: torch.Tensor) -> Verdict:
        assert head(hidden).shape == (len(hidden), VOCAB)
        assert dense(hidden).shape[0] == len(hidden)
        return Verdict(times.get(len(hidden), 1.0), 10.0, head_host_us=3.0, dense_host_us=2.0)

    monkeypatch.setattr(vllm_head, "contest", contest)
    monkeypatch.delenv("FLASHHEAD_ENABLED")
    return times


def test_the_dense_head_answers_where_it_is_faster(
    vllm: StubVllm, folder: Folder, faster: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    """At 2 rows by time alone, at 4 by what the host would have to do more."""
    faster.update({2: 11.0, 4: 9.0})
    caplog.set_level(logging.INFO)
    config = Config(folder(n_probes=1), scheduler_config=SimpleNamespace(max_num_seqs=8))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    for rows in (1, 5, 8):
        assert probed(engine(states(rows))) == [VOCAB // CLUSTERS] * rows
    for rows in (2, 3, 4, 9):
        assert torch.equal(engine(states(rows)), engine.dense(states(rows)))
    assert warnings(caplog) == []
    assert "11.0 us against 10.0 us (host: 3.0 us against 2.0 us)" in caplog.text
    assert "up to 8 rows (1, 8 as batches grow)" in caplog.text
    del gate


def test_a_head_that_is_nowhere_faster_is_not_kept(
    vllm: StubVllm, folder: Folder, faster: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    faster.update(dict.fromkeys((1, 2, 4), 9.9))
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    assert engine.processor._served._head is None
    (warning,) = warnings(caplog)
    assert "the dense head is faster here, at any number of rows" in warning
    del gate


def test_the_settings_of_the_environment_reach_the_head(
    vllm: StubVllm, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_PROBES", "3")
    monkeypatch.setenv("FLASHTUNE_TUNE", "never")
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    assert probed(engine(states(1))) == [3 * VOCAB // CLUSTERS]
    assert engine.processor._served._head.tune == "never"
    del gate


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("PROBES", "many", "FLASHTUNE_PROBES must be a number of clusters, not 'many'"),
        ("PROBES", "0", "FLASHTUNE_PROBES must be a number of clusters, not '0'"),
        ("PROBES", "9" * 5000, "FLASHTUNE_PROBES must be a number of clusters"),
        ("TUNE", "slowly", "FLASHTUNE_TUNE must be one of race, never, require, not 'slowly'"),
        ("TUNE", "require", "no record was measured here, at any number of rows"),
    ],
)
def test_a_setting_that_cannot_be_met_is_one_warning_and_the_dense_head(
    vllm: StubVllm,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: str,
    why: str,
) -> None:
    monkeypatch.setenv(f"FLASHTUNE_{name}", value)
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert why in warning
    del gate


def test_padding_of_the_vocabulary_is_no_candidate(vllm: StubVllm, folder: Folder) -> None:
    config = Config(folder())
    gate = RequestGate(config)
    engine = vllm.engine(config, weight(), padding=32)
    engine.load()
    logits = engine.processor._apply_head(engine.lm_head, states(2), None)
    assert logits.shape == (2, VOCAB + 32)  # as of the dense head: who cuts it off cuts that
    assert (logits[:, VOCAB:] == FILL).all()
    del gate


def test_a_request_that_needs_it_takes_the_batch_to_the_dense_head_and_back(
    vllm: StubVllm, folder: Folder
) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    assert probed(engine(states(2))) == [VOCAB // CLUSTERS] * 2
    scored = SimpleNamespace(logprobs=3)
    gate.add_request(0, scored)
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    gate.add_request(0, SimpleNamespace())
    assert probed(engine(states(2))) == [VOCAB // CLUSTERS] * 2


def test_two_engines_have_a_gate_and_a_head_each(vllm: StubVllm, folder: Folder) -> None:
    model = folder(n_probes=1)
    configs = [Config(model), Config(model)]
    gates = [RequestGate(config) for config in configs]
    one, other = (vllm.engine(config, sign * weight()) for config, sign in
                  zip(configs, (1, -1), strict=True))  # fmt: skip
    one.load()
    other.load()
    scored = SimpleNamespace(logprobs=1)
    gates[0].add_request(0, scored)
    assert torch.equal(one(states(2)), one.dense(states(2)))
    assert probed(other(states(2))) == [VOCAB // CLUSTERS] * 2
    chosen = other(states(2)) != FILL
    torch.testing.assert_close(other(states(2))[chosen], other.dense(states(2))[chosen])


def test_a_head_that_nobody_built_is_built_on_the_first_call(
    vllm: StubVllm, folder: Folder
) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    assert probed(engine(states(1))) == [VOCAB // CLUSTERS]
    del gate


def test_weights_that_are_loaded_again_are_used(vllm: StubVllm, folder: Folder) -> None:
    config = Config(folder())
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    before = engine(states(2))
    engine.lm_head.weight.data.mul_(-2)
    engine.load()
    torch.testing.assert_close(engine(states(2)), -2 * before)
    del gate


def test_the_head_is_built_alike_under_the_defaults_of_vllms_loader(
    vllm: StubVllm, folder: Folder
) -> None:
    config = Config(folder())
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            engine.load()
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(engine(states(3)), engine.dense(states(3)))
    del gate


UNSUPPORTED = {
    "tensor parallelism": {"parallel_config": SimpleNamespace(tensor_parallel_size=2)},
    "LoRA is enabled": {"lora_config": object()},
    "speculative decoding": {"speculative_config": object()},
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_an_engine_may_not_have_goes_dense_with_one_warning(
    vllm: StubVllm, folder: Folder, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    config = Config(folder(n_probes=1), **UNSUPPORTED[why])
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    for _ in range(2):
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert why in warning
    del gate


def _speculating(target: str, draft: str) -> SimpleNamespace:
    return SimpleNamespace(
        draft_model_config=SimpleNamespace(model=draft),
        target_model_config=SimpleNamespace(model=target),
        num_speculative_tokens=3,
    )


def test_a_draft_is_answered_for_without_a_gate(
    vllm: StubVllm, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Its target, which shares the compilation config, verifies with its dense head."""
    draft = folder(n_probes=1)
    speculating = _speculating("a/target", draft)
    target = Config("a/target", speculative_config=speculating)
    drafting = replace(target, model=draft)
    engine, other = vllm.engine(target, -weight()), vllm.engine(drafting, weight())
    engine.load()
    other.load()
    assert probed(other(states(3))) == [VOCAB // CLUSTERS] * 3
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    assert warnings(caplog) == []


def _eagle(
    vllm: StubVllm, model: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Config, Engine, Engine]:
    """A target and its draft, which are built one after the other, with the same config."""
    speculating = SimpleNamespace(**vars(_speculating(model, "an/eagle")), method="eagle")
    config = Config(model, speculative_config=speculating)
    target = vllm.engine(config, weight())
    with monkeypatch.context() as patch:
        backends = vllm.modules["vllm.compilation.backends"]
        patch.setattr(backends, "model_tag", "eagle_head")
        return config, target, vllm.engine(config, -weight())


@pytest.mark.parametrize("tied", [False, True])
def test_eagle_drafts_with_its_targets_head(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    """It is built with the target's, or at the first token if the embedding is the head."""
    config, target, draft = _eagle(vllm, folder(n_probes=1), monkeypatch)
    gate = RequestGate(config)
    gate.add_request(0, scored := SimpleNamespace(logprobs=1))  # no matter for what drafts
    if not tied:
        target.load()
    draft.load()  # a layer of its own, which the engine drops
    assert (draft.processor._served._head is None) == tied
    draft.lm_head = target.lm_head
    assert probed(draft(states(3))) == [VOCAB // CLUSTERS] * 3
    assert torch.equal(target(states(2)), target.dense(states(2)))
    assert all("FLASHTUNE_VERIFY=1" in each for each in warnings(caplog))
    del gate, scored


def test_a_target_does_not_verify_where_its_gate_is_not_loaded(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASHTUNE_VERIFY", "1")
    model = folder(n_probes=1)
    speculating = _speculating(model, "a/draft")
    engine = vllm.engine(
        Config(model, speculative_config=speculating, use_v2_model_runner=False), weight()
    )
    engine.load()
    assert engine.processor._served._head is None  # and takes no memory
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert "V1 model runner loads no logits processors" in warning


def test_target_and_draft_share_one_flash_head(
    vllm: StubVllm, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHTUNE_VERIFY", "1")
    config, target, draft = _eagle(vllm, folder(n_probes=1), monkeypatch)
    gate = RequestGate(config)
    target.load()
    assert draft.processor._served is not target.processor._served
    assert draft.processor._served._head is target.processor._served._head is not None
    draft.lm_head = target.lm_head
    for engine in (draft, target):
        assert probed(engine(states(3))) == [VOCAB // CLUSTERS] * 3
    before = target.processor._served._head
    with torch.no_grad():
        target.lm_head.weight.mul_(2.0)
    target.load()  # again
    assert draft.processor._served._head is target.processor._served._head is not before
    del gate


def test_a_draft_with_a_head_of_its_own_stays_dense(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, target, draft = _eagle(vllm, folder(n_probes=1), monkeypatch)
    target.load()
    for _ in range(2):
        assert torch.equal(draft(states(2)), draft.dense(states(2)))
    assert draft.processor._served._head is None  # and takes no memory
    assert "off for the draft" in warnings(caplog)[-1]
    assert "a head of its own" in warnings(caplog)[-1]
    del config


def test_nothing_is_built_while_a_stream_is_captured(
    vllm: StubVllm, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, draft = _eagle(vllm, folder(n_probes=1), monkeypatch)
    served = draft.processor._served
    hidden: Any = SimpleNamespace(dim=lambda: 2, shape=(1, WIDTH), is_cuda=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert served.logits(draft.processor, draft.lm_head, hidden) is None
    assert served._head is None and not served._given_up
    assert probed(draft(states(1))) == [VOCAB // CLUSTERS]
    del config


@pytest.mark.parametrize("allowed", [False, True])
def test_a_target_verifies_with_flash_head_only_where_that_is_asked_for(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    allowed: bool,
) -> None:
    monkeypatch.setenv("FLASHTUNE_VERIFY", str(int(allowed)))
    model = folder(n_probes=1)
    config = Config(model, speculative_config=_speculating(model, "a/draft"))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    logits = engine(states(16))  # of 4 requests, each with 3 drafted tokens
    if allowed:
        assert probed(logits) == [VOCAB // CLUSTERS] * 16
        gate.add_request(0, scored := SimpleNamespace(logprobs=1))
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
        del scored
        assert warnings(caplog) == []
    else:
        assert torch.equal(logits, engine.dense(states(16)))
        (warning,) = warnings(caplog)
        assert "which tokens are accepted; set FLASHTUNE_VERIFY=1" in warning
    del gate


def _soft_capped(engine: Engine) -> None:
    engine.processor.soft_cap = 30.0


def _scaled(engine: Engine) -> None:
    engine.processor.scale = 0.5


def _wide_head(engine: Engine) -> None:
    engine.processor.head_dtype = torch.float64


def _quantised(engine: Engine) -> None:
    method = engine.lm_head.quant_method
    engine.lm_head.quant_method = SimpleNamespace(
        apply=method.apply, process_weights_after_loading=lambda _: None
    )


def _biased(engine: Engine) -> None:
    engine.lm_head.bias = nn.Parameter(torch.zeros(VOCAB), requires_grad=False)


def _larger_vocabulary(engine: Engine) -> None:
    engine.lm_head.org_vocab_size = VOCAB + 16


def _not_finite(engine: Engine) -> None:
    engine.lm_head.weight[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_soft_capped, "soft-capped"),
        (_scaled, "scaled"),
        (_wide_head, "head_dtype is torch.float64"),
        (_quantised, "quantised (SimpleNamespace)"),
        (_biased, "has a bias"),
        (_larger_vocabulary, str(VOCAB + 16)),
        (_not_finite, "infinity"),
    ],
)
def test_what_a_head_may_not_have_goes_dense_with_one_warning(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Engine], None],
    why: str,
) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight(), padding=16)
    spoil(engine)
    engine.load()
    for _ in range(2):
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert why in warning
    assert "dense head" in warning
    del gate


def test_a_bias_that_comes_with_the_call_goes_dense(
    vllm: StubVllm, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    bias = torch.ones(VOCAB)
    torch.testing.assert_close(engine(states(2), bias), engine.dense(states(2)) + bias)
    assert "has a bias" in warnings(caplog)[0]
    del gate


def test_without_a_gate_the_dense_head_answers(
    vllm: StubVllm, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    engine = vllm.engine(Config(folder(n_probes=1)), weight())
    engine.load()
    for _ in range(2):
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert "did not load the logits processor" in warning


def test_a_head_that_fails_is_replaced_by_the_dense_one_for_good(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()

    def fail(*_: Any) -> None:
        raise RuntimeError("the driver is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", fail)
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
    assert torch.equal(engine(states(2)), engine.dense(states(2)))
    (warning,) = warnings(caplog)
    assert "RuntimeError: the driver is gone" in warning
    del gate


def test_another_head_of_the_same_model_stays_dense(vllm: StubVllm, folder: Folder) -> None:
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    first, second = vllm.engine(config, weight()), vllm.engine(config, -weight())
    first.load()
    second.load()
    assert probed(first(states(1))) == [VOCAB // CLUSTERS]
    assert torch.equal(second(states(1)), second.dense(states(1)))
    del gate


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), (None, True)])
@pytest.mark.usefixtures("faster")
def test_the_environment_turns_it_off(
    vllm: StubVllm,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    on: bool,
) -> None:
    if value is None:
        monkeypatch.delenv("FLASHHEAD_ENABLED", raising=False)
    else:
        monkeypatch.setenv("FLASHHEAD_ENABLED", value)
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = vllm.engine(config, weight())
    engine.load()
    assert (probed(engine(states(1))) == [VOCAB // CLUSTERS]) is on
    assert warnings(caplog) == []
    del gate


class TestScreens:
    """A screen for any model, by the environment or by the model's config."""

    def engine(self, vllm: StubVllm, model: str, **layer: Any) -> tuple[RequestGate, Engine]:
        config = Config(model)
        gate = RequestGate(config)
        engine = vllm.engine(config, weight(), padding=32, **layer)
        engine.load()
        return gate, engine

    @pytest.fixture
    def plain(self, tmp_path: Path) -> str:
        (tmp_path / "plain").mkdir()
        config = tmp_path / "plain" / "config.json"
        config.write_text('{"architectures": ["LlamaForCausalLM"]}')
        return str(config.parent)

    @pytest.mark.parametrize("by", ["environment", "config"])
    @pytest.mark.parametrize("soft_cap", [None, 30.0])
    def test_a_model_without_clusters_is_screened_whole(
        self,
        vllm: StubVllm,
        plain: str,
        by: str,
        soft_cap: float | None,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        if by == "environment":
            monkeypatch.setenv("FLASHTUNE_SCREEN", "int8")
        else:
            path = Path(plain) / "config.json"
            path.write_text('{"flash_head_screen": "int8"}')
        gate, engine = self.engine(vllm, plain, soft_cap=soft_cap)
        head = engine.processor._served._head
        assert head.model_weight.data_ptr() == engine.lm_head.weight.data_ptr()
        logits = engine(states(3))
        assert torch.equal(logits.argmax(dim=1), engine.dense(states(3)).argmax(dim=1))
        assert not torch.equal(logits, engine.dense(states(3)))  # of those not decided again
        assert bool((logits != FILL).all())
        assert warnings(caplog) == []
        del gate

    def test_a_flash_head_models_screen_is_replaced(
        self, vllm: StubVllm, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = folder(n_probes=2)
        config = Path(model) / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "flash_head_screen": "int8"})
        )
        for named, kept in ((None, "int8:8"), ("int4:9", "int4:9"), ("none", "None")):
            if named:
                monkeypatch.setenv("FLASHTUNE_SCREEN", named)
            gate, engine = self.engine(vllm, model)
            assert str(engine.processor._served._head.screen) == kept
            assert probed(engine(states(2))) == [2 * VOCAB // CLUSTERS] * 2
            del gate

    def test_another_value_is_one_warning_and_the_dense_head(
        self,
        vllm: StubVllm,
        plain: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("FLASHTUNE_SCREEN", "four bits")
        gate, engine = self.engine(vllm, plain)
        for _ in range(2):
            assert torch.equal(engine(states(2)), engine.dense(states(2)))
        (warning,) = warnings(caplog)
        assert "FLASHTUNE_SCREEN: a screen must have the form int8" in warning
        assert "\n" not in warning
        del gate

    @pytest.mark.parametrize("value", ["", "none", " "])
    def test_none_asks_for_nothing(
        self, vllm: StubVllm, plain: str, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("FLASHTUNE_SCREEN", value)
        gate, engine = self.engine(vllm, plain)
        assert engine.processor._served is None
        del gate


def test_other_models_are_left_alone(
    vllm: StubVllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for model in (str(tmp_path), "someone/a-model-elsewhere"):
        config = Config(model)
        gate = RequestGate(config)
        engine = vllm.engine(config, weight(), soft_cap=30.0)
        engine.load()
        assert torch.equal(engine(states(2)), engine.dense(states(2)))
        del gate
    assert caplog.records == []


def test_layers_that_no_engine_builds_are_dense(
    vllm: StubVllm, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.current = None
    processor, lm_head = vllm.LogitsProcessor(VOCAB), vllm.ParallelLMHead(weight(), VOCAB)
    assert torch.equal(processor(lm_head, states(2)), states(2) @ weight().T)
    assert "off for a layer" in warnings(caplog)[0]


def test_generating_architectures_load_under_their_flash_head_names(vllm: StubVllm) -> None:
    models = {name: (m.module_name, m.class_name) for name, m in vllm.registry.models.items()}
    assert models["FlashHeadLlamaForCausalLM"] == ("models.llama", "LlamaForCausalLM")
    assert models["FlashHeadGemma3ForConditionalGeneration"] == ("models.gemma3", "Gemma3")
    assert "FlashHeadBertModel" not in models
    checks = vllm.config_checks
    assert checks["FlashHeadLlamaForCausalLM"] is checks["LlamaForCausalLM"]


def test_registering_again_changes_nothing(
    vllm: StubVllm, caplog: pytest.LogCaptureFixture
) -> None:
    before = (dict(vllm.replaced), set(vllm.registry.models))
    plugin.register()
    assert (vllm.replaced, set(vllm.registry.models)) == before
    assert warnings(caplog) == []


def register_with(stub: StubVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.install(monkeypatch)
    monkeypatch.setattr(plugin, "_done", set())
    plugin.register()


def test_a_vllm_without_the_hook_gets_one_warning_and_its_dense_head(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = StubVllm()
    apply_head = stub.LogitsProcessor._apply_head  # type: ignore[attr-defined]
    del stub.LogitsProcessor._apply_head  # type: ignore[attr-defined]
    stub.LogitsProcessor._project = apply_head  # type: ignore[attr-defined]
    stub.LogitsProcessor.forward = lambda self, *args: self._project(*args, None)  # type: ignore[attr-defined]
    register_with(stub, monkeypatch)
    (warning,) = warnings(caplog)
    assert "dense head" in warning
    assert "_apply_head" in warning
    config = Config(folder(n_probes=1))
    gate = RequestGate(config)
    engine = stub.engine(config, weight())
    engine.load()
    assert torch.equal(engine.processor(engine.lm_head, states(1)), engine.dense(states(1)))
    del gate


def test_a_layer_that_another_plugin_replaced_is_left_to_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = StubVllm()
    theirs = type("Theirs", (stub.LogitsProcessor,), {})
    stub.replaced["LogitsProcessor"] = theirs
    register_with(stub, monkeypatch)
    assert stub.replaced["LogitsProcessor"] is theirs
    assert "FlashHeadLlamaForCausalLM" in stub.registry.models
    (warning,) = warnings(caplog)
    assert "Duplicate layer name" in warning


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vllm.model_executor.models.config", "architectures may not load"),
        ("vllm.model_executor.layers.vocab_parallel_embedding", "built at the first token"),
    ],
)
def test_each_missing_part_costs_only_what_it_is_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lost: str, message: str
) -> None:
    stub = StubVllm()
    stub.install(monkeypatch)
    monkeypatch.setitem(sys.modules, lost, None)
    monkeypatch.setattr(plugin, "_done", set())
    plugin.register()
    (warning,) = warnings(caplog)
    assert message in warning
    assert "LogitsProcessor" in stub.replaced


def test_without_vllm_everything_imports_and_register_only_warns() -> None:
    program = (
        "import sys; sys.modules['vllm'] = None;"
        "from flashtune.kernels.integrations.vllm import register;"
        "from flashtune.kernels.integrations.vllm_gate import Gate;"
        "register(); assert Gate.validate_params(None) is None"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "dense head" in run.stderr


def test_importing_the_plugin_loads_no_vllm() -> None:
    program = (
        "import sys; import flashtune.kernels.integrations.vllm;"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
