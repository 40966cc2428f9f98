"""Plain torch as a backend: the fallback on every device, and all there is without kernels.

Usage:
    step = TorchStep(problem)
    step(weights, hidden, out)
    decode(weights, hidden, n_probes=256)      # the token of each state
"""

from collections.abc import Callable, Sequence

import torch

from flashtune.kernels.backends.target import Target
from flashtune.kernels.epilogues.epilogue import epilogue_of, new_out
from flashtune.kernels.formats.format import dtype_name
from flashtune.kernels.measure.timing import GraphTimer, Timer, WallTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem

_ROWS_BYTES = 2**28  # of float32 rows that are gathered at once


class TorchStep:
    """Plain torch, called as a kernel's step is. Can be captured."""

    def __init__(self, problem: Problem) -> None:
        """Nothing is computed yet."""
        self._problem = problem
        self._epilogue = epilogue_of(problem.epilogue)
        row_bytes = 4 * problem.n_probes * problem.cluster_size * problem.hidden_size
        self._tokens_at_once = max(1, _ROWS_BYTES // row_bytes)
        self._scored: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Decode `hidden` to `out`, a few tokens at a time to bound the memory."""
        centroids, at_once = self._centroids(weights), self._tokens_at_once
        parts = zip(torch.split(hidden, at_once), torch.split(out, at_once), strict=True)
        for states, part in parts:
            ids, logits = _candidates(weights, centroids, states, self._problem.n_probes)
            self._epilogue.combine(ids, logits, part)

    def _centroids(self, weights: Weights) -> torch.Tensor:
        """The centroids as float32; on a CPU they are converted once, not at each call."""
        if weights.centroids.device.type != "cpu":
            return weights.centroids.float()
        scored = self._scored
        if scored is None or scored[0] is not weights.centroids:
            scored = self._scored = (weights.centroids, weights.centroids.float())
        return scored[1]


def decode(
    weights: Weights, hidden: torch.Tensor, n_probes: int, epilogue: str = "argmax"
) -> torch.Tensor:
    """What a step with so many probes writes for hidden `[n_tokens, hidden]`.

    Products are accumulated in float32; ties give the smallest id.
    """
    problem = Problem(
        vocab_size=weights.ids.numel(),
        hidden_size=hidden.shape[1],
        n_clusters=len(weights.centroids),
        n_probes=n_probes,
        n_tokens=len(hidden),
        weight_dtype=dtype_name(weights.weight),
        centroid_dtype=dtype_name(weights.centroids),
        epilogue=epilogue,
    )
    out = new_out(problem, hidden.device)
    TorchStep(problem)(weights, hidden, out)
    return out


def _candidates(
    weights: Weights, centroids: torch.Tensor, hidden: torch.Tensor, n_probes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and float32 logits of the probed clusters' rows, `[n_tokens, rows]` each."""
    n_clusters, width = centroids.shape
    state = hidden.float()
    clusters = torch.topk(state @ centroids.T, n_probes, dim=1, sorted=False).indices
    rows = weights.weight.view(n_clusters, -1, width)[clusters].flatten(1, 2)
    ids = weights.ids.view(n_clusters, -1)[clusters].flatten(1)
    return ids, torch.einsum("trh,th->tr", rows.float(), state)


class TorchBackend:
    """Any device, through torch's own operations."""

    def compile(self, candidate: Candidate) -> Sequence[KernelUse]:
        """Nothing has to be compiled."""
        return ()

    def loader(
        self, candidate: Candidate, torch_device: torch.device, source: str | None = None
    ) -> Callable[[], Step]:
        """Each call of the result makes a step."""
        return lambda: TorchStep(candidate.problem)


def _timer(step: Step, workload: Workload) -> Timer:
    timer = GraphTimer if workload.sets[0].weight.is_cuda else WallTimer
    return timer(step, workload)


def _describe(device: torch.device) -> Device:
    """A device without kernels of ours, as far as torch knows it."""
    return Device(
        name=device.type,
        title=f"plain torch on {device.type}",
        vendor=TORCH.name,
        arch=device.type,
        sm_count=1,
        memory_bandwidth=0.0,
        l2_bytes=0,
        clock_hz=0.0,
        source="torch",
    )


TORCH = Target(
    name="torch",
    lanes=1,
    plans=(FALLBACK,),
    starts=(),
    builders={FALLBACK.builder: TorchBackend},
    torch_device="cpu",
    default=lambda problem, device: FALLBACK.config(),
    baseline=lambda problem, device: FALLBACK.config(),
    timer=_timer,
    describe=_describe,
    here=lambda: None,
    described=lambda: None,
    named=lambda name: None,
    toolchain=lambda: Toolchain(torch=torch.__version__),
    trouble=lambda: "plain torch has nothing to be tuned",
    why_missing=lambda plan: None,
    times_alone=False,
    registered=False,
    compiles_elsewhere=False,
    bandwidth_sources=lambda device: (),
)
