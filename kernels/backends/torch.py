"""Plain torch as a backend: the fallback on every device, and the only one without kernels.

Usage:
    step = TorchStep(problem)
    step(weights, hidden, out)
    decode(weights, hidden, n_probes=256)      # the token of each state
"""

from collections.abc import Callable, Sequence

import torch

from flashtune.kernels.backends.target import Target, no_energy
from flashtune.kernels.epilogues.epilogue import epilogue_of, new_out
from flashtune.kernels.formats.format import dtype_name
from flashtune.kernels.measure.timing import GraphTimer, Timer, WallTimer
from flashtune.kernels.measure.workload import Workload
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.weights import Step, Weights, filled_up
from flashtune.tuning_db.device import Device, Toolchain
from flashtune.tuning_db.problem import Problem

_ROWS_BYTES = 2**28  # of float32 rows that are gathered at once


class TorchStep:
    """Plain torch with the interface of a kernel's step. Can be captured."""

    def __init__(self, problem: Problem) -> None:
        """Nothing is computed yet."""
        self._problem = problem
        self._epilogue = epilogue_of(problem.epilogue)
        probed = min(problem.n_probes + problem.n_pinned, problem.n_clusters)
        row_bytes = 4 * problem.hidden_size
        self._probes_all = problem.n_probes == problem.n_clusters
        self._rows_at_once = max(1, _ROWS_BYTES // row_bytes)
        cluster_rows = 1 if self._probes_all else probed * problem.cluster_size
        self._tokens_at_once = max(1, _ROWS_BYTES // (row_bytes * cluster_rows))
        self._scored: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Decode `hidden` to `out`, a few tokens at a time to bound the memory.

        Computes in float32, whatever the caller's torch settings are.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            self._decode(weights, hidden, out)

    def _decode(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> None:
        at_once = self._tokens_at_once
        hidden = filled_up(hidden, out.shape[0])
        parts = zip(torch.split(hidden, at_once), torch.split(out, at_once), strict=True)
        for states, part in parts:
            if self._probes_all:
                ids, logits = self._every_row(weights, states)
            else:
                clusters = self._clusters(states.float() @ self._centroids(weights).T)
                ids, logits = self._candidates(weights, clusters, states)
            self._epilogue.combine(*self._decided(weights, ids, logits, states), part)

    def _centroids(self, weights: Weights) -> torch.Tensor:
        """The centroids as float32; on a CPU they are converted once, not at each call."""
        scored = self._scored
        if scored is not None and scored[0] is weights.centroids:
            return scored[1]
        found = weights.centroid_rows(self._problem, slice(None), torch.float32)
        if weights.centroids.device.type == "cpu":
            self._scored = (weights.centroids, found)
        return found

    def _clusters(self, scores: torch.Tensor) -> torch.Tensor:
        """The probed clusters of each token; a pinned one may be there twice."""
        n_pinned = self._problem.n_pinned
        best = torch.topk(scores, self._problem.n_probes, dim=1, sorted=False).indices
        if not n_pinned:
            return best
        pinned = torch.arange(n_pinned, device=scores.device).expand(len(scores), -1)
        return torch.cat([best, pinned], dim=1)

    def _every_row(
        self, weights: Weights, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_candidates` if every cluster is probed: no scores, and no rows are gathered."""
        states, n_rows = hidden.float(), weights.ids.numel()
        logits = [
            states @ weights.rows(self._problem, slice(first, last), torch.float32).T
            for first in range(0, n_rows, self._rows_at_once)
            for last in (min(first + self._rows_at_once, n_rows),)
        ]
        return weights.ids.expand(len(hidden), -1), torch.cat(logits, dim=1)

    def _candidates(
        self, weights: Weights, clusters: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and float32 logits of the probed clusters' rows, `[n_tokens, rows]` each."""
        size = self._problem.cluster_size
        places = torch.arange(size, device=clusters.device)
        which = (clusters[:, :, None] * size + places).flatten(1)
        rows = weights.rows(self._problem, which.flatten(), torch.float32)
        logits = torch.einsum("trh,th->tr", rows.view(*which.shape, -1), hidden.float())
        return weights.ids[which], logits

    def _decided(
        self, weights: Weights, ids: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and logits, the best ones' logits recomputed with the model's own rows.

        If tokens are wanted, only the best can win, so the epilogue gets no others. Rows of pinned
        clusters may occur twice, so as many more are decided: both copies of each are among them.
        """
        problem = self._problem
        if not problem.n_rescored:
            return ids, logits
        twice = 0 if self._probes_all else problem.n_pinned * problem.cluster_size
        n_rescored = min(problem.n_rescored + twice, logits.shape[1])
        assert weights.model_weight is not None
        best = torch.topk(logits, n_rescored, dim=1, sorted=False).indices
        tokens = ids.gather(1, best)
        rows = weights.model_weight[tokens.long()].float()
        own = torch.einsum("trh,th->tr", rows, hidden.float())
        if self._epilogue.best_only:
            return tokens, own
        return ids, logits.scatter(1, best, own)


def decode(
    weights: Weights, hidden: torch.Tensor, n_probes: int, epilogue: str = "argmax"
) -> torch.Tensor:
    """The output of a step with so many probes for hidden `[n_tokens, hidden]`.

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


class TorchBackend:
    """Any device, through torch's own operations."""

    def compile(self, candidate: Candidate, source: str | None = None) -> Sequence[KernelUse]:
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
    times_behind=False,
    describe=_describe,
    here=lambda: None,
    described=lambda: None,
    named=lambda name: None,
    toolchain=lambda: Toolchain(torch=torch.__version__),
    trouble=lambda: "plain torch has no configs to tune",
    unused=lambda: None,
    why_missing=lambda plan: None,
    times_alone=False,
    registered=False,
    compiles_elsewhere=False,
    bandwidth_sources=lambda device: (),
    probe=lambda device, where: None,
    conditions=lambda where: {},
    energy=no_energy,
)
