"""FlashHead as the output head of a model of Hugging Face transformers.

Usage:
    flashtune.apply(model, assets="path/to/flash-head-model")
    model.generate(…)          # greedy or sampled, with any cache, compiled or not
    flashtune.remove(model)    # the dense head is back

Nothing of transformers is imported: a model is whatever has its output head behind
`get_output_embeddings` and `set_output_embeddings`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashtune.kernels.head import FlashHead
from flashtune.kernels.integrations.folder_head import flash_head_of
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.runtime.decoder import MOST_TOKENS
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DEFAULT_PROBES

_SAMPLED_ROWS = 64  # of a weight, to tell whose it is

Clusters = tuple[torch.Tensor, torch.Tensor]


class FlashLinear(nn.Linear):
    """A dense head's weight, and a FlashHead that takes its place wherever a model decodes.

    hidden `[…, hidden]` to logits `[…, vocab]`, those of FlashHead.logits, if there is one
    position a sequence, of at most MOST_TOKENS sequences, and no gradient is asked for. All else
    goes through the weight: scoring and training read logits of every token, at every position.
    """

    def __init__(self, dense: nn.Linear, head: FlashHead) -> None:
        """Share the weight with `dense`; the state dict stays what it was."""
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.weight = dense.weight
        self.head = head
        self.train(dense.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of every row, in the weight's dtype."""
        if not self._decodes(hidden):
            return super().forward(hidden)
        logits = self.head.logits(hidden.flatten(0, -2))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def _decodes(self, hidden: torch.Tensor) -> bool:
        if torch.is_grad_enabled() and hidden.requires_grad:
            return False
        if hidden.dim() == 3:
            return hidden.shape[1] == 1 and hidden.shape[0] <= MOST_TOKENS
        return hidden.dim() == 2 and hidden.shape[0] <= MOST_TOKENS


def apply(
    model: Any,
    head: FlashHead | Clusters | None = None,
    *,
    assets: str | Path | None = None,
    n_probes: int | None = None,
) -> FlashHead:
    """Let a model decode with FlashHead, and return the FlashHead, to `explain` or `prepare`.

    assets: a FlashHead model folder, as `flashtune cluster` writes it, or its name in Hugging
    Face's cache, of which only the clusters are read. Instead of it, head: a FlashHead made of
    this model's output head, or centroids `[n_clusters, hidden]` and the cluster of each token
    `[vocab]`. n_probes: unless given, as the folder's config says, and 256 for tensors.

    The dense weight stays, tied to the embedding or not, so that memory grows by a permuted copy
    of it and the centroids. Apply it once the weights are final and where they will be used.
    Raises FlashtuneError, with the model as it was, for a head that is not a plain linear layer:
    quantised, wrapped by an adapter, split over devices, with a bias or a soft cap.
    """
    dense = _dense_head(model)
    if (head is None) == (assets is None):
        raise FlashtuneError("give just one of head and assets")
    if isinstance(head, FlashHead):
        if n_probes not in (None, head.n_probes):
            raise FlashtuneError(
                f"n_probes {n_probes} is not the FlashHead's {head.n_probes}: give it where the "
                "FlashHead is made"
            )
        _check_same(head, dense.weight)
    elif assets is not None:
        head = flash_head_of(ModelFolder.open(assets), dense.weight, n_probes)
    else:
        assert head is not None
        centroids, assignments = head
        probes = DEFAULT_PROBES if n_probes is None else n_probes
        head = FlashHead(dense.weight, centroids.to(dense.weight), assignments, n_probes=probes)
    _replace(model, dense, FlashLinear(dense, head))
    return head


def remove(model: Any) -> None:
    """Give the model its dense head back. Raises FlashtuneError where there is no FlashHead."""
    applied = model.get_output_embeddings()
    if not isinstance(applied, FlashLinear):
        raise FlashtuneError("no FlashHead is applied to this model: there is nothing to remove")
    size = (applied.in_features, applied.out_features)
    dense = nn.Linear(*size, bias=False, device="meta").train(applied.training)
    dense.weight = applied.weight
    _replace(model, applied, dense)


def _replace(model: Any, before: nn.Module, after: nn.Module) -> None:
    model.set_output_embeddings(after)
    if model.get_output_embeddings() is not after:
        model.set_output_embeddings(before)
        raise FlashtuneError(
            f"{type(model).__name__}.set_output_embeddings does not set its output head: "
            "such a model needs its own integration"
        )


def _dense_head(model: Any) -> nn.Linear:
    """The model's output head; FlashtuneError says why it is none that FlashHead can replace."""
    find = getattr(model, "get_output_embeddings", None)
    dense = find() if find else None
    if dense is None:
        raise FlashtuneError(
            f"{type(model).__name__} has no output head: give a causal language model"
        )
    if isinstance(dense, FlashLinear):
        raise FlashtuneError("a FlashHead is applied already: flashtune.remove(model) first")
    kind = f"{type(dense).__module__}.{type(dense).__qualname__}"
    if type(dense) is not nn.Linear:  # a subclass computes something else
        raise FlashtuneError(
            f"the output head is a {kind}, not torch.nn.Linear: merge adapters first "
            "(merge_and_unload), or load the model with its head unquantised"
        )
    stored = type(dense.weight.data)
    if stored is not torch.Tensor or dense.weight.is_meta or hasattr(dense, "_hf_hook"):
        raise FlashtuneError(
            f"the output head's weight is a {stored.__name__} on {dense.weight.device}, "
            "quantised, offloaded or split over devices: load all of the model on one device"
        )
    if dense.bias is not None:
        raise FlashtuneError("the output head has a bias, which FlashHead does not add")
    cap = getattr(_text_config(model), "final_logit_softcapping", None)
    if cap is not None:
        raise FlashtuneError(
            f"the model caps its logits softly at {cap} (final_logit_softcapping), and the fill "
            "of tokens that are no candidates would come too near to theirs"
        )
    return dense


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return find() if find else config


def _check_same(head: FlashHead, weight: torch.Tensor) -> None:
    """Raise FlashtuneError unless the FlashHead was made of this weight, by its looks."""
    shape = [head.vocab_size, head.centroids.shape[1]]
    if shape != list(weight.shape):
        raise FlashtuneError(
            f"the FlashHead is {shape[0]}x{shape[1]} (vocabulary x hidden size), the model's "
            f"output head {weight.shape[0]}x{weight.shape[1]}: it is of another model"
        )
    for name in ("device", "dtype"):
        if getattr(head.weight, name) != getattr(weight, name):
            raise FlashtuneError(
                f"the FlashHead's {name} is {getattr(head.weight, name)}, the model's "
                f"{getattr(weight, name)}: convert one with `.to`"
            )
    step = max(1, len(weight) // _SAMPLED_ROWS)
    if not torch.equal(head.weight[::step], weight[head.ids[::step].long()]):
        raise FlashtuneError(
            "the FlashHead's weight is not the model's: it is of another model, or was made with "
            "release_weight, which takes the model's own"
        )
