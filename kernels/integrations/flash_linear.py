"""A linear layer that decodes with FlashHead and acts as the dense layer for everything else.

Usage:
    linear = FlashLinear(dense, head)
    linear(hidden)                   # [..., vocab]
    with linear.every_token(): …     # the dense layer's logits, whatever the shape
"""

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flashtune.kernels.head import FlashHead
from flashtune.kernels.measure.contest import Verdict, contest
from flashtune.kernels.weights import rows_at_once
from flashtune.tuning_db.problem import MOST_TOKENS

LOG = logging.getLogger("flashtune")
_SAMPLED = 256  # values
_LINEARS: "weakref.WeakValueDictionary[int, FlashLinear]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()
_DEMANDS = threading.Lock()
os.register_at_fork(
    before=_DEMANDS.acquire, after_in_parent=_DEMANDS.release, after_in_child=_DEMANDS.release
)

Identity = tuple[Callable[[], torch.Tensor | None], int | None]
_NOTHING: Identity = (lambda: None, None)  # the identity of no weight


def made_of(head: FlashHead, weight: torch.Tensor, most_rows: int | None = None) -> bool:
    """Whether a FlashHead has the rows of this weight; checks so many, evenly spaced, or all.

    A screen has them if every number is within its packing error.
    """
    like = head.like
    if [head.vocab_size, like.shape[1]] != list(weight.shape):
        return False
    if (like.device, like.dtype) != (weight.device, weight.dtype):
        return False
    step = 1 if most_rows is None else max(1, len(head.ids) // most_rows)
    weights, problem = head.decoder.weights, head.problem
    model = weights.model_weight
    copied = model is not None and model.data_ptr() != weight.data_ptr()
    with torch.no_grad():
        at_once = rows_at_once(weight.shape[1]) * step
        for first in range(0, len(head.ids), at_once):
            part = slice(first, first + at_once, step)
            ids = head.ids[part].long()
            own = weight[ids]
            if not weights.holds(problem, part, own):
                return False
            if model is not None and copied and not torch.equal(model[ids], own):
                return False
    return True


@dataclass(frozen=True, slots=True)
class _Sample:
    """A few values of a weight, evenly spaced."""

    places: torch.Tensor
    values: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: torch.Tensor) -> "_Sample":
        with torch.no_grad():
            last = max(0, weight.numel() - 1)
            places = torch.linspace(0, last, _SAMPLED, dtype=torch.float64, device="cpu").long()
            places = places.to(weight.device)
            return cls(places, torch.take(weight, places), weight.shape)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether the weight still has these values."""
        alike = (weight.shape, weight.dtype, weight.device)
        if alike != (self.shape, self.values.dtype, self.values.device):
            return False
        with torch.no_grad():
            return torch.equal(torch.take(weight, self.places), self.values)


class FlashLinear(nn.Linear):
    """A dense head's weight, and a FlashHead that replaces it whenever a model decodes.

    hidden `[…, hidden]` to logits `[…, vocab]`, those of FlashHead.logits, if there is one
    position a sequence, of at most MOST_TOKENS sequences, and no gradient is asked for. All other
    calls use the weight: scoring and training read logits of every token, at every position.

    So do calls that FlashHead would not speed up: the first time that a number of rows decodes,
    FlashHead is timed against the dense layer (`verdicts`), which answers if it is as fast.

    FlashHead holds a copy of the weight, a screen made from it, or marks of its rows. If the
    weight is replaced or its values change, the dense layer answers, with one warning, until the
    old values are back: a copy made from new values would still have the clusters of the old ones.
    """

    def __init__(self, dense: nn.Linear, head: FlashHead, *, always: bool = False) -> None:
        """Share the weight with `dense`; the state dict stays what it was.

        always: FlashHead answers even if it is not faster.
        """
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.weight = dense.weight
        self.head = head
        self.always = always
        self.train(dense.training)
        self._warned: set[str] = set()
        self._start()
        self._trust()

    def _start(self) -> None:
        """Set up the state that copies and pickles leave out."""
        self._demands = 0
        self.verdicts: dict[int, Verdict] = {}  # by the rows of a step
        self._same = True
        self._compared = _NOTHING
        self._sample = _Sample.of(self.weight)
        self._handle = next(_HANDLES)
        _LINEARS[self._handle] = self

    def __getstate__(self) -> dict[str, Any]:
        """The layer without the state that belongs to one process."""
        dropped = ("_demands", "verdicts", "_same", "_compared", "_sample", "_handle")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the layer and compare it again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def _apply(self, fn: Any, recurse: bool = True) -> "FlashLinear":
        """Move or convert weight and FlashHead alike, and compare them again.

        The weight goes first: a FlashHead that refers to it finds it converted.
        """
        referred = self.head.model_weight is self.weight
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        if referred and self.head.model_weight is not self.weight:
            self.head.refer_to(self.weight)
        if recurse:
            self.head._apply(fn)
        self._compared = _NOTHING
        return self

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of every row, in the weight's dtype."""
        if not self._decodes(hidden):
            if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
                self._notice()
            return super().forward(hidden)
        rows = hidden.flatten(0, -2)
        if torch.compiler.is_compiling():
            logits: torch.Tensor = _linear_op(rows, self.weight, self._handle)
        else:
            logits = self._answer(rows, self.head.logits)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def answer_compiled(self, hidden: torch.Tensor) -> torch.Tensor:
        """`forward` for rows that decode; compiled code runs it as one operator."""
        head = self.head
        whole = (head.like, head.vocab_size, head._handle)
        return self._answer(hidden, lambda rows: torch.ops.flashtune.logits(rows, *whole))

    def _answer(
        self, hidden: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Logits `[rows, vocab]` from FlashHead or from the dense layer."""
        if self._fresh() and self._is_faster(hidden):
            return decode(hidden)
        return self._dense(hidden)

    def _is_faster(self, hidden: torch.Tensor) -> bool:
        """Whether FlashHead answers for so many rows; decided on the first such call."""
        if self.always or not len(hidden):
            return True
        size = self.head.decoder.step_size(len(hidden))
        verdict = self.verdicts.get(size)
        if verdict is None:
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                return True  # nothing can be timed now
            verdict = contest(self.head.logits, self._dense, hidden)
            self.verdicts[size] = verdict
            LOG.info(
                "%s for %d rows: %s",
                "FlashHead" if verdict.wins else "the dense head, as FlashHead is not faster,",
                size,
                verdict.describe(),
            )
        return verdict.wins

    def _dense(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight)

    @contextmanager
    def every_token(self) -> Iterator[None]:
        """Let the dense layer answer."""
        with _DEMANDS:
            self._demands += 1
        try:
            yield
        finally:
            with _DEMANDS:
                self._demands -= 1

    def warn(self, trouble: str) -> None:
        """Warn once of each trouble."""
        if trouble not in self._warned:
            self._warned.add(trouble)
            LOG.warning("FlashHead: %s", trouble)

    def _decodes(self, hidden: torch.Tensor) -> bool:
        if self._demands:
            return False
        if torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            return False
        if hidden.dim() == 3:
            return hidden.shape[1] == 1 and hidden.shape[0] <= MOST_TOKENS
        return hidden.dim() == 2 and hidden.shape[0] <= MOST_TOKENS

    def _identity(self) -> Identity:
        """Changes with the parameter, and when operations of torch write to it."""
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        return weakref.ref(weight), version

    def _trust(self) -> None:
        """Record the current weight as the one FlashHead was made from, or differs from."""
        self._compared, self._sample = self._identity(), _Sample.of(self.weight)

    def _is_compared(self) -> bool:
        held, version = self._compared
        now, newer = self._identity()
        return held() is now() and version == newer

    def _fresh(self) -> bool:
        """Whether FlashHead has the weight's values, by a cheap check.

        After an operation on the weight all rows are compared. Changes that torch's version
        counter misses (`weight.data`, as when adapters are merged) show in a sample of values: at
        each call on a CPU, and wherever `_notice` is called.
        """
        if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._same  # nothing can be compared now
        if not self._is_compared():
            self._tell(made_of(self.head, self.weight))
            self._trust()
        elif self._same and self.weight.device.type == "cpu":
            self._notice()
        return self._same

    def _notice(self) -> None:
        """Compare a sample. This waits for a GPU, so use it only in calls that take long."""
        if not (self._same and self._is_compared()):
            return  # known to differ, or due for a full comparison
        if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if not self._sample.is_of(self.weight):
            self._tell(False)

    def _tell(self, same: bool) -> None:
        self._same = same
        if not same:
            self.warn(
                "the output head's weight has changed since FlashHead was made (loaded, "
                "resized, merged or trained), so the dense head answers: call "
                "flashtune.remove(model), then apply clusters of the present weight"
            )


@torch.library.custom_op("flashtune::linear", mutates_args=())
def _linear_op(hidden: torch.Tensor, weight: torch.Tensor, handle: int) -> torch.Tensor:
    """A layer's answer as one operator, which looks at the weight each time it runs."""
    return _LINEARS[handle].answer_compiled(hidden)


@_linear_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, handle: int) -> torch.Tensor:
    return weight.new_empty(hidden.shape[0], weight.shape[0])
