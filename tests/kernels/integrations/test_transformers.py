"""FlashHead in tiny random models of transformers, whose dense head says what is right."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import flashtune
from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.kernels.head import FlashHead
from flashtune.kernels.integrations import flash_linear
from flashtune.kernels.integrations.flash_linear import FlashLinear
from flashtune.kernels.integrations.generation import needs_every_token
from flashtune.kernels.measure.contest import Verdict
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, CLUSTERS = 128, 32, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "sliding_window": 32}),
}
GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def make_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    prefix, own = FAMILIES[family]
    config_class = "Gemma3TextConfig" if family == "gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_class)(**{**SIZES, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():  # far apart, so that rounding swaps no two tokens
        model.get_output_embeddings().weight.normal_()
    return model


def clusters(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, generator=generator))
    return centroids, torch.randperm(VOCAB, generator=generator) % CLUSTERS


def prompts(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))


def flash(weight: torch.Tensor, *parts: torch.Tensor, **options: Any) -> FlashHead:
    return FlashHead(weight, *parts, n_probes=4, **options)


def generated(model: Any, **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    with torch.no_grad():
        tokens = model.generate(prompts(), max_new_tokens=12, **options)
    found: list[list[int]] = tokens.tolist()
    return found


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_clusters_probed_the_dense_tokens_are_generated(
    family: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    expected = generated(model, **GENERATIONS[generation])
    head = flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    calls = []
    decode = FlashHead.logits

    def counted(self: FlashHead, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return decode(self, hidden)

    monkeypatch.setattr(FlashHead, "logits", counted)
    assert generated(model, **GENERATIONS[generation]) == expected
    assert calls == [head] * 12
    flashtune.remove(model)
    assert generated(model, **GENERATIONS[generation]) == expected
    assert len(calls) == 12


def test_only_candidates_are_sampled() -> None:
    model = make_model()
    centroids, assignments = clusters()
    head = flashtune.apply(model, (centroids, assignments), n_probes=2)
    with torch.no_grad():
        out = model(prompts(1), logits_to_keep=1, output_hidden_states=True)
    state = out.hidden_states[-1][0, -1]
    probed = (centroids @ state).topk(2).indices
    candidates = [token for token in range(VOCAB) if assignments[token] in probed]
    dense = torch.nn.functional.linear(state, model.lm_head.weight)
    torch.testing.assert_close(out.logits[0, 0, candidates], dense[candidates])
    assert (out.logits[0, 0] != -1e4).nonzero()[:, 0].tolist() == candidates
    with torch.no_grad():
        sampled = model.generate(
            prompts(1).expand(16, -1), max_new_tokens=1, do_sample=True, top_k=0, temperature=9.0
        )
    assert set(sampled[:, -1].tolist()) <= set(candidates)
    assert len(set(sampled[:, -1].tolist())) > 1
    assert head.n_probes == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model_is_traced(backend: str) -> None:
    torch.compiler.reset()
    model = make_model("qwen3")
    expected = generated(model)
    flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        out = compiled(prompts(), logits_to_keep=1, use_cache=False)
    assert out.logits[:, 0].argmax(dim=1).tolist() == [row[5] for row in expected]


def test_generate_compiles_the_whole_step() -> None:
    torch.compiler.reset()
    model = make_model()
    expected = generated(model)
    flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    compiled = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert generated(model, **options) == expected


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 5), (MOST_TOKENS + 1, 1)])
def test_scoring_and_large_batches_take_the_dense_head(batch: int, length: int) -> None:
    model = make_model()
    with torch.no_grad():
        expected = model(prompts(batch, length)).logits
        flashtune.apply(model, clusters(), n_probes=1)
        assert torch.equal(model(prompts(batch, length)).logits, expected)
        assert not torch.equal(model(prompts(2, 1)).logits, make_model()(prompts(2, 1)).logits)


def test_training_takes_the_dense_head() -> None:
    model, plain = make_model(), make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    for each in (model, plain):
        each(prompts(2, 1)).logits.square().sum().backward()
    name = "model.layers.0.mlp.up_proj.weight"
    expected = plain.get_parameter(name).grad
    assert torch.equal(model.get_parameter(name).grad, expected)
    assert torch.equal(model.lm_head.weight.grad, plain.lm_head.weight.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_plain_model(family: str, tmp_path: Path) -> None:
    model, plain = make_model(family), make_model(family)
    flashtune.apply(model, clusters(), n_probes=4)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path / "applied")
    plain.save_pretrained(tmp_path / "plain")
    names = [path.name for path in (tmp_path / "plain").iterdir()]
    assert sorted(path.name for path in (tmp_path / "applied").iterdir()) == sorted(names)
    assert "model.safetensors" in names
    for name in names:
        saved = (tmp_path / "applied" / name).read_bytes()
        assert saved == (tmp_path / "plain" / name).read_bytes()
    again = type(plain).from_pretrained(tmp_path / "applied")
    assert generated(again) == generated(plain)


def test_a_tied_embedding_stays_tied_and_where_it_was() -> None:
    model = make_model("qwen3")
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    head = flashtune.apply(model, clusters(), n_probes=4)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, before)
    assert head.weight.data_ptr() != embedding.data_ptr()
    model.bfloat16()
    assert head.weight.dtype is torch.bfloat16
    flashtune.remove(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is embedding


def test_a_head_made_beforehand_is_taken() -> None:
    model = make_model()
    head = FlashHead(model.lm_head.weight, *clusters(), n_probes=3)
    assert flashtune.apply(model, head) is head
    assert model.lm_head.head is head
    assert model.lm_head.head.explain(epilogue="logits")["problem"]["n_probes"] == 3


def test_the_clusters_of_a_model_folder_are_taken(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.config.n_probes = 3
    model.config.flash_head_special_token_ids = [7]
    model.save_pretrained(tmp_path)
    centroids, assignments = clusters()
    tensors = {"centroids": centroids.T.contiguous(), "cluster_assignments": assignments}
    (tmp_path / "flash_head_assets").mkdir()
    file = tmp_path / "flash_head_assets" / "clustering_cache.safetensors"
    save_file(tensors, file)
    head = flashtune.apply(model, assets=tmp_path)
    assert head.n_probes == 3
    assert model.lm_head.head is head
    with torch.no_grad():
        logits = model(prompts(1, 1)).logits[0, 0]
    assert int((logits != -1e4).sum()) in (3 * 8, 4 * 8)  # with the cluster of token 7
    assert float(logits[7]) != -1e4
    flashtune.remove(model)
    assert flashtune.apply(model, assets=str(tmp_path), n_probes=5).n_probes == 5
    other = make_model("qwen3", vocab_size=64)
    before = other.lm_head
    with pytest.raises(
        FlashtuneError, match=r"made for a head of shape \[128, 32\], but .* shape \[64, 32\]"
    ):
        flashtune.apply(other, assets=tmp_path)
    assert other.lm_head is before


def test_clusters_come_from_one_place() -> None:
    for arguments in ({}, {"n_probes": 3}, {"head": clusters(), "assets": "somewhere"}):
        with pytest.raises(FlashtuneError, match="either head or assets"):
            flashtune.apply(make_model(), **arguments)
    with pytest.raises(FlashtuneError, match="nowhere"):
        flashtune.apply(make_model(), assets="nowhere")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("screen", ["int8", "int4"])
def test_any_model_is_screened_without_assets(family: str, screen: str) -> None:
    model = make_model(family)
    expected = generated(model)
    head = flashtune.apply(model, screen=screen)
    assert head.model_weight is model.lm_head.weight is model.get_output_embeddings().weight
    assert generated(model) == expected
    assert head.added_bytes < 0.4 * model.lm_head.weight.nbytes  # of float32
    if FAMILIES[family][1]["tie_word_embeddings"]:
        assert head.model_weight is model.get_input_embeddings().weight
    model.bfloat16()
    assert head.model_weight is model.lm_head.weight
    decoding = head.decoder.weights.model_weight
    assert decoding is not None
    assert decoding.data_ptr() == model.lm_head.weight.data_ptr()
    assert head.explain()["model_weight"] == "the one given"
    with torch.no_grad():
        before = model(prompts(2, 1)).logits
        assert not torch.equal(before, model.lm_head(torch.zeros(1, 1, WIDTH).bfloat16()))
    flashtune.remove(model)
    assert type(model.lm_head) is torch.nn.Linear


def answers_densely(model: Any) -> bool:
    """Whether the output head's logits are the dense ones to the last bit."""
    hidden = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        head = model.get_output_embeddings()
        hidden = hidden.to(head.weight)
        return torch.equal(head(hidden), torch.nn.functional.linear(hidden, head.weight))


@pytest.mark.parametrize("screen", ["int8", "int4:3"])
@pytest.mark.parametrize("change", ["loaded", "merged", "replaced", "data replaced", "one row"])
def test_a_screen_of_other_values_is_noticed(
    change: str, screen: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A conversion, which rounds the weight and leaves the screen as it was, is no change."""
    model = make_model()
    flashtune.apply(model, screen=screen)
    assert not answers_densely(model)
    model.bfloat16()
    assert not answers_densely(model)
    model.float()
    assert not answers_densely(model)
    with torch.no_grad():
        CHANGES[change](model)
        model(prompts(2, 5))
    assert answers_densely(model)
    assert caplog.text.count("the output head's weight has changed") == 1


def test_a_screen_has_no_fill_and_bears_caps() -> None:
    model = with_cap(make_model())
    expected = generated(model)
    flashtune.apply(model, screen="int4")
    assert generated(model) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"screen": "none"}, "either head or assets, or a screen without both"),
        ({"screen": "bf16"}, "a screen's formats must be among int8, int4, not 'bf16'"),
        ({"screen": "4 bits", "head": ()}, "a screen must have the form int8"),
        ({"screen": 8}, "a screen must be a Screen or a string such as int8, not 8"),
    ],
)
def test_other_screens_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = make_model()
    before = model.lm_head
    if "head" in arguments:
        arguments = {**arguments, "head": clusters(), "n_probes": 2}
    with pytest.raises(FlashtuneError, match=message) as caught:
        flashtune.apply(model, **arguments)
    assert "\n" not in str(caught.value)
    assert model.lm_head is before


def test_clusters_are_screened() -> None:
    model = make_model()
    head = flashtune.apply(model, clusters(), n_probes=3, screen="int4/int8:5")
    assert str(head.screen) == "int4/int8:5"
    assert head.model_weight is model.lm_head.weight
    flashtune.remove(model)
    other = FlashHead(model.lm_head.weight, *clusters(), n_probes=3, screen="int8")
    assert flashtune.apply(model, other, screen="int8") is other
    flashtune.remove(model)
    with pytest.raises(FlashtuneError, match="screen int4:32 differs from the FlashHead's int8:8"):
        flashtune.apply(model, other, screen="int4")


def test_rows_are_read_in_place() -> None:
    model = make_model()
    head = flashtune.apply(model, clusters(), n_probes=3, rows="in_place")
    assert head.model_weight is model.lm_head.weight
    flashtune.remove(model)
    ordered = FlashHead(model.lm_head.weight, *clusters(), n_probes=3)
    hidden = torch.randn(4, head.like.shape[1]).to(head.like)
    assert torch.equal(head(hidden), ordered(hidden))
    assert flashtune.apply(model, head, rows="in_place") is head
    flashtune.remove(model)
    with pytest.raises(
        FlashtuneError, match="rows in_order differs from the FlashHead's in_place"
    ):
        flashtune.apply(model, head, rows="in_order")
    with pytest.raises(FlashtuneError, match="not the model's rows: leave out rows"):
        flashtune.apply(model, screen="int4", rows="in_place")


@pytest.mark.parametrize(
    ("own", "usual", "special"), [(5, [9, 7], (5, 7, 9)), ([5, 9], None, (5, 9)), (None, 999, ())]
)
def test_the_end_tokens_of_a_model_are_candidates(
    own: Any, usual: Any, special: tuple[int, ...]
) -> None:
    model = make_model()
    model.config.eos_token_id, model.generation_config.eos_token_id = own, usual
    head = flashtune.apply(model, clusters(), n_probes=1)
    assert head.special_token_ids == special
    with torch.no_grad():
        assert bool((model(prompts(2, 1)).logits[..., list(special)] != -1e4).all())


def without_head(model: Any) -> Any:
    return model.model


def with_adapter(model: Any) -> Any:
    class LoraLinear(torch.nn.Linear):
        pass

    model.lm_head = LoraLinear(WIDTH, VOCAB, bias=False)
    return model


def with_bias(model: Any) -> Any:
    model.lm_head = torch.nn.Linear(WIDTH, VOCAB)
    return model


def with_cap(model: Any) -> Any:
    """Under a name that nobody knows."""
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    model.forward = capped
    return model


def with_hook(model: Any) -> Any:
    model.lm_head._hf_hook = object()
    return model


def with_tensor_of_its_own_kind(model: Any) -> Any:
    class Quantised(torch.Tensor):
        pass

    weight = model.lm_head.weight.detach().as_subclass(Quantised)
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model


def applied(model: Any) -> Any:
    flashtune.apply(model, clusters(), n_probes=4)
    return model


def read_only(model: Any) -> Any:
    model.set_output_embeddings = lambda _: None
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_head, "LlamaModel has no output head"),
        (with_adapter, r"LoraLinear, not torch.nn.Linear: merge adapters first"),
        (with_bias, "the output head has a bias"),
        (with_cap, r"caps or scales its logits: it returns -30 for -10000"),
        (with_hook, "load the whole model, unquantised, on one device"),
        (with_tensor_of_its_own_kind, "weight is a Quantised on cpu"),
        (applied, r"already applied: call flashtune.remove\(model\) first"),
        (read_only, "set_output_embeddings does not set its output head"),
        (lambda model: model.double(), "weight must be one of bf16, fp16, fp32"),
    ],
)
def test_a_model_that_cannot_be_helped_is_left_as_it_was(
    spoil: Callable[[Any], Any], message: str
) -> None:
    model = spoil(make_model())
    head = model.get_output_embeddings()
    with pytest.raises(FlashtuneError, match=message) as caught:
        flashtune.apply(model, clusters(), n_probes=4)
    assert "\n" not in str(caught.value)
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize(
    ("make_head", "options", "message"),
    [
        (
            lambda weight: flash(weight[:64], clusters()[0], torch.arange(64) // 4),
            {},
            "the FlashHead is 64x32 .* output head 128x32: use one made for this model",
        ),
        (lambda weight: flash(weight.bfloat16(), *clusters()), {}, "dtype is torch.bfloat16"),
        (lambda weight: flash(-weight, *clusters()), {}, "weight is not the model's"),
        (
            lambda weight: flash(weight, *clusters(), release_weight=True),
            {},
            "was made with release_weight",
        ),
        (
            lambda weight: flash(weight, *clusters()),
            {"n_probes": 3},
            "n_probes 3 differs from the FlashHead's 4",
        ),
        (
            lambda _: (clusters()[0], torch.zeros(VOCAB).long()),
            {"n_probes": 4},
            "clusters must have equal sizes",
        ),
        (
            lambda _: (clusters()[0], torch.arange(VOCAB - 1)),
            {"n_probes": 4},
            r"must be \[128\], not \[127\]",
        ),
        (lambda _: clusters(), {"n_probes": 17}, "n_probes 17 is more than n_clusters 16"),
    ],
)
def test_a_head_of_another_model_is_refused(
    make_head: Callable[[torch.Tensor], Any], options: dict[str, int], message: str
) -> None:
    model = make_model()
    before = model.lm_head
    head = make_head(model.lm_head.weight)
    with pytest.raises(FlashtuneError, match=message):
        flashtune.apply(model, head, **options)
    assert model.lm_head is before


def with_map(model: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    forward = model.forward

    def mapped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = make(out.logits)
        return out

    model.forward = mapped
    return model


@pytest.mark.parametrize(
    ("make", "harmless"),
    [
        (lambda logits: logits / 8, True),
        (lambda logits: logits * 100, True),
        (lambda logits: 0.02 * logits, True),
        (lambda logits: logits.log_softmax(dim=-1), True),
        (lambda logits: 1000 * torch.tanh(logits / 1000), True),
        (lambda logits: logits / 1000, False),
        (lambda logits: -logits, False),
        (lambda logits: logits.clamp(-20, 20), False),
        (lambda logits: torch.sigmoid(logits), False),
    ],
)
def test_what_a_model_does_to_its_logits_is_found_out(
    make: Callable[[torch.Tensor], torch.Tensor], harmless: bool
) -> None:
    model = with_map(make_model(), make)
    expected = generated(model)
    if harmless:
        flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    else:
        with pytest.raises(FlashtuneError, match="caps or scales its logits"):
            flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    assert generated(model) == expected


def test_a_model_that_cannot_be_run_on_a_token_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model()
    forward, model.forward = model.forward, None
    flashtune.apply(model, clusters(), n_probes=CLUSTERS)
    assert "could not be run on one token (TypeError" in caplog.text
    model.forward = forward


def test_finding_it_out_leaves_no_trace() -> None:
    model = make_model(attention_dropout=0.5).train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    flashtune.apply(model, clusters(), n_probes=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not model.lm_head._forward_hooks


class Halved:
    """A processor that somebody wrote: nobody knows what it makes of the fill."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -(scores**2)


NEEDS_ALL: dict[str, dict[str, Any]] = {
    "guidance_scale": {"guidance_scale": 1.5},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (1, 3.0),
        "eos_token_id": 5,
    },
    "sequence_bias": {"sequence_bias": [[[7], 40.0]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [9, 11, 60, 61]},
    "logits_processor": {"logits_processor": [Halved()]},
    "temperature": {"temperature": 200.0, "do_sample": True},
    "watermarking_config": {"watermarking_config": {"bias": 30.0, "seeding_scheme": "selfhash"}},
}


@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize("setting", NEEDS_ALL)
def test_settings_that_need_every_token_get_the_dense_tokens(
    setting: str, as_config: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With a single probe: FlashHead would give other tokens."""
    options = NEEDS_ALL[setting]
    if as_config:
        if setting in ("logits_processor", "prefix_allowed_tokens_fn", "temperature"):
            pytest.skip("the same in a config, or no part of one")
        options = {"generation_config": transformers.GenerationConfig(**options)}
    model = make_model()
    expected = generated(model, **options)
    flashtune.apply(model, clusters(), n_probes=1)
    assert generated(model, **options) == expected
    assert generated(model, **options) == expected
    assert caplog.text.count("needs the logit of every token") == 1
    assert setting in caplog.text
    assert generated(model) != generated(make_model())  # FlashHead answers again


def test_a_models_own_settings_count(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.generation_config.guidance_scale = 1.5
    expected = generated(model)
    flashtune.apply(model, clusters(), n_probes=1)
    assert generated(model) == expected
    model.generation_config.guidance_scale = 1.0  # which asks for nothing
    assert generated(model) != generated(make_model())
    assert caplog.text.count("guidance_scale needs") == 1


def test_returned_scores_are_those_of_every_token() -> None:
    model = make_model()
    options = {"return_dict_in_generate": True, "max_new_tokens": 3}
    for wanted in ("output_scores", "output_logits"):
        name = wanted.removeprefix("output_")
        expected = model.generate(prompts(), **{wanted: True}, **options)[name]
        flashtune.apply(model, clusters(), n_probes=1)
        found = model.generate(prompts(), **{wanted: True}, **options)[name]
        flashtune.remove(model)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_setting_that_nobody_knows_takes_the_dense_head() -> None:
    class Newer(transformers.GenerationConfig):  # type: ignore[name-defined, misc]
        def __init__(self, **options: Any) -> None:
            self.of_tomorrow = options.pop("of_tomorrow", None)
            super().__init__(**options)

    assert needs_every_token(Newer(of_tomorrow=3), (), {}) == "of_tomorrow"
    assert needs_every_token(Newer(), (), {"max_new_tokens": 3, "top_k": 4}) is None
    usual = transformers.GenerationConfig()
    usual.chat_format = "chatml"  # which some folders hold, and nothing reads
    assert needs_every_token(usual, (), {}) is None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "loaded": lambda model: model.load_state_dict(type(model)(model.config).state_dict()),
    "merged": lambda model: model.lm_head.weight.data.add_(torch.randn(VOCAB, WIDTH)),
    "replaced": lambda model: setattr(
        model.lm_head, "weight", torch.nn.Parameter(torch.randn(VOCAB, WIDTH))
    ),
    "data replaced": lambda model: setattr(
        model.lm_head.weight, "data", torch.randn(VOCAB, WIDTH)
    ),
    "one row": lambda model: model.lm_head.weight[77].mul_(-3),
    "longer": lambda model: model.resize_token_embeddings(VOCAB + 8),
    "shorter": lambda model: model.resize_token_embeddings(VOCAB - 8),
}


@pytest.mark.filterwarnings("ignore:.*mean_resizing.*")
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changes_is_answered_densely(
    change: str, family: str, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    flashtune.apply(model, clusters(), n_probes=1)
    with torch.no_grad():
        model(prompts(2, 1))
        CHANGES[change](model)
        for _ in range(2):
            out = model(prompts(2, length), logits_to_keep=1, output_hidden_states=True)
            head = model.get_output_embeddings()
            dense = torch.nn.functional.linear(out.hidden_states[-1][:, -1], head.weight)
            assert torch.equal(out.logits[:, 0], dense)
        model.generate(prompts(), max_new_tokens=2)
    if isinstance(head, FlashLinear):
        assert caplog.text.count("the output head's weight has changed") == 1
        flashtune.remove(model)
        assert list(model.lm_head.weight.shape) == [model.lm_head.out_features, WIDTH]
    else:  # transformers put in a layer of its own
        assert caplog.text.count("output head is not the one") == 1


def test_a_weight_that_has_its_values_again_is_decoded_with() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flashtune.apply(model, clusters(), n_probes=1)
    with torch.no_grad():
        expected = model(prompts(2, 1)).logits
        model.load_state_dict(make_model(seed=7).state_dict())
        assert not torch.equal(model(prompts(2, 1)).logits, expected)
        model.load_state_dict(before)
        assert torch.equal(model(prompts(2, 1)).logits, expected)
        model.bfloat16()
        assert int((model(prompts(2, 1)).logits[0, 0] != -1e4).sum()) == VOCAB // CLUSTERS


def test_compiled_code_notices_a_weight_that_changes() -> None:
    torch.compiler.reset()
    model = make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for changed in (False, True):
            logits = compiled(prompts(2, 1), use_cache=False).logits
            assert bool((logits == -1e4).any()) is not changed
            model.lm_head.weight.mul_(-2)


def test_training_the_head_alone_takes_the_dense_head() -> None:
    model, plain = make_model(), make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    for each in (model, plain):
        for parameter in each.model.parameters():
            parameter.requires_grad_(False)
        each(prompts(2, 1)).logits.square().sum().backward()
    assert torch.equal(model.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_an_adapter_over_the_head_is_answered_densely(caplog: pytest.LogCaptureFixture) -> None:
    """Its own logits come on top of candidates' and fill alike, whatever it thinks of clusters."""

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base, self.delta = base, torch.nn.Linear(WIDTH, VOCAB, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base(hidden) + 50 * self.delta(hidden)

    model, plain = make_model(), make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    torch.manual_seed(4)
    model.lm_head = Adapter(model.lm_head)
    plain.lm_head = Adapter(plain.lm_head)
    plain.lm_head.delta = model.lm_head.delta
    assert generated(model) == generated(plain)
    assert caplog.text.count("output head is not the one") == 1


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_decodes_by_itself(way: str) -> None:
    model = make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = generated(model)
    assert generated(other) == expected
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert generated(other) != expected
    assert generated(model) == expected
    assert generated(other, guidance_scale=1.5) != generated(model, guidance_scale=1.5)


@pytest.mark.parametrize("way", ["clusters", "screen", "folder"])
def test_kernels_are_prepared_and_races_turned_off(way: str, tmp_path: Path) -> None:
    model = make_model()
    options: dict[str, Any] = {"screen": "int8"}
    if way == "clusters":
        options = {"head": clusters()}
    elif way == "folder":
        centroids, assignments = clusters()
        tensors = {"centroids": centroids.T.contiguous(), "cluster_assignments": assignments}
        save_file(tensors, tmp_path / "clustering_cache.safetensors")
        (tmp_path / "config.json").write_text('{"architectures": ["FlashHeadX"], "n_probes": 2}')
        options = {"assets": tmp_path}
    head = flashtune.apply(model, **{"n_probes": 2, **options}, tune="never", prepare=(1, 8))
    assert set(head.decoder._bounds) == {("logits", 1), ("logits", 8)}
    assert head.tune == "never"
    flashtune.remove(model)
    head = flashtune.apply(model, **{"n_probes": 2, **options})
    assert head.tune == "race" and not head.decoder._bounds


@pytest.mark.parametrize("numbers", [(0,), (1, MOST_TOKENS + 1), (True,), ("1",)])
def test_what_cannot_be_prepared_leaves_the_model_as_it_was(numbers: tuple[Any, ...]) -> None:
    model = make_model()
    dense = model.lm_head
    with pytest.raises(FlashtuneError, match="batch sizes from 1 to 32, not"):
        flashtune.apply(model, clusters(), n_probes=2, prepare=numbers)
    with pytest.raises(FlashtuneError, match="tune must be one of race, never, not 'odd'"):
        flashtune.apply(model, clusters(), n_probes=2, tune="odd")
    with pytest.raises(FlashtuneError, match="tune never differs from the FlashHead's race"):
        flashtune.apply(model, flash(dense.weight, *clusters()), tune="never")
    assert model.lm_head is dense


def test_removing_what_is_not_there_is_an_error() -> None:
    with pytest.raises(FlashtuneError, match="nothing to remove"):
        flashtune.remove(make_model())


def test_rows_of_any_shape_are_taken() -> None:
    model = make_model()
    head = flashtune.apply(model, clusters(), n_probes=2)
    linear = model.lm_head
    assert isinstance(linear, FlashLinear)
    hidden = torch.randn(3, 1, WIDTH)
    with torch.no_grad():
        assert torch.equal(linear(hidden)[:, 0], head.logits(hidden[:, 0]))
        assert torch.equal(linear(hidden[:, 0]), head.logits(hidden[:, 0]))
        dense = torch.nn.functional.linear(hidden[0, 0], linear.weight)
        assert torch.equal(linear(hidden[0, 0]), dense)
        assert linear(hidden[:0]).shape == (0, 1, VOCAB)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """FlashHead's times by rows, each asked for once, against 10 us of the dense head."""
    times: dict[int, float] = {}

    def contest(head: Any, dense: Any, hidden: torch.Tensor) -> Verdict:
        assert head(hidden).shape == dense(hidden).shape
        return Verdict(times.pop(len(hidden)), 10.0)

    monkeypatch.setattr(flash_linear, "contest", contest)
    monkeypatch.delenv("FLASHHEAD_ENABLED")
    return times


def test_the_dense_head_answers_for_rows_at_which_it_is_faster(timed: dict[int, float]) -> None:
    timed.update({1: 5.0, 2: 20.0})
    model = make_model()
    head = flashtune.apply(model, clusters(), n_probes=1)
    linear = model.get_output_embeddings()
    for _ in range(2):
        for rows in (1, 2):
            hidden = torch.randn(rows, WIDTH)
            with torch.no_grad():
                logits = linear(hidden)
            dense = torch.nn.functional.linear(hidden, linear.weight)
            assert torch.equal(logits, head.logits(hidden) if rows == 1 else dense)
    assert {rows: each.wins for rows, each in linear.verdicts.items()} == {1: True, 2: False}
    with torch.no_grad():  # more rows than FlashHead takes are nobody's contest
        assert linear(torch.randn(1, 7, WIDTH)).shape == (1, 7, VOCAB)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_flash_head_answers_anyway_where_that_is_asked_for(
    by: str, timed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("FLASHHEAD_ENABLED", "always")
    model = make_model()
    head = flashtune.apply(model, clusters(), n_probes=1, always=by == "argument")
    hidden = torch.randn(1, WIDTH)
    with torch.no_grad():
        logits = model.get_output_embeddings()(hidden)
    assert torch.equal(logits, head.logits(hidden))
    assert (logits == FILL).any()


def test_a_copy_is_timed_anew(timed: dict[int, float]) -> None:
    timed[1] = 5.0
    model = make_model()
    flashtune.apply(model, clusters(), n_probes=1)
    hidden = torch.randn(1, WIDTH)
    with torch.no_grad():
        model.get_output_embeddings()(hidden)
        timed[1] = 20.0
        copied = copy.deepcopy(model).get_output_embeddings()
        copied(hidden)
    assert not copied.verdicts[1].wins
    assert model.get_output_embeddings().verdicts[1].wins
