"""`generate` of a model with a FlashHead: the dense head if every token's logit is needed.

Usage:
    model.generate = Generation(model, linear)     # docs/transformers.md lists those settings

Most settings only rank, mask or weight tokens, and FlashHead's candidates are the right ones for
them. Those that compare logits of two calls, lift tokens by their logit, allow a few alone, or
return scores would meet the fill of tokens that are no candidates. Settings that this module does
not know use the dense head, too.
"""

from typing import Any

from flashtune.kernels.integrations.flash_linear import FlashLinear

HOTTEST = 50.0  # a temperature; above it, the fill would be too near to the candidates
# Settings of transformers' GenerationConfig that the fill does not affect: they leave it far below
# the candidates, or choose among these, or do nothing to logits at all.
_HARMLESS = """
max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
do_sample num_beams use_mtp use_cache cache_implementation cache_config max_cache_len
temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids renormalize_logits
forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
begin_suppress_tokens token_healing num_return_sequences output_attentions output_hidden_states
return_dict_in_generate return_legacy_cache pad_token_id bos_token_id eos_token_id
encoder_no_repeat_ngram_size decoder_start_token_id is_assistant num_assistant_tokens
num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
max_matching_ngram_size assistant_lookbehind target_lookbehind assistant_ensemble_weight
speculation_type compile_config disable_compile low_memory continuous_batching_config
prefill_chunk_size diversity_penalty num_beam_groups transformers_version generation_kwargs
"""
HARMLESS = frozenset(_HARMLESS.split())
_NEUTRAL = {"guidance_scale": 1.0}
_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "custom_generate")


class Generation:
    """A model's own `generate`, with the dense head if its settings need it."""

    def __init__(self, model: Any, linear: FlashLinear) -> None:
        """For the model whose output head is `linear`."""
        self._model, self._linear = model, linear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's class does."""
        model, linear = self._model, self._linear
        generate = type(model).generate
        if model.get_output_embeddings() is not linear:
            linear.warn(
                "the model's output head is not the one that FlashHead was applied to (it was "
                "resized, or wrapped by an adapter), so the dense head answers"
            )
        else:
            usual = getattr(model, "generation_config", None)
            asked = needs_every_token(usual, args, kwargs)
            if asked is None:
                return generate(model, *args, **kwargs)
            linear.warn(f"{asked} needs the logit of every token, so the dense head answers")
        with linear.every_token():
            return generate(model, *args, **kwargs)


def needs_every_token(usual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The setting, of a call of `generate`, that FlashHead's candidates can't serve, or None.

    usual: the model's own generation config; args, kwargs: of the call, without the model.
    """
    names = ("inputs", "generation_config", "logits_processor", "stopping_criteria")
    given = {**dict(zip((*names, "prefix_allowed_tokens_fn"), args, strict=False)), **kwargs}
    for name in _ARGUMENTS:
        if given.get(name):
            return name
    configs = [config for config in (given.get("generation_config"), usual) if config is not None]
    known: dict[str, Any] = (
        vars(type(configs[0])()) if configs else {}
    )  # the rest of a config has no effect
    for name in known:
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        value = next((value for value in values if value is not None), None)
        if name == "temperature" and value is not None and value > HOTTEST:
            return f"temperature={value}"
        if name in HARMLESS or name.startswith("_"):
            continue
        if value and value != _NEUTRAL.get(name):
            return name
    return None
