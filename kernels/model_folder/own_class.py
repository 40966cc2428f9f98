"""What a model's own class says of its head, asked of an instance without data.

Usage:
    head = ask_model(folder)     # None if transformers is absent or does not know the model
    head.names                   # ("lm_head.weight", "transformer.wte.weight")

The class is transformers' own, an extra of this package; no third-party code is run. The instance
is on the meta device: it costs no memory, and importing transformers is most of its time.
"""

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashtune.tuning_db.errors import FlashtuneError

PREFIX = "FlashHead"  # of the architectures of FlashHead models


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnHead:
    """A model's output head: every name of its weight, its own first, then those it is tied to.

    prefix: of the names of the model without its head, which files may leave out.
    """

    names: tuple[str, ...]
    prefix: str
    has_bias: bool

    @property
    def tied(self) -> bool:
        """Whether an embedding holds the weight, too."""
        return len(self.names) > 1

    def find(self, stored: list[str]) -> str | None:
        """The stored tensor that is the weight: by its name, with the prefix or without.

        Some files have their own order of the parts before the module's name
        (`language_model.model.embed_tokens`), so that a name's end will do if it is unique.
        """
        for name in self.names:
            for spelling in (name, name.removeprefix(self.prefix), self.prefix + name):
                if spelling in stored:
                    return spelling
        for name in self.names:
            end = ".".join(name.split(".")[-2:])
            alike = [each for each in stored if each == end or each.endswith("." + end)]
            if len(alike) == 1:
                return alike[0]
        return None


def ask_model(folder: Path) -> OwnHead | None:
    """The head of the model whose config is in `folder`.

    Raises FlashtuneError if the model's class has no output head.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = _instance(folder)
            head = model.get_output_embeddings()
    except Exception:  # not installed, of another version, remote code, a config of no model
        return None
    weight = getattr(head, "weight", None)
    if weight is None:
        raise FlashtuneError(
            f"{folder}: {type(model).__name__} has no output head: give a causal language model"
        )
    own = [f"{name}.weight" for name, each in model.named_modules() if each is head]
    every = model.named_parameters(remove_duplicate=False)
    alike = [name for name, each in every if each is weight]
    return OwnHead(
        names=tuple(dict.fromkeys([*own, *alike])),
        prefix=f"{model.base_model_prefix}.",
        has_bias=getattr(head, "bias", None) is not None,
    )


def _instance(folder: Path) -> Any:
    """The model of the architecture that the config names, else of a matching task."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = "eager"  # not the kernels of somebody on the Hub
    for name in config.architectures or ():
        own = getattr(transformers, str(name).removeprefix(PREFIX), None)
        if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
            return own(config)
    for task in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        with contextlib.suppress(ValueError):  # no model of this config for that task
            return getattr(transformers, f"AutoModelFor{task}").from_config(config)
    raise ValueError(f"{folder}: no model with an output head")
