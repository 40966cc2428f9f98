"""The inputs a candidate is verified and timed on, made fresh for a problem and a seed.

Usage:
    workload = Workload.create(problem, torch.device("cuda"), cold_bytes=device.l2_bytes, seed=1)
    workload.why_wrong(step, slack=16)     # None, or why what the step writes is not right
"""

from dataclasses import dataclass

import torch

from flashtune.kernels.layout import TORCH_DTYPES, Step, Weights, poisoned_out
from flashtune.kernels.reference import Judge
from flashtune.tuning_db.problem import Problem

N_CHECKS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Weights and hidden states of one problem.

    `sets` are copies of the centroids with the shared weight, together larger than the cache
    they must not lie in; `states` are one hidden state `[n_tokens, hidden]` a set. `checks` are
    further states: random ones, one whose best token stands in the last cluster that must be
    probed, and one with a better token in a cluster that must not be.
    """

    problem: Problem
    sets: tuple[Weights, ...]
    states: tuple[torch.Tensor, ...]
    checks: tuple[torch.Tensor, ...]

    @classmethod
    def create(
        cls, problem: Problem, device: torch.device, cold_bytes: int, seed: int
    ) -> "Workload":
        """Random weights and unit centroids; at least two sets, more until `cold_bytes` x 2."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (problem.vocab_size, problem.hidden_size)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        weight = torch.empty(shape, dtype=TORCH_DTYPES[problem.weight_dtype], device=device)
        for rows in torch.split(weight, 2**14):
            rows.copy_(normal(*rows.shape))
        centroids = torch.nn.functional.normalize(normal(problem.n_clusters, shape[1]), dim=1)
        centroids = centroids.to(TORCH_DTYPES[problem.centroid_dtype])
        order = torch.randperm(problem.vocab_size, generator=generator, device=device)
        ids = order.view(problem.n_clusters, -1).sort(dim=1).values.flatten().to(torch.int32)

        a_set = min(problem.read_bytes, problem.vocab_size * shape[1] * 2)
        n_sets = max(2, -(-2 * cold_bytes // a_set) + 1)
        sets = tuple(
            Weights(weight=weight, centroids=centroids.clone(), ids=ids) for _ in range(n_sets)
        )
        states = [
            normal(problem.n_tokens, shape[1]).to(weight.dtype) for _ in range(n_sets + N_CHECKS)
        ]
        workload = cls(problem, sets, tuple(states[:n_sets]), tuple(states[n_sets:]))
        workload._plant(workload.checks[1], problem.n_probes - 1)
        workload._plant(workload.checks[2], problem.n_clusters - 1)
        return workload

    def _plant(self, states: torch.Tensor, rank: int) -> None:
        """Make the best token of each row stand in its cluster of that rank, counted from 0."""
        weights = self.sets[0]
        for state in states.float():
            scores = weights.centroids.float() @ state
            cluster = int(scores.argsort(descending=True)[rank])
            row = cluster * self.problem.cluster_size
            scale = 12 / float(state.norm())  # logits have the deviation |state|: 12 of them
            weights.weight[row] = (state * scale).to(weights.weight.dtype)

    def why_wrong(self, step: Step, slack: int) -> str | None:
        """None when what the step writes is right for every check, twice each, else why not.

        The output is poisoned before each call.
        """
        judge = Judge(self.sets[0], self.problem.n_probes)
        for number, states in enumerate(self.checks):
            for _ in range(2):
                out = poisoned_out(self.problem, states.device)
                step(self.sets[0], states, out)
                reason = judge.why_wrong(out, states, slack)
                if reason:
                    return f"check {number}, {reason}"
        return None
