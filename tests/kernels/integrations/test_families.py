"""Tiny models of many families: the dense head's tokens, all clusters probed, or a clear line."""

from pathlib import Path
from typing import Any

import pytest
import torch

import flashtune
from flashtune.kernels.head import FlashHead
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.clustering.clustered_folder import ClusterRequest, cluster_model
from flashtune.tuning_db.errors import FlashtuneError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCAB, WIDTH, CLUSTERS = 120, 32, 15


def _usual(**changes: Any) -> dict[str, Any]:
    usual = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return {**usual, **changes}


def _gpt(**changes: Any) -> dict[str, Any]:
    usual = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": 128}
    return {**usual, "bos_token_id": 1, "eos_token_id": 1, **changes}


def _short(**changes: Any) -> dict[str, Any]:
    usual = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1}
    return {**usual, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **changes}


_HEADS = {"num_attention_heads": 4}
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_BART = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_T5 = {"d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}

# By name: the config's class and its arguments. Heads are plain matrices, some scaled afterwards.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _usual()),
    "llama, tied": ("LlamaConfig", _usual(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", _usual()),
    "qwen3": ("Qwen3Config", _usual(head_dim=8, tie_word_embeddings=True)),
    "gemma": ("GemmaConfig", _usual(head_dim=8)),
    "gemma3": ("Gemma3TextConfig", _usual(head_dim=8)),
    "mistral": ("MistralConfig", _usual()),
    "phi3": ("Phi3Config", _usual()),
    "gpt2": ("GPT2Config", _gpt()),
    "gpt_bigcode": ("GPTBigCodeConfig", _gpt()),
    "gpt_neox": ("GPTNeoXConfig", {**_usual(), "num_key_value_heads": None}),
    "opt": ("OPTConfig", _short(word_embed_proj_dim=WIDTH, ffn_dim=64, **_HEADS)),
    "opt, narrow": ("OPTConfig", _short(word_embed_proj_dim=16, ffn_dim=64, **_HEADS)),
    "bloom": ("BloomConfig", _short(n_head=4)),
    "falcon": ("FalconConfig", _short(**_HEADS)),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 1, "n_heads": 4}),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "ffn_dim": 64, "num_layers": 1}
        | {"attention_heads": 4, "pad_token_id": 0},
    ),
    "mamba": ("MambaConfig", _short(state_size=4)),
    "rwkv": ("RwkvConfig", _short(attention_hidden_size=WIDTH) | {"num_hidden_layers": 2}),
    "stablelm": ("StableLmConfig", _usual()),
    "cohere": ("CohereConfig", _usual(logit_scale=0.0625)),
    "granite": ("GraniteConfig", _usual(logits_scaling=8.0)),
    "olmo2": ("Olmo2Config", _usual()),
    "falcon_h1": ("FalconH1Config", _usual(lm_head_multiplier=0.02, **_MAMBA)),
    "bart": ("BartConfig", {"vocab_size": VOCAB, "d_model": WIDTH, **_BART}),
    "t5": ("T5Config", {"vocab_size": VOCAB, "d_model": WIDTH, **_T5}),
}
# Heads that FlashHead can't replace, and what is said of them.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2Config", _usual(head_dim=8), "logits"),
    "phi": ("PhiConfig", _usual(), "bias"),
    "gptj": ("GPTJConfig", _gpt(rotary_dim=4), "bias"),
}


def family_model(kind: str, arguments: dict[str, Any], seed: int = 0) -> Any:
    """A model with random weights whose tokens differ from step to step."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(**arguments)
    torch.manual_seed(seed)
    task = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def some_clusters(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters of the model's head: mean rows, and the cluster of each token."""
    weight = model.get_output_embeddings().weight.detach()
    owner = torch.arange(len(weight)) % CLUSTERS
    return torch.stack([weight[owner == each].mean(0) for each in range(CLUSTERS)]), owner


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def generated(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens: torch.Tensor = model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=1
        )
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_generates_the_dense_heads_tokens(family: str) -> None:
    model = family_model(*FAMILIES[family])
    dense = generated(model)
    head = flashtune.apply(model, some_clusters(model), n_probes=CLUSTERS)
    assert torch.equal(generated(model), dense)
    assert head.explain(2, epilogue="logits")["level"] == "torch"  # it was asked
    flashtune.remove(model)
    assert torch.equal(generated(model), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_folder_is_clustered(family: str, tmp_path: Path) -> None:
    """Whatever the width and the weight are called, and whatever it is tied to."""
    model, source, out = family_model(*FAMILIES[family]), tmp_path / "model", tmp_path / "flash"
    model.save_pretrained(source)
    result = cluster_model(ClusterRequest(model=str(source), out=out, iterations=1))
    weight = model.get_output_embeddings().weight.detach()
    assert [result.vocab_size, result.hidden_size] == [*weight.shape]
    head = FlashHead.from_pretrained(out, device="cpu", n_probes=result.n_clusters, tune="never")
    hidden = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(2))
    assert torch.equal(head(hidden), (hidden @ weight.T).argmax(dim=1))
    assert ModelFolder.open(out).problem().hidden_size == weight.shape[1]


@pytest.mark.parametrize("family", REFUSED)
def test_a_head_that_cannot_be_replaced_is_refused_in_a_line(family: str) -> None:
    kind, arguments, said = REFUSED[family]
    model = family_model(kind, arguments)
    dense = generated(model)
    with pytest.raises(FlashtuneError, match=said) as caught:
        flashtune.apply(model, some_clusters(model), n_probes=CLUSTERS)
    assert "\n" not in str(caught.value)
    assert torch.equal(generated(model), dense)


@pytest.mark.parametrize("family", ["phi", "gptj"])
def test_a_head_with_a_bias_is_not_clustered(family: str, tmp_path: Path) -> None:
    kind, arguments, _ = REFUSED[family]
    family_model(kind, arguments).save_pretrained(tmp_path / "model")
    with pytest.raises(FlashtuneError, match="has a bias"):
        cluster_model(ClusterRequest(model=str(tmp_path / "model"), out=tmp_path / "flash"))
