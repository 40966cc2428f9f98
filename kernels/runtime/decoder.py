"""What a head's calls run: the current tensors, with the steps made for them.

Usage:
    decoder = Decoder(weights, like, problem, vocab_size=151936, allowance=allowance)
    token = decoder.decode(hidden, "argmax")     # or "logits"
    decoder.bound("argmax", 1).choice            # what runs for one token

A step is made on the first call with a combination of epilogue, number of tokens and stream, and
kept. If a call fails, plain torch answers it. A decoder's tensors never change: a head that is
moved or converted takes a new decoder, so a call in another thread uses either the old tensors
with their steps or the new ones with theirs, never a mixture.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flashtune.kernels.backends.torch import TorchStep
from flashtune.kernels.runtime.binding import LOG, Bound, bind, give_up
from flashtune.kernels.runtime.choice import Level
from flashtune.kernels.runtime.race import MOST_SECONDS, UNKEPT
from flashtune.kernels.runtime.trouble import is_of_a_signal
from flashtune.kernels.weights import ALIGNMENT, Step, Weights, aligned, checked_dense
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import MOST_TOKENS, Problem

SILENCE = 2.0  # seconds that a call may take without a message
StepKey = tuple[str, int, int]  # epilogue, tokens, stream
Shape = tuple[int, ...]
StepCall = tuple[Weights, torch.Tensor, torch.Tensor]


# The next power of two. A GPU runs the kernels for that many tokens and repeats the last row as
# padding, which costs it little; so a few kernels serve batches of any size. On a CPU the padding
# would cost time, so it runs kernels for the exact number.
ROUNDED = (0, *(1 << (number - 1).bit_length() for number in range(1, MOST_TOKENS + 1)))


@dataclass(slots=True)
class Allowance:
    """A budget shared by all decoders of a head: seconds of races, and one warning.

    race_seconds: seconds left; None if no race may be held. Code that makes a step or spends from
    this must hold the lock.
    """

    race_seconds: float | None
    warned: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def full(cls, may_race: bool) -> "Allowance":
        """The budget of a new head."""
        return cls(race_seconds=MOST_SECONDS if may_race else None)

    def warn(self, trouble: str) -> None:
        """Warn once per head: `explain` shows later trouble."""
        if not self.warned:
            self.warned = True
            LOG.warning("FlashHead: %s. See head.explain() for details", trouble)


def locked(step: Step) -> Step:
    """A kernel's step that threads may share: the launches of one call stay together.

    The lock guards its scratch as well.
    """
    lock = threading.Lock()
    run = step.__call__  # type: ignore[operator]  # looked up here, not at each call

    def run_alone(weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        with lock:
            run(weights, hidden, out)

    return run_alone


class Decoder:
    """Decodes with one set of tensors. Safe to call from several threads."""

    def __init__(
        self,
        weights: Weights,
        like: torch.Tensor,
        problem: Callable[[], Problem],
        *,
        vocab_size: int,
        allowance: Allowance,
    ) -> None:
        """Nothing is chosen or compiled yet.

        like: an empty tensor `[0, hidden]`, in the dtype of hidden states and logits. problem: of
        one token; it raises FlashtuneError, as every call then does, if that dtype is not
        supported. vocab_size: without the padding of clusters.
        """
        self.weights, self.like, self._posed = weights, like, problem
        self._vocab_size, self._allowance = vocab_size, allowance
        self._width, self._dtype, self._device = like.shape[1], like.dtype, like.device
        self._index = weights.weight.device.index if weights.weight.is_cuda else None
        self._step_sizes = ROUNDED if weights.weight.is_cuda else range(MOST_TOKENS + 1)
        self._empty = _allocator(like.device)
        self._n_rows = weights.ids.shape[0]
        self._bounds: dict[tuple[str, int], Bound] = {}
        self._steps: dict[StepKey, Step] = {}
        _DECODERS.add(self)

    def forget_steps(self) -> None:
        """Make steps again in a forked process.

        Another thread, which the fork did not copy, may have been in a call, with locks held and
        scratch half written.
        """
        self._steps = {}
        self._allowance.lock = threading.RLock()

    def decode(self, hidden: torch.Tensor, epilogue: str) -> torch.Tensor:
        """Tokens or logits for each row of hidden `[tokens, hidden_size]`; see FlashHead."""
        index = self._index
        hidden = checked_dense("hidden", hidden)
        shape = hidden.shape
        if len(shape) != 2 or shape[1] != self._width:
            raise FlashtuneError(
                f"hidden must be [tokens, {self._width}], not {list(shape)}: "
                "give hidden[None] for a single token, or flatten the leading dimensions"
            )
        if hidden.device != self._device:
            raise FlashtuneError(f"hidden is on {hidden.device}, the head on {self._device}")
        if hidden.dtype is not self._dtype or hidden.requires_grad:
            if not hidden.is_floating_point():
                raise FlashtuneError(f"hidden must be floating-point, not {hidden.dtype}")
            hidden = hidden.detach().to(self._dtype)
        if not hidden.is_contiguous() or hidden.data_ptr() % ALIGNMENT:
            hidden = aligned(hidden)
        stream = 0
        if index is not None:
            if torch._C._cuda_getDevice() != index:
                with torch.cuda.device(index):
                    return self.decode(hidden, epilogue)
            stream = torch._C._cuda_getCurrentRawStream(index)
        n_tokens = shape[0]
        if n_tokens <= MOST_TOKENS:
            rows = self._step_sizes[n_tokens]  # that steps write
        else:
            whole, rest = divmod(n_tokens, MOST_TOKENS)
            rows = whole * MOST_TOKENS + self._step_sizes[rest]
        if epilogue == "argmax":
            out = self._empty((rows,), (1,), torch.int64)
        else:
            out = self._empty((rows, self._n_rows), (self._n_rows, 1), self._dtype)
        if 0 < rows <= MOST_TOKENS:
            self._run(hidden, out, (epilogue, rows, stream))
        elif rows:
            parts = zip(
                torch.split(hidden, MOST_TOKENS), torch.split(out, MOST_TOKENS), strict=True
            )
            for states, part in parts:
                self._run(states, part, (epilogue, part.shape[0], stream))
        if rows != n_tokens:  # which costs the host less than half of what a slice does
            if epilogue == "argmax":
                out.resize_(n_tokens)
            else:
                out.resize_(n_tokens, self._n_rows)
        if epilogue == "logits" and out.shape[1] > self._vocab_size:
            return out[:, : self._vocab_size].contiguous()
        return out

    def _run(self, hidden: torch.Tensor, out: torch.Tensor, key: StepKey) -> None:
        """Write one step's tokens or logits."""
        step = self._steps.get(key) or self._step(*key)
        try:
            step(self.weights, hidden, out)
        except Exception as error:  # drivers raise various types at a launch
            self._rescue(step, key, (self.weights, hidden, out), error)

    def decode_compiled(self, hidden: torch.Tensor, epilogue: str) -> torch.Tensor:
        """`decode` for compiled code, whose CUDA graphs have a pool of memory of their own.

        Tensors made on first use outlive the call and must not be in that pool, so another thread
        makes them.
        """
        sizes = self.step_sizes(hidden.shape[0]) if hidden.shape[0] else []
        new = any((epilogue, size) not in self._bounds for size in sizes)
        if self._index is not None and new and not torch.cuda.is_current_stream_capturing():
            number = hidden.shape[0]
            with self._telling(epilogue, number), ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(self.prepare, number, epilogue).result()
        return self.decode(hidden, epilogue)

    def prepare(self, n_tokens: int, epilogue: str) -> None:
        """Prepare the steps of a call with so many tokens."""
        for size in self.step_sizes(n_tokens):
            self.bound(epilogue, size)

    def step_sizes(self, n_tokens: int) -> list[int]:
        """The distinct step sizes, in tokens, that a call with so many tokens needs.

        Raises FlashtuneError if the number of tokens is not valid.
        """
        if not isinstance(n_tokens, int) or n_tokens < 1:
            raise FlashtuneError(f"n_tokens must be a positive whole number, not {n_tokens!r}")
        whole, rest = divmod(n_tokens, MOST_TOKENS)
        sizes = [MOST_TOKENS] if whole else []
        return [*sizes, self.step_size(rest)] if rest else sizes

    def step_size(self, n_tokens: int) -> int:
        """The size of the step for so many tokens, which fit in one step."""
        return self._step_sizes[n_tokens]

    def bound(self, epilogue: str, n_tokens: int) -> Bound:
        """The kernels of a step for that many tokens, made on first use."""
        allowance, problem = self._allowance, self._problem(epilogue, n_tokens)
        with allowance.lock:
            bound = self._bounds.get((epilogue, n_tokens))
            if bound is None:
                with _lasting(self.weights.weight.device):
                    bound = bind(problem, self.weights, race_seconds=allowance.race_seconds)
                self._bounds[epilogue, n_tokens] = bound
                choice, race = bound.choice, bound.race
                why = choice.why
                if race is not None and allowance.race_seconds is not None:
                    allowance.race_seconds -= race.seconds
                    why += f" ({race.describe()})"
                LOG.info("%s runs %s: %s", problem.describe(), choice.level.value, why)
                if bound.troubles:
                    runs = "plain torch" if choice.level is Level.TORCH else choice.level.value
                    instead = "" if choice.source == UNKEPT else f" ({runs} is used instead)"
                    allowance.warn("; ".join(bound.troubles) + instead)
            return bound

    def _step(self, epilogue: str, n_tokens: int, stream: int) -> Step:
        """A step for a stream that has none yet."""
        key = (epilogue, n_tokens, stream)
        with self._allowance.lock:
            if key in self._steps:  # another thread was here first
                return self._steps[key]
            capturing = self._index is not None and torch.cuda.is_current_stream_capturing()
            bound = self._bounds.get((epilogue, n_tokens))
            ready = bound and (bound.spares or bound.choice.level is Level.TORCH)
            if capturing and not ready:
                arguments = f"{n_tokens}" if epilogue == "argmax" else f"{n_tokens}, {epilogue=}"
                self._allowance.warn(
                    f"{n_tokens} tokens are captured in a CUDA graph without a kernel ready for "
                    f"this stream: call head.prepare({arguments}) before the capture"
                )
                return self._torch_step(epilogue, n_tokens)
            with self._telling(epilogue, n_tokens):
                bound = self.bound(epilogue, n_tokens)
            with _lasting(self.weights.weight.device):
                step = bound.take_step()
            shared = step if isinstance(step, TorchStep) else locked(step)
            self._steps[key] = shared
            return shared

    @contextmanager
    def _telling(self, epilogue: str, n_tokens: int) -> Iterator[None]:
        """Log what a call is waiting for, after it has waited for a while.

        Nothing is wrong, but the user should see it: it is a warning if INFO is not shown.
        """
        seconds = self._allowance.race_seconds
        race = f", after racing several for up to {seconds:.0f} s" if seconds else ""
        how = f"{n_tokens}" if epilogue == "argmax" else f"{n_tokens}, {epilogue=}"
        text = (
            f"FlashHead: the first call with {n_tokens=} chooses and compiles its kernel"
            f"{race}; head.prepare({how}) does so ahead of time"
        )
        level = logging.INFO if LOG.isEnabledFor(logging.INFO) else logging.WARNING
        timer = threading.Timer(SILENCE, LOG.log, (level, text))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _rescue(self, step: Step, key: StepKey, call: StepCall, error: Exception) -> None:
        """Answer a failed call in plain torch and, if that works, all later calls too.

        If torch fails too, the kernel is not at fault, and the first error is raised. An error
        raised by a signal handler is raised as well.
        """
        epilogue, n_tokens, _ = key
        if isinstance(step, TorchStep) or is_of_a_signal(error):
            raise error
        try:
            self._torch_step(epilogue, n_tokens)(*call)
        except Exception:
            raise error from None
        with self._allowance.lock:
            bound = self._bounds[epilogue, n_tokens]
            give_up(bound, error)
            self._allowance.warn(f"{bound.troubles[-1]} (plain torch is used instead)")
            self._steps[key] = bound.take_step()

    def _torch_step(self, epilogue: str, n_tokens: int) -> TorchStep:
        return TorchStep(self._problem(epilogue, n_tokens))

    def _problem(self, epilogue: str, n_tokens: int) -> Problem:
        return replace(self._posed(), n_tokens=n_tokens, epilogue=epilogue)


def _allocator(device: torch.device) -> Callable[[Shape, Shape, torch.dtype], torch.Tensor]:
    """What makes a tensor of a shape, strides and dtype on the current device of this type.

    The one that torch's compiled code calls takes half as long as torch.empty_strided does.
    """
    try:
        found: Any = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}")
    except AttributeError:  # it is not part of torch's interface
        return lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device=device
        )
    return found  # type: ignore[no-any-return]


_DECODERS: "weakref.WeakSet[Decoder]" = weakref.WeakSet()


def _after_fork() -> None:
    for decoder in list(_DECODERS):
        decoder.forget_steps()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _lasting(device: torch.device) -> Iterator[None]:
    """Make tensors that outlive the call: on this device, and free of the caller's modes."""
    index = device.index if device.type == "cuda" else -1  # which changes nothing
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(index):
        yield
