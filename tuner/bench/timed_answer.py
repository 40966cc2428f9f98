"""A batch of answers with a model's current head: their tokens, and the times of the steps.

Usage:
    run = timed_answers(running, prompts, n_tokens=64)
    run.step_us, run.head_us, run.tokens

Steps count from the first token on: the prompt is left out. The head is timed within the same
steps, around its call. Medians count, because other load on the machine delays some steps a lot.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashtune.tuner.clustering.decode_state import RunningModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """tokens: int64 `[prompts, tokens]`; times are medians over the steps, in microseconds."""

    tokens: torch.Tensor
    step_us: float
    head_us: float


def timed_answers(running: RunningModel, prompts: Sequence[str], n_tokens: int) -> Run:
    """Continue each prompt greedily by n_tokens tokens, at least 2, past any end token."""
    model = running.model
    inputs = running.tokenized(prompts)
    stamps: list[float] = []

    def step_done(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    usual = model.generation_config
    model.generation_config = copy.deepcopy(usual)
    model.generation_config.eos_token_id = None
    clock = _HeadClock(model.get_output_embeddings(), cuda=model.device.type == "cuda")
    try:
        with clock, torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=n_tokens, stopping_criteria=[step_done])
    finally:
        model.generation_config = usual
    steps = n_tokens - 1
    return Run(
        tokens=out[:, inputs["input_ids"].shape[1] :].cpu(),
        step_us=statistics.median(b - a for a, b in itertools.pairwise(stamps)) * 1e6,
        head_us=statistics.median(clock.microseconds()[-steps:]),
    )


class _HeadClock:
    """The time of each call of a module; on a GPU by events, without waiting for it."""

    def __init__(self, module: torch.nn.Module, *, cuda: bool) -> None:
        """Nothing is timed until the context is entered."""
        self._module, self._cuda = module, cuda
        self._begun: list[Any] = []
        self._ended: list[Any] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "_HeadClock":
        self._hooks = [
            self._module.register_forward_pre_hook(self._noting(self._begun)),
            self._module.register_forward_hook(self._noting(self._ended)),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _noting(self, stamps: list[Any]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if not self._cuda:
                stamps.append(time.perf_counter())
                return
            stamps.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            stamps[-1].record()

        return note

    def microseconds(self) -> list[float]:
        """The time of each call, in order."""
        pairs = list(zip(self._begun, self._ended, strict=True))
        if self._cuda:
            torch.cuda.synchronize()
            return [begun.elapsed_time(ended) * 1e3 for begun, ended in pairs]
        return [(ended - begun) * 1e6 for begun, ended in pairs]
