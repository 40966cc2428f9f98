"""A head's calls as torch operators, so that torch.compile traces each as one node.

Usage:
    handle = register(head)
    decode(hidden, handle)
    logits(hidden, head.like, head.vocab_size, handle)

Operators take only tensors and numbers, so a handle identifies the head.
"""

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from flashtune.kernels.runtime.decoder import Decoder
from flashtune.tuning_db.errors import FlashtuneError


class Head(Protocol):
    """An object with a decoder, which is replaced when the object is moved or converted."""

    @property
    def decoder(self) -> Decoder:
        """The current decoder."""


_HEADS: "WeakValueDictionary[int, Head]" = WeakValueDictionary()
_HANDLES = itertools.count()


def register(head: Head) -> int:
    """A handle for a head, valid as long as the head lives."""
    handle = next(_HANDLES)
    _HEADS[handle] = head
    return handle


def _decoder_of(handle: int) -> Decoder:
    head = _HEADS.get(handle)
    if head is None:
        raise FlashtuneError(
            "the FlashHead that was compiled no longer exists: compile the new one"
        )
    return head.decoder


@torch.library.custom_op("flashtune::decode", mutates_args=())
def decode(hidden: torch.Tensor, handle: int) -> torch.Tensor:
    """A head's decode as one operator."""
    return _decoder_of(handle).decode_compiled(hidden, "argmax")


@decode.register_fake
def _(hidden: torch.Tensor, handle: int) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


@torch.library.custom_op("flashtune::logits", mutates_args=())
def logits(hidden: torch.Tensor, like: torch.Tensor, vocab_size: int, handle: int) -> torch.Tensor:
    """A head's logits as one operator; `like` tells tracers the dtype."""
    return _decoder_of(handle).decode_compiled(hidden, "logits")


@logits.register_fake
def _(hidden: torch.Tensor, like: torch.Tensor, vocab_size: int, handle: int) -> torch.Tensor:
    return like.new_empty(hidden.shape[0], vocab_size)
