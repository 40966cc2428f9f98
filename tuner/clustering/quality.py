"""The quality of a head's forms: how often each takes the dense head's token.

Usage:
    study = Study.of(parts, states, forms=forms)
    study.row(256)                      # agreement and probability mass with 256 probes
    study.row(256, forms[1])            # of another form than the first
    study.least_probes(0.995)           # the fewest probes whose top token agrees that often

A FlashHead takes the dense head's token if that token's cluster is probed, and only then unless
logits tie. A screened head must also have it among the tokens that are decided in 16 bits: so it
loses the token again once enough probed tokens have better screened logits. A state thus agrees
between two numbers of probes, and two counts cover all numbers of probes at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashtune.kernels.formats.format import dtype_name
from flashtune.kernels.model_folder.folder import HeadParts
from flashtune.tuner.clustering.head_form import HeadForm, rounded, with_clusters
from flashtune.tuning_db.errors import FlashtuneError

TOP = 5
LogitsOf = Callable[[torch.Tensor], torch.Tensor]
_STATES_AT_ONCE = 64
_Interval = tuple[torch.Tensor, torch.Tensor]  # for each state, as `_between` returns them


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """Shares of the states, for one number of probes.

    top1: the dense head's token is taken. top5: all of its five best tokens are among those that
    are decided in 16 bits; if none are decided so, they are the five best. mass: the mean
    probability that the dense head gives to the candidates. answers: the share of the answers
    whose tokens are all taken, so that greedy decoding writes them unchanged; None if answers are
    not given.
    """

    n_probes: int
    top1: float
    top5: float
    mass: float
    answers: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """By number of probes, less one: how many of n_states agree, and the mean mass.

    answers: in how many of n_answers all states agree. A head without clusters counts as one with
    a single cluster.
    """

    n_states: int
    n_answers: int
    top1: torch.Tensor
    top5: torch.Tensor
    mass: torch.Tensor
    answers: torch.Tensor

    def row(self, n_probes: int) -> QualityRow:
        """The shares with that many probes."""
        return QualityRow(
            n_probes=n_probes,
            top1=int(self.top1[n_probes - 1]) / self.n_states,
            top5=int(self.top5[n_probes - 1]) / self.n_states,
            mass=float(self.mass[n_probes - 1]),
            answers=int(self.answers[n_probes - 1]) / self.n_answers if self.n_answers else None,
        )

    def least_probes(self, recall: float) -> int | None:
        """The fewest probes with which a share `recall` of the states agrees in the top token."""
        return _least(self.top1, recall, self.n_states)

    def least_for_answers(self, share: float) -> int | None:
        """The fewest probes with which that share of the answers is the same."""
        return _least(self.answers, share, self.n_answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """How each form of a head agrees with the dense head; by default, the first form."""

    forms: dict[HeadForm, Agreement]

    @classmethod
    def of(
        cls,
        parts: HeadParts,
        states: torch.Tensor,
        logits_of: LogitsOf = lambda raw: raw,
        forms: Sequence[HeadForm] = (),
        lengths: Sequence[int] = (),
    ) -> "Study":
        """Judge the head on states `[states, hidden]`, in float32 on the weight's device.

        forms: default: that of the weight's own dtype. Special tokens are always candidates; other
        tokens in the clusters pinned for them are not counted as such. logits_of: what the model
        makes of its head's logits `[states, vocab]`, which changes the probabilities. lengths: the
        number of states of each answer, if answers count. Raises FlashtuneError for states that do
        not fit.
        """
        weight = parts.weight
        if states.dim() != 2 or states.shape[1] != weight.shape[1] or not len(states):
            raise FlashtuneError(
                f"states must be [states, {weight.shape[1]}], not {list(states.shape)}"
            )
        if lengths and sum(lengths) != len(states):
            raise FlashtuneError(
                f"lengths add up to {sum(lengths)} states, but there are {len(states)}"
            )
        forms = list(forms) or [with_clusters(dtype_name(weight), None)]
        states = states.to(weight.device, torch.float32)
        dense = _Dense(parts, states, logits_of)
        scores: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(form.centroids for form in forms):
            scores[name] = dense.cluster_ranks(parts, name)
        found: dict[HeadForm, Agreement] = {}
        for name in dict.fromkeys(form.rows for form in forms):
            alike = [form for form in forms if form.rows == name]
            found |= dense.agreements(rounded(name, weight), alike, scores, lengths)
        return cls(forms={form: found[form] for form in forms})

    def of_form(self, form: HeadForm | None = None) -> Agreement:
        """The agreement of a form."""
        return next(iter(self.forms.values())) if form is None else self.forms[form]

    def row(self, n_probes: int, form: HeadForm | None = None) -> QualityRow:
        """The shares with that many probes."""
        return self.of_form(form).row(n_probes)

    def least_probes(self, recall: float, form: HeadForm | None = None) -> int | None:
        """The fewest probes with which a share `recall` of the states agrees in the top token.

        None if no number does.
        """
        return self.of_form(form).least_probes(recall)


class _Dense:
    """The dense head's best tokens for some states, and the probability of each cluster."""

    def __init__(self, parts: HeadParts, states: torch.Tensor, logits_of: LogitsOf) -> None:
        weight, device = parts.weight.float(), parts.weight.device
        self._states = states
        self._clusters = parts.clusters.assignments.to(device, torch.int64)
        self._n_clusters = len(parts.clusters.centroids)
        self._special = torch.tensor(parts.special_token_ids, dtype=torch.int64, device=device)
        tops, masses, always = [], [], []
        for part in torch.split(states, _STATES_AT_ONCE):
            logits = part @ weight.T
            tops.append(logits.topk(min(TOP, len(weight)), dim=1).indices)
            shares = logits_of(logits).to(logits).softmax(dim=1)
            always.append(shares[:, self._special].sum(dim=1))
            shares[:, self._special] = 0
            mass = torch.zeros(len(part), self._n_clusters, device=device)
            masses.append(mass.index_add_(1, self._clusters, shares))
        self._top, self._mass, self._always = map(torch.cat, (tops, masses, always))

    def cluster_ranks(self, parts: HeadParts, name: str) -> torch.Tensor:
        """The rank of each cluster for each state, by centroids in a format; the best is 0.

        int32 `[states, n_clusters]`; for a head without clusters `[states, 1]`.
        """
        if not name:
            return torch.zeros(len(self._states), 1, dtype=torch.int32, device=self._mass.device)
        centroids = rounded(name, parts.clusters.centroids)
        return torch.cat(
            [
                _ranks(part @ centroids.T).to(torch.int32)
                for part in torch.split(self._states, _STATES_AT_ONCE)
            ]
        )

    def agreements(
        self,
        rows: torch.Tensor,
        forms: Sequence[HeadForm],
        ranks: dict[str, torch.Tensor],
        lengths: Sequence[int],
    ) -> dict[HeadForm, Agreement]:
        """The agreement of the forms with these rows `[vocab, hidden]`."""
        sums = {form: _Sums(ranks[form.centroids].shape[1]) for form in forms}
        for start in range(0, len(self._states), _STATES_AT_ONCE):
            part = slice(start, start + _STATES_AT_ONCE)
            logits = self._states[part] @ rows.T
            for form, sum_ in sums.items():
                of_clusters = ranks[form.centroids][part]
                of_tokens = self._token_ranks(of_clusters)
                for k, found in ((1, sum_.top1), (self._top.shape[1], sum_.top5)):
                    decided = max(k, form.n_rescored)
                    tokens = self._top[part, :k]
                    found.append(_between(logits, of_tokens, tokens, decided, sum_.n))
                sum_.add_mass(of_clusters, self._mass[part], self._always[part])
        return {form: sum_.agreement(lengths) for form, sum_ in sums.items()}

    def _token_ranks(self, of_clusters: torch.Tensor) -> torch.Tensor:
        """The rank of each token's cluster `[states, vocab]`; special tokens have the best."""
        if of_clusters.shape[1] == 1:
            return of_clusters.expand(-1, len(self._clusters))
        ranks = of_clusters[:, self._clusters]
        ranks[:, self._special] = 0
        return ranks


class _Sums:
    """The results for each state: between which numbers of probes it agrees, and the mass."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.top1: list[_Interval] = []
        self.top5: list[_Interval] = []
        self._mass = torch.zeros(n, dtype=torch.float64)

    def add_mass(
        self, of_clusters: torch.Tensor, mass: torch.Tensor, always: torch.Tensor
    ) -> None:
        if self.n == 1:  # the whole vocabulary
            self._mass += len(of_clusters)
            return
        by_rank = torch.zeros_like(mass).scatter_(1, of_clusters.long(), mass)
        found = by_rank.cumsum(dim=1, dtype=torch.float64) + always[:, None]
        self._mass += found.sum(dim=0).cpu()

    def agreement(self, lengths: Sequence[int]) -> Agreement:
        top1, top5 = _joined(self.top1), _joined(self.top5)
        n_states = len(top1[0])
        return Agreement(
            n_states=n_states,
            n_answers=len(lengths),
            top1=_counts(*top1, self.n),
            top5=_counts(*top5, self.n),
            mass=self._mass / n_states,
            answers=_counts(*_of_answers(*top1, lengths), self.n),
        )


def _between(
    logits: torch.Tensor, ranks: torch.Tensor, tokens: torch.Tensor, decided: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which numbers of probes a state's tokens are all among the best `decided`.

    logits `[states, vocab]`: screened ones; ranks: of each token's cluster, of n; tokens `[states,
    k]`. They are from one more than the first number to the second: from when the last token's
    cluster is probed, until better tokens fill all places. Equal logits fill none.
    """
    first = ranks.gather(1, tokens).amax(dim=1).long()
    better = logits > logits.gather(1, tokens).amin(dim=1, keepdim=True)
    last = torch.full_like(first, n)
    crowded = (better.sum(dim=1) >= decided).nonzero()[:, 0]
    if len(crowded):
        others = ranks[crowded].masked_fill(~better[crowded], n)
        last[crowded] = others.kthvalue(decided, dim=1).values.long()
    return first, last


def _joined(parts: Sequence[_Interval]) -> _Interval:
    first, last = zip(*parts, strict=True)
    return torch.cat(first).cpu(), torch.cat(last).cpu()


def _of_answers(first: torch.Tensor, last: torch.Tensor, lengths: Sequence[int]) -> _Interval:
    """Between which numbers of probes all states of each answer agree."""
    answer = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    start = torch.zeros(len(lengths), dtype=torch.int64)
    return (
        start.scatter_reduce(0, answer, first[: len(answer)], "amax", include_self=False),
        start.scatter_reduce(0, answer, last[: len(answer)], "amin", include_self=False),
    )


def _counts(first: torch.Tensor, last: torch.Tensor, n: int) -> torch.Tensor:
    """How many agree, by number of probes less one: int64 `[n]`."""
    agree = last > first
    one = torch.ones(int(agree.sum()), dtype=torch.int64)
    changes = torch.zeros(n + 1, dtype=torch.int64)
    changes.index_add_(0, first[agree], one)
    changes.index_add_(0, last[agree], -one)
    return changes.cumsum(0)[:n]


def _least(counts: torch.Tensor, share: float, n: int) -> int | None:
    """The fewest probes, of counts by probes less one, with which a share of n agrees."""
    enough = (counts >= math.ceil(share * n - 1e-9)).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank of each score in its row; the best is 0."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def usual_probes(n_clusters: int, *more: int) -> list[int]:
    """Powers of two from a 64th to a half of the clusters, plus the given numbers."""
    powers = [2**exponent for exponent in range(n_clusters.bit_length())]
    return sorted({p for p in powers if n_clusters <= 64 * p and 2 * p <= n_clusters} | {*more})
