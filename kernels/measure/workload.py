"""The inputs on which a candidate is verified and timed: random ones, or a head's own weights.

Usage:
    workload = Workload.create(problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=1)
    workload = Workload.around(weights, problem, cold_bytes, free_bytes=room, seed=1)
    workload.why_wrong(step, slack=16)     # None, or why what the step writes is not right
"""

from dataclasses import dataclass, field, replace

import torch

from flashtune.kernels.epilogues.epilogue import poisoned_out
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.measure.judge import Judge
from flashtune.kernels.weights import Step, Weights, packed, stored_weights
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

N_CHECKS = 4
_ROWS_AT_ONCE = 2**14  # that are made at a time
_JUDGED_ROWS = 4096  # that the judge has in float64 at a time
_JUDGED_NUMBERS = 8  # that it has of every row besides, in float64
_STATE_BYTES = 8  # of a number of a state while it is made: in float32 twice


@dataclass(frozen=True, slots=True)
class Workload:
    """Weights and hidden states of one problem.

    `sets` are copies of the centroids with the shared weight, together larger than the cache, so
    that they do not stay in it; `states` are one hidden state `[n_tokens, hidden]` a set. `checks`
    are further states: random ones, one whose best token stands in the last cluster that must be
    probed, and one with a better token in a cluster that must not be. A head's own weights are
    left as they are: their checks are random states, and states near a centroid. most_bytes: what
    it takes beyond the weights to verify and time on these, the copies included, if known.
    """

    problem: Problem
    sets: tuple[Weights, ...]
    states: tuple[torch.Tensor, ...]
    checks: tuple[torch.Tensor, ...]
    most_bytes: int = 0
    _right: dict[tuple[int, bool, tuple[int, ...]], int] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def create(
        cls, problem: Problem, device: torch.device, cold_bytes: int, seed: int
    ) -> "Workload":
        """Random weights and unit centroids; at least two sets, more until `cold_bytes` x 2."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (problem.vocab_size, problem.hidden_size)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        dtype = format_of(problem.state_dtype).torch_dtype
        model = torch.empty(shape, dtype=dtype, device=device)
        for rows in torch.split(model, _ROWS_AT_ONCE):
            rows.copy_(normal(*rows.shape))
        centroids = torch.nn.functional.normalize(normal(problem.n_clusters, shape[1]), dim=1)
        scored = packed(problem.centroid_dtype, centroids)
        order = torch.randperm(problem.vocab_size, generator=generator, device=device)
        ids = order.view(problem.n_clusters, -1).sort(dim=1).values.flatten()
        weights = stored_weights(problem, model, scored, ids)

        n_sets = _sets_for(problem, cold_bytes)
        sets = tuple(replace(weights, centroids=weights.centroids.clone()) for _ in range(n_sets))
        states = [normal(problem.n_tokens, shape[1]).to(dtype) for _ in range(n_sets + N_CHECKS)]
        workload = cls(problem, sets, tuple(states[:n_sets]), tuple(states[n_sets:]))
        workload._plant(workload.checks[1], problem.n_probes - 1)
        workload._plant(workload.checks[2], problem.n_clusters - 1)
        return workload

    @classmethod
    def around(
        cls,
        weights: Weights,
        problem: Problem,
        cold_bytes: int,
        *,
        free_bytes: int,
        step_bytes: int = 0,
        seed: int,
    ) -> "Workload":
        """A head's own weights with fresh hidden states.

        Sets have copies of the centroids if these, the judge and the memory of steps and their
        timers (step_bytes) fit in half of `free_bytes`; else all share the head's own, which are
        in the cache while kernels are timed. Raises FlashtuneError if even the rest does not fit.
        """
        where = weights.weight.device
        generator = torch.Generator(where).manual_seed(seed)
        judged = 3 * problem.hidden_size * _JUDGED_ROWS + _JUDGED_NUMBERS * problem.vocab_size
        n_sets = _sets_for(problem, cold_bytes)
        shape = problem.n_tokens, problem.hidden_size
        own = _STATE_BYTES * (n_sets + 2) * problem.n_tokens * problem.hidden_size
        needed = step_bytes + 8 * judged + own
        if needed > free_bytes / 2:
            raise FlashtuneError(
                f"{free_bytes / 2**20:.0f} MiB are free on {where}, but verifying and timing "
                f"kernels takes {needed / 2**20:.0f}, and twice that must be free"
            )
        copies_bytes = (n_sets - 1) * problem.centroid_bytes
        copied = needed + copies_bytes <= free_bytes / 2
        copies = [
            replace(weights, centroids=weights.centroids.clone()) if copied else weights
            for _ in range(n_sets - 1)
        ]
        states = [
            torch.randn(*shape, generator=generator, device=where) / shape[1] ** 0.5
            for _ in range(n_sets + 2)
        ]
        near = torch.randint(problem.n_clusters, shape[:1], generator=generator, device=where)
        states[-1] = weights.centroid_rows(problem, near, torch.float32) + states[-1] / 2
        dtype = format_of(problem.state_dtype).torch_dtype
        typed = tuple(each.to(dtype) for each in states)
        return cls(
            problem,
            (weights, *copies),
            typed[:n_sets],
            typed[n_sets:],
            most_bytes=needed + (copies_bytes if copied else 0),
        )

    @property
    def is_cold(self) -> bool:
        """Whether sets have their own centroids, so that none are in the cache."""
        return self.sets[0].centroids is not self.sets[-1].centroids

    def _plant(self, states: torch.Tensor, rank: int) -> None:
        """Put the best token of each row in its cluster of that rank, counted from 0."""
        weights, problem = self.sets[0], self.problem
        centroids = weights.centroid_rows(problem, slice(None), torch.float32)
        for state in states.float():
            cluster = int((centroids @ state).argsort(descending=True)[rank])
            row = cluster * problem.cluster_size
            scale = 12 / float(state.norm())  # logits have the deviation |state|: 12 of them
            weights.put(problem, row, state * scale)

    def why_wrong(self, step: Step, slack: int, *, tensor_cores: bool = False) -> str | None:
        """None if the step's output is right for every check, twice each, else why not.

        slack: how many more clusters than requested it may probe. tensor_cores: whether they
        multiply, which cut instead of rounding. The output is poisoned before each call. Most
        configs give the same tokens, and an output that was right with little slack is right with
        more, so it is not judged again.
        """
        judge = Judge(self.sets[0], self.problem, tensor_cores=tensor_cores)
        for number, states in enumerate(self.checks):
            for _ in range(2):
                out = poisoned_out(self.problem, states.device)
                step(self.sets[0], states, out)
                tokens = () if out.is_floating_point() else tuple(out.tolist())
                answer = number, tensor_cores, tokens
                if tokens and self._right.get(answer, slack + 1) <= slack:
                    continue
                reason = judge.why_wrong(out, states, slack)
                if reason:
                    return f"check {number}, {reason}"
                self._right[answer] = slack
        return None


def _sets_for(problem: Problem, cold_bytes: int) -> int:
    """How many sets are larger than twice the cache; at least two."""
    whole = format_of(problem.weight_dtype).bytes_of(problem.vocab_size, problem.hidden_size)
    a_set = min(problem.read_bytes, whole)
    return max(2, -(-2 * cold_bytes // a_set) + 1)
