"""The vLLM plugin: FlashHead models load, and decode with FlashHead.

Usage:
    pip install flashtune          # beside vLLM, which finds the plugin by its entry points
    python -m vllm.entrypoints.openai.api_server --model path/to/flash-head-model
    FLASHHEAD_ENABLED=0 …          # the same model with its dense head

vLLM calls `register` in each of its processes. It names the `FlashHead…` architectures, and
registers two layers instead of vLLM's own, by vLLM's own mechanism: the logits processor, which
asks FlashHead first, and the head, which builds FlashHead when the weights are loaded. If a vLLM
lacks any of this, FlashHead is off, with one warning; the model still loads. See docs/vllm.md.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flashtune.kernels.integrations.vllm_head import (
    LOG,
    ServedHead,
    is_draft,
    lends_head,
    served_head,
)
from flashtune.kernels.model_folder.own_class import PREFIX

_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration")
_SHARES_HEAD = "eagle_head"  # vLLM's tag of the model that is built: EAGLE, MTP and their kin
_done: set[str] = set()
Found = TypeVar("Found")


def register() -> None:
    """Register everything, once per process; never raises."""
    for step, loss in (
        (_register_architectures, "FlashHead architectures may not load"),
        (_register_processor, "FlashHead models use their dense head"),
        (_register_head, "FlashHead is built at the first token, not when the model is loaded"),
    ):
        if step.__name__ in _done:
            continue
        _done.add(step.__name__)
        try:
            step()
        except Exception as error:  # another plugin has the name, or vLLM has changed
            LOG.warning("%s: %s: %s", loss, type(error).__name__, error)


def _register_architectures() -> None:
    """Let each generating architecture load under its FlashHead name, as vLLM's own class."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name, model in list(ModelRegistry.models.items()):
        if name.endswith(_SUFFIXES) and hasattr(model, "module_name"):
            lazily = f"{model.module_name}:{model.class_name}"
            ModelRegistry.register_model(PREFIX + name, lazily)
    for name, checks in list(MODELS_CONFIG_MAP.items()):  # by which vLLM adjusts its config
        if name.endswith(_SUFFIXES):
            MODELS_CONFIG_MAP[PREFIX + name] = checks


def _current(find: Callable[[Any], Found]) -> Found | None:
    """What is found with the config of the engine that is being built; never raises."""
    try:
        from vllm.config import get_current_vllm_config

        return find(get_current_vllm_config())
    except Exception as error:  # a layer that is built outside an engine
        LOG.warning("FlashHead is off for a layer: %s: %s", type(error).__name__, error)
        return None


def _head_of(vllm_config: Any) -> ServedHead | None:
    """The head that the model that is being built decodes with."""
    return served_head(vllm_config, drafts=is_draft(vllm_config) or _shares_head())


def _heads_of_layer(vllm_config: Any) -> list[ServedHead]:
    """What is built from the head layer that is being made, when its weights are loaded.

    A draft that shares its target's head may have made a layer of its own, which vLLM then drops.
    """
    if _shares_head():
        return []
    lent = served_head(vllm_config, drafts=True) if lends_head(vllm_config) else None
    return [each for each in (_head_of(vllm_config), lent) if each is not None]


def _shares_head() -> bool:
    """Whether the model that is being built drafts with its target's head."""
    try:
        from vllm.compilation import backends
    except ImportError:
        return False
    return getattr(backends, "model_tag", None) == _SHARES_HEAD


def _register_processor() -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class FlashHeadLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._served = _current(_head_of)
            self._given: Any = None

        def given_logits(self, logits: Any, lm_head: Any, hidden_states: Any) -> Any:
            """What the processor does to logits that the head might give."""
            self._given = logits
            try:
                return self.forward(lm_head, hidden_states)
            finally:
                self._given = None

        def _apply_head(self, lm_head: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                return self._given
            if self._served is not None:
                logits = self._served.logits(self, lm_head, hidden_states, *args, **kwargs)
                if logits is not None:
                    return logits
            return super()._apply_head(lm_head, hidden_states, *args, **kwargs)

    LogitsProcessor._apply_head  # noqa: B018  # AttributeError if vLLM lacks it
    LogitsProcessor.register_oot(FlashHeadLogitsProcessor)


def _register_head() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )

    class FlashHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
        def __init__(self, heads: list[ServedHead]) -> None:
            super().__init__()
            self._heads = heads

        def process_weights_after_loading(self, layer: Any) -> None:
            super().process_weights_after_loading(layer)
            for head in self._heads:
                head.build(layer)

    class FlashHeadLMHead(ParallelLMHead):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            heads = _current(_heads_of_layer)
            method = getattr(self, "quant_method", None)
            if heads and type(method) is UnquantizedEmbeddingMethod:
                self.quant_method = FlashHeadMethod(heads)

    ParallelLMHead.register_oot(FlashHeadLMHead)
