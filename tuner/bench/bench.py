"""Answers with the dense head and FlashHeads in turns: what each gains, and what it changes.

Usage:
    report = bench_model(ModelFolder.open("model"), BenchRequest(prompts=read_prompts(None)))
    report.rows          # the dense head, then each FlashHead
    report.verdict       # which one to take

In a round every head answers the same batch of prompts, so that other load on the machine affects
all heads; a head's step is compared with the dense head's of the same round. Decoding is greedy,
and answers are compared token by token, up to the end token of the dense head's answer.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flashtune.kernels.formats.screen import NO_SCREEN
from flashtune.kernels.head import FlashHead
from flashtune.kernels.integrations.transformers import apply, remove
from flashtune.kernels.measure.memory import free_bytes
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.bench.lineup import Entry
from flashtune.tuner.bench.timed_answer import Run, timed_answers
from flashtune.tuner.bench.verdict import Judged, Verdict, judge
from flashtune.tuner.clustering.decode_state import RunningModel, model_error
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError

LEAST_TOKENS = 2  # the first token's step reads the prompt
_OF_MEDIANS = math.sqrt(math.pi / 2)  # spread of medians over that of means, for normal samples
_FEWEST_ROUNDS = 2  # without two there is no spread


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What to generate: a round is `batch` prompts, each continued by n_tokens tokens.

    seconds: after these, no more rounds are begun; there are at least two, which show the noise.
    """

    prompts: Sequence[str]
    n_tokens: int = 64
    batch: int = 1
    rounds: int = 20
    device: str = "cpu"
    seconds: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """The measurements of a head, from the rounds that both it and the dense head completed.

    tokens_per_s, ratio (to the dense head's tokens/s of the same round): one value per round.
    head_share: the head's share of a step's time, the median. same_tokens: the tokens before the
    first that differs. level, model_weight: as in `head.explain`.
    """

    entry: Entry
    level: str
    model_weight: str | None
    added_bytes: int
    tokens_per_s: tuple[float, ...]
    ratio: tuple[float, ...]
    head_us: float
    head_share: float
    same_answers: int
    answers: int
    same_tokens: int
    tokens: int

    def judged(self, dense_us: float) -> Judged:
        """The row as input for the verdict; dense_us: the median step with the dense head.

        The spread is that of the median, which shrinks with more rounds.
        """
        step = timing([dense_us / ratio for ratio in self.ratio])
        spread = _OF_MEDIANS * step.spread_us / math.sqrt(step.samples)
        return Judged(
            name=self.entry.name,
            step=replace(step, spread_us=spread),
            speed=statistics.median(self.ratio),
            same=self.same_answers,
            answers=self.answers,
            added_bytes=self.added_bytes,
            dense=self.entry.dense,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """The measurements; the first row is the dense head's. dense_us: the median of its step.

    rounds: those that the dense head completed, of `planned`.
    """

    rows: tuple[BenchRow, ...]
    n_tokens: int
    batch: int
    rounds: int
    planned: int
    device: str
    has_clusters: bool
    dense_us: float
    interrupted: bool

    @property
    def noise(self) -> float | None:
        """The largest spread of a head's median step, as a share of that step.

        If it is as large as the difference that the verdict looks for, heads cannot be told apart.
        None after one round.
        """
        if self.rounds < 2:
            return None
        steps = [row.judged(self.dense_us).step for row in self.rows]
        return max(step.spread_us / step.median_us for step in steps)

    @property
    def verdict(self) -> Verdict:
        """The head to take."""
        return judge([row.judged(self.dense_us) for row in self.rows])


def timing(samples: Sequence[float]) -> Timing:
    """Median and spread of samples in microseconds; one sample is enough."""
    return Timing.of(samples) if len(samples) > 1 else Timing(samples[0], 0.0, 1)


@dataclass(slots=True)
class _Turns:
    """A head's runs, by round. head: None for the dense one."""

    entry: Entry
    head: FlashHead | None
    level: str
    runs: dict[int, Run] = field(default_factory=dict)


def bench_model(
    folder: ModelFolder,
    entries: Sequence[Entry],
    request: BenchRequest,
    running: RunningModel | None = None,
) -> BenchReport:
    """Let a folder's model answer with each head in turns; the first entry is the dense head.

    running: the model, if it is loaded already. Ctrl-C ends the run with the measurements so far,
    once the dense head and another have finished a round. Raises FlashtuneError.
    """
    running = running or RunningModel.load(folder, request.device)
    turns = _prepared(folder, entries, request, running)
    done, interrupted = 0, False
    began = time.monotonic()
    until = began + request.seconds
    try:
        with StepProgress("answering", request.rounds * len(turns)) as progress:
            for number in range(request.rounds):
                if number >= _FEWEST_ROUNDS and time.monotonic() > until:
                    break
                prompts = [request.prompts[at] for at in _batch(request, number)]
                # Each round begins with another head, so that none always follows the same one.
                first = number % len(turns)
                for each in [*turns[first:], *turns[:first]]:
                    each.runs[number] = _run(running, each.head, prompts, request.n_tokens)
                    done += 1
                    # A round that has begun is finished, however late it is.
                    a_round = len(turns) * (time.monotonic() - began) / done
                    stops = max(began + _FEWEST_ROUNDS * a_round, until + a_round)
                    progress.show(done, each.entry.name, stops)
    except KeyboardInterrupt:
        if not any(each.runs.keys() & turns[0].runs.keys() for each in turns[1:]):
            raise
        interrupted = True
    rows = [_row(each, turns[0], request, running) for each in turns]
    steps = [run.step_us for run in turns[0].runs.values()]
    return BenchReport(
        rows=tuple(row for row in rows if row.ratio),
        n_tokens=request.n_tokens,
        batch=request.batch,
        rounds=len(steps),
        planned=request.rounds,
        device=request.device,
        has_clusters=folder.has_clusters,
        dense_us=statistics.median(steps),
        interrupted=interrupted,
    )


def _batch(request: BenchRequest, number: int) -> list[int]:
    """The prompts of a round: the next ones, starting over after the last."""
    first = number * request.batch
    return [at % len(request.prompts) for at in range(first, first + request.batch)]


def _prepared(
    folder: ModelFolder, entries: Sequence[Entry], request: BenchRequest, running: RunningModel
) -> list[_Turns]:
    """The heads, with their kernels chosen and everything run once."""
    model = running.model
    weight = model.get_output_embeddings().weight
    n_clusters = folder.problem().n_clusters if folder.has_clusters else 0
    needed = sum(entry.added_bytes(tuple(weight.shape), n_clusters) for entry in entries)
    free = free_bytes(weight.device)
    if needed > free:
        raise FlashtuneError(
            f"the heads need {needed / 1e9:.1f} GB in addition to the model, but only "
            f"{free / 1e9:.1f} GB are free: give fewer --probes or --screen"
        )
    turns = []
    with StepProgress("preparing heads", len(entries)) as progress:
        for number, entry in enumerate(entries, start=1):
            turns.append(_made(model, folder, entry, request.batch))
            prompts = [request.prompts[at] for at in _batch(request, 0)]
            _run(running, turns[-1].head, prompts, LEAST_TOKENS)
            progress.show(number, entry.name)
    return turns


def _made(model: object, folder: ModelFolder, entry: Entry, batch: int) -> _Turns:
    if entry.dense:
        return _Turns(entry, None, "torch")
    screen = NO_SCREEN if entry.screen is None else entry.screen
    if entry.n_probes is None:
        head = apply(model, screen=screen)
    else:
        head = apply(model, assets=folder.path, n_probes=entry.n_probes, screen=screen)
    try:
        level = str(head.explain(batch, epilogue="logits")["level"])
    finally:
        remove(model)
    return _Turns(entry, head, level)


def _run(
    running: RunningModel, head: FlashHead | None, prompts: Sequence[str], n_tokens: int
) -> Run:
    """Generate answers with a head. Raises FlashtuneError if the model can't."""
    if head is not None:
        apply(running.model, head, always=True)
    try:
        return timed_answers(running, prompts, n_tokens)
    except Exception as error:  # a model's own code may raise anything
        raise model_error("the model cannot continue the prompts", error) from error
    finally:
        if head is not None:
            remove(running.model)


def _row(turns: _Turns, dense: _Turns, request: BenchRequest, running: RunningModel) -> BenchRow:
    rounds = sorted(turns.runs.keys() & dense.runs.keys())
    runs = [(turns.runs[number], dense.runs[number]) for number in rounds]
    same_answers = answers = same_tokens = tokens = 0
    seen: set[int] = set()
    for number, (run, right) in zip(rounds, runs, strict=True):
        alike = (run.tokens == right.tokens).cumprod(dim=1)
        counts = running.counted(right.tokens)
        for row, at in enumerate(_batch(request, number)):
            if at in seen:  # a repeated prompt adds nothing new
                continue
            seen.add(at)
            kept = int(alike[row, : counts[row]].sum())
            answers, tokens = answers + 1, tokens + counts[row]
            same_answers, same_tokens = same_answers + (kept == counts[row]), same_tokens + kept
    return BenchRow(
        entry=turns.entry,
        level=turns.level,
        model_weight=turns.head.whose_weight if turns.head else None,
        added_bytes=turns.head.added_bytes if turns.head else 0,
        tokens_per_s=tuple(request.batch * 1e6 / run.step_us for run, _ in runs),
        ratio=tuple(right.step_us / run.step_us for run, right in runs),
        head_us=statistics.median(run.head_us for run, _ in runs) if runs else 0.0,
        head_share=statistics.median(run.head_us / run.step_us for run, _ in runs)
        if runs
        else 0.0,
        same_answers=same_answers,
        answers=answers,
        same_tokens=same_tokens,
        tokens=tokens,
    )
