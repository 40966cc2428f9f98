"""Tokens that are candidates of every decode step, whatever clusters are probed.

Usage:
    special = SpecialTokens.of(ids, order)
    out = special(weights, hidden, out)     # after a step has written `out`, tokens or logits
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashtune.kernels.weights import Weights
from flashtune.tuning_db.errors import FlashtuneError

_MOST_ROWS = 32  # at once: each row's product is taken with the tokens of all


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Compares a step's tokens with these, or adds their logits. Can be captured in a graph.

    ids: int64 `[n]`, ascending. places: int64 `[vocab]`, the row of the permuted weight that
    each token's row is.
    """

    ids: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, ids: Sequence[int], order: torch.Tensor) -> "SpecialTokens":
        """From ids in ascending order, and the token of each row of the permuted weight."""
        rows = torch.arange(order.numel(), device=order.device)
        places = torch.empty(int(order.max()) + 1, dtype=torch.int64, device=order.device)
        places[order] = rows  # of a token with several rows, which are alike, any one
        return cls(ids=torch.tensor(ids, dtype=torch.int64, device=order.device), places=places)

    def __call__(self, weights: Weights, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What a step wrote, with the special tokens among the candidates."""
        if out.dim() == 1:
            return self._better(weights, hidden, out)
        own = hidden.float() @ weights.weight[self.places[self.ids]].float().T
        return out.index_copy_(1, self.ids, own.to(out.dtype))

    def _better(
        self, weights: Weights, hidden: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The better one of each of `tokens` `[n_tokens]` and the special tokens.

        Both logits come from one product in float32, so that rounding favours neither; ties
        give the smaller id. A hidden state with a NaN keeps its token, whatever a step made it.
        """
        if len(tokens) > _MOST_ROWS:
            states, chosen = (torch.split(rows, _MOST_ROWS) for rows in (hidden, tokens))
            return torch.cat(list(map(self._better, [weights] * len(states), states, chosen)))
        n = self.ids.numel()
        known = tokens.clamp(0, self.places.numel() - 1)  # no id, after a NaN, must not be read
        places = self.places[torch.cat([self.ids, known])]
        logits = hidden.float() @ weights.weight[places].float().T
        best = logits[:, :n].max(dim=1)  # the first of those that tie
        ids, own = self.ids[best.indices], logits[:, n:].diagonal()
        better = (best.values > own) | ((best.values == own) & (ids < tokens))
        return torch.where(better, ids, tokens)


def checked_special_tokens(ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids in ascending order, each once; FlashtuneError for what is no token's id."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise FlashtuneError(
                f"special_token_ids must be whole numbers from 0 to {vocab_size - 1}, "
                f"not {token!r}"
            )
    return sorted(set(ids))
