"""How good a head's clusters are: what the dense head would take, and whether probes find it.

Usage:
    study = Study.of(parts, states)
    study.row(256)                    # agreement and probability mass with 256 probes
    study.least_probes(0.995)         # the fewest probes whose top token agrees that often

A FlashHead takes the dense head's token if, and unless logits tie only if, that token's cluster
is probed. So the rank of its cluster among all says at once for every number of probes whether
the two agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.tuning_db.errors import FlashtuneError

TOP = 5
LogitsOf = Callable[[torch.Tensor], torch.Tensor]
_STATES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """Shares of the states, for one number of probes.

    top1: the dense head's token is found. top5: so are all of its five best tokens. mass: the
    mean probability that the dense head gives to the candidates.
    """

    n_probes: int
    top1: float
    top5: float
    mass: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """For each state, the rank of the cluster of the dense head's token and the worst rank of
    its five best, counted from 0; and by number of probes, less one, the mean mass found.
    """

    top1_ranks: torch.Tensor
    top5_ranks: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def of(
        cls, parts: HeadParts, states: torch.Tensor, logits_of: LogitsOf = lambda raw: raw
    ) -> "Study":
        """Judge the head on states `[states, hidden]`, in float32 on the weight's device.

        Special tokens count as found always; of other tokens in the clusters that are pinned for
        them this is not counted. logits_of: what the model makes of its head's
        logits `[states, vocab]`, which changes the probabilities. Raises FlashtuneError for states
        that do not fit.
        """
        weight, centroids = parts.weight.float(), parts.clusters.centroids.float()
        if states.dim() != 2 or states.shape[1] != weight.shape[1] or not len(states):
            raise FlashtuneError(
                f"states must be [states, {weight.shape[1]}], not {list(states.shape)}"
            )
        clusters = parts.clusters.assignments.to(weight.device, torch.int64)
        special = torch.tensor(parts.special_token_ids, dtype=torch.int64, device=weight.device)
        top_ranks = []
        total = torch.zeros(len(centroids), device=weight.device, dtype=torch.float64)
        for part in torch.split(states.to(weight.device, torch.float32), _STATES_AT_ONCE):
            logits = part @ weight.T
            ranks = _ranks(part @ centroids.T)[:, clusters]  # of each token's cluster
            ranks[:, special] = 0
            top = logits.topk(min(TOP, len(weight)), dim=1).indices
            top_ranks.append(ranks.gather(1, top).cpu())
            returned = logits_of(logits).to(logits)
            mass = torch.zeros(len(part), len(centroids), device=weight.device)
            mass.scatter_add_(1, ranks, returned.softmax(dim=1))
            total += mass.cumsum(dim=1, dtype=torch.float64).sum(dim=0)
        found = torch.cat(top_ranks)
        return cls(
            top1_ranks=found[:, 0],
            top5_ranks=found.amax(dim=1),
            mass=(total / len(states)).cpu(),
        )

    def row(self, n_probes: int) -> QualityRow:
        """The shares with that many probes."""
        return QualityRow(
            n_probes=n_probes,
            top1=float((self.top1_ranks < n_probes).double().mean()),
            top5=float((self.top5_ranks < n_probes).double().mean()),
            mass=float(self.mass[n_probes - 1]),
        )

    def least_probes(self, recall: float) -> int:
        """The fewest probes with which a share `recall` of the states agrees in the top token."""
        ranks = self.top1_ranks.sort().values
        needed = math.ceil(recall * len(ranks) - 1e-9)
        return int(ranks[max(1, needed) - 1]) + 1


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank of each score in its row, the best 0."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def usual_probes(n_clusters: int, *more: int) -> list[int]:
    """Powers of two from a 64th to a half of the clusters, and what is given besides."""
    powers = [2**exponent for exponent in range(n_clusters.bit_length())]
    return sorted({p for p in powers if n_clusters <= 64 * p and 2 * p <= n_clusters} | {*more})
