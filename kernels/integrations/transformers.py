"""FlashHead as the output head of a model of Hugging Face transformers.

Usage:
    flashtune.apply(model, assets="path/to/flash-head-model")
    flashtune.apply(model, screen="int4")      # any model, without clusters
    flashtune.apply(model, assets="…", prepare=(1, 8))    # kernels for 1 and 8 sequences, now
    model.generate(…)          # greedy or sampled, with any cache, compiled or not
    flashtune.remove(model)    # the dense head is back

Nothing of transformers is imported: a model is whatever has its output head behind
`get_output_embeddings` and `set_output_embeddings`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashtune.kernels.formats.screen import Screen, screen_of
from flashtune.kernels.head import TUNE, FlashHead
from flashtune.kernels.integrations.flash_linear import LOG, FlashLinear, made_of
from flashtune.kernels.integrations.folder_head import flash_head_of
from flashtune.kernels.integrations.generation import Generation
from flashtune.kernels.integrations.model_logits import ModelLogits
from flashtune.kernels.model_folder.folder import END_KEY, ModelFolder, end_tokens
from flashtune.tuning_db.environment import flash_head_always
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import DEFAULT_PROBES, IN_PLACE, MOST_TOKENS

_SAMPLED_ROWS = 64  # of a weight, to identify it

Clusters = tuple[torch.Tensor, torch.Tensor]


def apply(
    model: Any,
    head: FlashHead | Clusters | None = None,
    *,
    assets: str | Path | None = None,
    n_probes: int | None = None,
    screen: Screen | str | None = None,
    rows: str | None = None,
    always: bool = False,
    tune: str | None = None,
    prepare: Sequence[int] = (),
) -> FlashHead:
    """Let a model decode with FlashHead.

    The first time that a number of rows decodes, FlashHead is timed against the dense head, which
    answers if it is as fast. The dense weight stays, tied to the embedding or not, so memory grows
    by a permuted copy of it and the centroids; with a screen by the screen alone, with rows in
    place by little more than the centroids. Apply it when the weights are final and where they
    will be used.

    Args:
        model: A causal language model of transformers.
        head: Instead of assets, a FlashHead made of this model's output head, or centroids
            `[n_clusters, hidden]` and the cluster of each token `[vocab]`.
        assets: A FlashHead model folder, as `flashtune cluster` writes it, or its name in Hugging
            Face's cache; only the clusters are read from it.
        n_probes: Default: the folder's; 256 for tensors.
        screen: Of rows and centroids in 8 or 4 bits (docs/formats.md). Default: the folder's, and
            none for tensors. Without head and assets, the screen of the whole vocabulary.
        rows: `in_place` reads the rows in the model's weight, `in_order` in a copy. Default: as
            the folder's config says, else in place if memory is short.
        always: Use FlashHead even where the dense head is as fast; so does
            FLASHHEAD_ENABLED=always.
        tune: As for FlashHead; default: `race`.
        prepare: Numbers of sequences, from 1 to 32, whose kernels are chosen and compiled now.
            Otherwise the first step with each number does so, which can take 20 seconds.

    Returns:
        The FlashHead, to `explain` or `prepare`. The end tokens of the model, or of the folder's
        config, are candidates in every step.

    Raises:
        FlashtuneError: With the model unchanged, if its head is not a plain linear layer
            (quantised, wrapped by an adapter, split over devices, with a bias) or if the model
            caps its logits. To find that out the model is run on one token.
    """
    dense = _dense_head(model)
    screened = screen_of(screen)
    for number in prepare:
        if type(number) is not int or not 1 <= number <= MOST_TOKENS:
            raise FlashtuneError(
                f"prepare must be a list of batch sizes from 1 to {MOST_TOKENS}, not {number!r}"
            )
    if head is None and assets is None and screened:
        if rows == IN_PLACE:
            raise FlashtuneError(
                "a head without clusters reads its screen, not the model's rows: leave out rows"
            )
        # Its logits contain no fill
        head = FlashHead.screened(dense.weight, screened, tune=tune or TUNE[0])
    else:
        _check_logits(model, dense)
        head = _made(model, dense.weight, head, assets, n_probes, screen, rows, tune)
    head.prepare(*prepare, epilogue="logits")
    linear = FlashLinear(dense, head, always=always or flash_head_always())
    _replace(model, dense, linear)
    if hasattr(model, "generate"):
        model.generate = Generation(model, linear)
    return head


def _made(
    model: Any,
    weight: torch.Tensor,
    head: FlashHead | Clusters | None,
    assets: str | Path | None,
    n_probes: int | None,
    screen: Screen | str | None,
    rows: str | None,
    tune: str | None,
) -> FlashHead:
    """The given FlashHead, or one made from the given clusters."""
    if (head is None) == (assets is None):
        raise FlashtuneError("give either head or assets, or a screen without both")
    if assets is not None:
        folder, mode = ModelFolder.open(assets), tune or TUNE[0]
        return flash_head_of(folder, weight, n_probes, screen, rows, mode)
    if isinstance(head, FlashHead):
        for name, wanted, found in (
            ("n_probes", n_probes, head.n_probes),
            ("screen", screen and screen_of(screen), head.screen),
            ("rows", rows, head.rows),
            ("tune", tune, head.tune),
        ):
            if wanted is not None and wanted != found:
                raise FlashtuneError(
                    f"{name} {wanted} differs from the FlashHead's {found}: give it where the "
                    "FlashHead is made"
                )
        _check_same(head, weight)
        return head
    assert head is not None
    centroids, assignments = head
    return FlashHead(
        weight,
        centroids.to(weight),
        assignments,
        n_probes=DEFAULT_PROBES if n_probes is None else n_probes,
        special_token_ids=_end_tokens(model, len(weight)),
        screen=screen,
        rows=rows,
        tune=tune or TUNE[0],
    )


def _end_tokens(model: Any, vocab_size: int) -> list[int]:
    """The model's end-of-text tokens, from its config and its generation config."""
    config = getattr(model, "config", None)
    places = (
        config,
        getattr(config, "text_config", None),
        getattr(model, "generation_config", None),
    )
    return end_tokens((getattr(each, END_KEY, None) for each in places), vocab_size)


def remove(model: Any) -> None:
    """Give a model its dense head back.

    Raises:
        FlashtuneError: If no FlashHead is applied to the model.
    """
    applied = model.get_output_embeddings()
    model.__dict__.pop("generate", None)
    if not isinstance(applied, FlashLinear):
        raise FlashtuneError(
            "no FlashHead is applied to this model, so there is nothing to remove"
        )
    rows, width = applied.weight.shape
    dense = nn.Linear(width, rows, bias=False, device="meta").train(applied.training)
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
    """The model's output head; FlashtuneError says why FlashHead cannot replace it."""
    find = getattr(model, "get_output_embeddings", None)
    dense = find() if find else None
    if dense is None:
        raise FlashtuneError(
            f"{type(model).__name__} has no output head: give a causal language model"
        )
    if isinstance(dense, FlashLinear):
        raise FlashtuneError("a FlashHead is already applied: call flashtune.remove(model) first")
    kind = f"{type(dense).__module__}.{type(dense).__qualname__}"
    if type(dense) is not nn.Linear:  # a subclass computes something else
        raise FlashtuneError(
            f"the output head is a {kind}, not torch.nn.Linear: merge adapters first "
            "(merge_and_unload), or load the model with its head unquantised"
        )
    stored = type(dense.weight.data)
    if stored is not torch.Tensor or dense.weight.is_meta or hasattr(dense, "_hf_hook"):
        raise FlashtuneError(
            f"the output head's weight is a {stored.__name__} on "
            f"{dense.weight.device}(quantised, offloaded or split over devices): load the whole "
            "model, unquantised, on one device"
        )
    if dense.bias is not None:
        raise FlashtuneError("the output head has a bias, which FlashHead does not add")
    return dense


def _check_logits(model: Any, dense: nn.Linear) -> None:
    """Raise FlashtuneError if the model changes its logits so that the fill would show."""
    try:
        why = ModelLogits(model, dense).why_not_filled()
    except Exception as error:  # a model's forward can raise anything
        LOG.warning(
            "FlashHead: %s could not be run on one token (%s), so it was not checked whether it "
            "caps its logits, which would bring the fill of other tokens close to the "
            "candidates' logits",
            type(model).__name__,
            " ".join(f"{type(error).__name__}: {error}".split())[:200],
        )
        return
    if why:
        raise FlashtuneError(why)


def _check_same(head: FlashHead, weight: torch.Tensor) -> None:
    """Raise FlashtuneError unless the FlashHead appears to be made from this weight."""
    shape = [head.vocab_size, head.like.shape[1]]
    if shape != list(weight.shape):
        raise FlashtuneError(
            f"the FlashHead is {shape[0]}x{shape[1]} (vocabulary x hidden size), the model's "
            f"output head {weight.shape[0]}x{weight.shape[1]}: use one made for this model"
        )
    for name in ("device", "dtype"):
        if getattr(head.like, name) != getattr(weight, name):
            raise FlashtuneError(
                f"the FlashHead's {name} is {getattr(head.like, name)}, the model's "
                f"{getattr(weight, name)}: convert one with `.to`"
            )
    if not made_of(head, weight, _SAMPLED_ROWS):
        raise FlashtuneError(
            "the FlashHead's weight is not the model's: it is from another model, or was made "
            "with release_weight, which takes over the model's weight"
        )
