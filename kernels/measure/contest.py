"""Whether a FlashHead is worth using: timed against the dense layer that it replaces.

Usage:
    verdict = contest(head.logits, dense, hidden)
    verdict.wins               # by more than the margin, including the host's time
    verdict.describe()         # '24.1 us against 55.3 us'

Both are called as a model calls them, in turns, so that each finds what the other left in the
caches. The dense layer's weight is larger than the caches, as a model's other layers are.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MARGIN = 0.97  # of the dense layer's time; a smaller gain may be noise
SECONDS = 0.5  # after which no further turn is taken
TURNS, LEAST_TURNS = 20, 3
_AHEAD = 4  # dense calls that keep a GPU busy while the host issues those that are timed

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Medians of both, in microseconds a call: on the device, and of the host's time to issue it.

    On a CPU, where the call is the work, the host's are 0.
    """

    head_us: float
    dense_us: float
    head_host_us: float = 0.0
    dense_host_us: float = 0.0

    @property
    def wins(self) -> bool:
        """Whether FlashHead should answer.

        Extra host time over the dense layer counts in full, as it does if a step waits for the
        host.
        """
        extra = max(0.0, self.head_host_us - self.dense_host_us)
        return self.head_us + extra < MARGIN * self.dense_us

    def describe(self) -> str:
        """Both times, in words."""
        text = f"{self.head_us:.1f} us against {self.dense_us:.1f} us"
        if self.head_host_us:
            text += f" (host: {self.head_host_us:.1f} us against {self.dense_host_us:.1f} us)"
        return text


def contest(head: Layer, dense: Layer, hidden: torch.Tensor) -> Verdict:
    """Time both on hidden `[tokens, hidden_size]`, `SECONDS` long or a few turns.

    Must not be called while the current stream is being captured. Lets the layers' exceptions
    through.
    """
    layers = (head, dense)
    with torch.no_grad():
        for layer in layers:  # the first calls may compile
            layer(hidden)
        times = _on_gpu(layers, hidden) if hidden.is_cuda else _on_cpu(layers, hidden)
        host = _host(layers, hidden) if hidden.is_cuda else (0.0, 0.0)
    return Verdict(*times, *host)


def _on_cpu(layers: tuple[Layer, Layer], hidden: torch.Tensor) -> tuple[float, float]:
    samples: tuple[list[float], list[float]] = ([], [])
    until = time.monotonic() + SECONDS
    for turn in range(TURNS):
        if turn >= LEAST_TURNS and time.monotonic() > until:
            break
        for layer, own in zip(layers, samples, strict=True):
            start = time.perf_counter()
            layer(hidden)
            own.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples[0]), statistics.median(samples[1])


def _on_gpu(layers: tuple[Layer, Layer], hidden: torch.Tensor) -> tuple[float, float]:
    dense = layers[1]
    events = []
    for _ in range(TURNS):
        for _ in range(_AHEAD):
            dense(hidden)
        for layer in layers:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            layer(hidden)
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(hidden.device)
    times = [1e3 * start.elapsed_time(end) for start, end in events]
    return statistics.median(times[::2]), statistics.median(times[1::2])


def _host(layers: tuple[Layer, Layer], hidden: torch.Tensor) -> tuple[float, float]:
    """Time a few calls at a time, which the launch queue takes without waiting for the GPU."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for layer, own in zip(layers, samples, strict=True):
            torch.cuda.synchronize(hidden.device)
            start = time.perf_counter()
            for _ in range(_AHEAD):
                layer(hidden)
            own.append(1e6 * (time.perf_counter() - start) / _AHEAD)
    return statistics.median(samples[0]), statistics.median(samples[1])
