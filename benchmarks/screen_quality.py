"""What screening changes on a real model: tokens, recall, and sampling distributions.

    python benchmarks/screen_quality.py --model DIR [--probes N …] [--tokens N] [--states FILE]

Prints two Markdown tables. The first shows how often each form of the head takes the dense head's
token, by number of probes. The second compares each screened head with the 16-bit FlashHead with
the number of probes in the first column. *same token*: the share of decode steps in which both
take the same token; *recall*: how often the dense head's token is taken, and the difference to the
16-bit head in percentage points; *variation*, *divergence*: the distance between the distributions
of the two heads' logits at temperature 1, as total variation, and as Kullback-Leibler divergence
(nats) over the tokens that are candidates of both. With centroids of 4 bits a second row has
enough probes to restore the recall. DIR is a folder made by `flashtune cluster`; the steps are
greedy continuations of the shipped prompts. Special tokens are not candidates here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import torch

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.model_folder.folder import HeadParts, ModelFolder
from flashtune.kernels.weights import token_order
from flashtune.tuner.clustering.decode_state import decode_states, read_prompts
from flashtune.tuner.clustering.head_form import HeadForm, forms_of, rounded, with_clusters
from flashtune.tuner.clustering.quality import Study, usual_probes

SCREENS = ("int8:8", "int8/int4:32", "int4/int8:8", "int4:32", "int8:0", "int8/int4:0", "int4:0")
_STATES_AT_ONCE = 64
_NEVER = -1e9  # the logit of tokens that are not candidates


@dataclass(kw_only=True)
class Line:
    """A form with a number of probes, compared with the plain form with `beside` probes."""

    form: HeadForm
    n_probes: int
    beside: int
    recall: float
    same: int = 0
    variations: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)


class Heads:
    """The logits of each form of a head, from products with the whole vocabulary."""

    def __init__(self, parts: HeadParts, forms: list[HeadForm]) -> None:
        """Round the weight to each format; states are loaded later."""
        n_clusters = len(parts.clusters.centroids)
        order = token_order(parts.clusters.assignments, n_clusters)
        self._tokens = order.view(n_clusters, -1)
        self._again = self._tokens.diff(dim=1, prepend=self._tokens[:, :1] - 1) == 0
        weight, centroids = parts.weight, parts.clusters.centroids
        self._plain = forms[0].rows
        self._rows = {form.rows: rounded(form.rows, weight) for form in forms}
        self._centroids = {form.centroids: rounded(form.centroids, centroids) for form in forms}

    def load(self, states: torch.Tensor) -> None:
        """Load states `[states, hidden]`."""
        self._logits = {name: states @ rows.T for name, rows in self._rows.items()}
        self._clusters = {
            name: (states @ rows.T).argsort(dim=1, descending=True, stable=True)
            for name, rows in self._centroids.items()
        }

    def logits(self, form: HeadForm, n_probes: int) -> torch.Tensor:
        """The logits `[states, vocab]` of the epilogue `logits`, in float32."""
        probed = self._clusters[form.centroids][:, :n_probes]
        ids = self._tokens[probed].flatten(1)
        logits = self._logits[form.rows].gather(1, ids)
        logits.masked_fill_(self._again[probed].flatten(1), _NEVER)
        plain = self._logits[self._plain]
        if form.n_rescored:
            best = logits.topk(min(form.n_rescored, logits.shape[1]), dim=1).indices
            logits.scatter_(1, best, plain.gather(1, ids.gather(1, best)))
        found = torch.full_like(plain, _NEVER)
        return found.scatter_reduce_(1, ids, logits, "amax")

    def token(self, form: HeadForm, logits: torch.Tensor) -> torch.Tensor:
        """The token that the form takes: one of the re-scored tokens, if there are any."""
        if not form.n_rescored:
            return logits.argmax(dim=1)
        out = logits <= _NEVER
        plain = self._logits[self._plain].masked_fill(out, _NEVER)
        screened = self._logits[form.rows].masked_fill(out, _NEVER)
        best = screened.topk(form.n_rescored, dim=1).indices.sort(dim=1).values
        return best.gather(1, plain.gather(1, best).argmax(dim=1, keepdim=True))[:, 0]


def compare(lines: list[Line], heads: Heads, plain: HeadForm, states: torch.Tensor) -> None:
    """Add the states to the lines."""
    for part in torch.split(states, _STATES_AT_ONCE):
        heads.load(part)
        for beside in sorted({line.beside for line in lines}):
            logits = heads.logits(plain, beside)
            token, chances = logits.argmax(dim=1), logits.softmax(dim=1)
            for line in (line for line in lines if line.beside == beside):
                own = heads.logits(line.form, line.n_probes)
                line.same += int((heads.token(line.form, own) == token).sum())
                change = (own.softmax(dim=1) - chances).abs().sum(dim=1) / 2
                line.variations += change.tolist()  # small tensors would fragment the memory
                line.divergences += divergence(logits, own).tolist()


def divergence(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Divergence of the second distribution from the first `[states]`, over common candidates."""
    both = (logits > _NEVER) & (own > _NEVER)
    first, second = (each.masked_fill(~both, _NEVER).log_softmax(dim=1) for each in (logits, own))
    return (first.exp() * (first - second)).masked_fill(~both, 0).sum(dim=1)


def lines_of(study: Study, plain: HeadForm, probes: list[int]) -> Iterator[Line]:
    """The lines to compute."""
    for beside in probes:
        aim = study.row(beside).top1
        for form, agreement in study.forms.items():
            if not form.clustered or form == plain:
                continue
            numbers = [beside]
            if form.centroids == "int4" and form.n_rescored:
                numbers += [agreement.least_probes(aim) or beside]
            for number in dict.fromkeys(numbers):
                recall = agreement.row(number).top1
                yield Line(form=form, n_probes=number, beside=beside, recall=recall)


def show_recall(study: Study, probes: list[int]) -> None:
    """Print how often each form takes the dense head's token; without clusters it is constant."""
    print(f"| head | {' | '.join(str(number) for number in probes)} |")
    print("|" + "---|" * (len(probes) + 1))
    for form in study.forms:
        shares = [study.row(number if form.clustered else 1, form).top1 for number in probes]
        print(f"| {form} | {' | '.join(f'{share:.4f}' for share in shares)} |")
    print()


def show(lines: list[Line], study: Study, n_states: int) -> None:
    """Print the table."""
    print("| 16-bit | its recall | screened | probes | same token | recall | points "
          "| variation, mean | 99th of 100 | divergence, mean |")  # fmt: skip
    print("|" + "---|" * 10)
    for line in lines:
        right = study.row(line.beside).top1
        changes, divergences = map(torch.tensor, (line.variations, line.divergences))
        far = changes.quantile(0.99)
        print(
            f"| {line.beside} | {right:.4f} | {line.form} | {line.n_probes} "
            f"| {line.same / n_states:.4f} ({n_states - line.same} differ) | {line.recall:.4f} "
            f"| {100 * (line.recall - right):+.2f} | {changes.mean():.5f} | {far:.5f} "
            f"| {divergences.mean():.2e} |"
        )


@click.command()
@click.option("--model", required=True)
@click.option("--probes", multiple=True, type=int)
@click.option("--screen", "screens", multiple=True, default=SCREENS)
@click.option("--tokens", default=144)
@click.option("--states", "kept", type=click.Path(path_type=Path), help="Kept from run to run.")
def main(
    model: str, probes: tuple[int, ...], screens: tuple[str, ...], tokens: int, kept: Path | None
) -> None:
    """Print the table."""
    folder = ModelFolder.open(model)
    parts = replace(folder.read_head(), special_token_ids=[])
    if kept is not None and kept.exists():
        states = torch.load(kept)
    else:
        states = decode_states(folder, read_prompts(None), tokens, "cpu")
        if kept is not None:
            torch.save(states, kept)
    dtype = folder.dtype
    plain = with_clusters(dtype, None)
    forms = forms_of(dtype, [Screen.parse(text) for text in screens])
    study = Study.of(parts, states, forms=forms)
    vocab, hidden = parts.weight.shape
    n_clusters = len(parts.clusters.centroids)
    print(f"{len(states)} decode steps, {vocab}x{hidden}, {n_clusters} clusters\n")
    numbers = sorted(probes) or [parts.n_probes]
    show_recall(study, sorted({*numbers, *usual_probes(n_clusters)}))
    lines = list(lines_of(study, plain, numbers))
    clustered = [form for form in forms if form.clustered]
    compare(lines, Heads(parts, clustered), plain, states)
    show(lines, study, len(states))


if __name__ == "__main__":
    main()
