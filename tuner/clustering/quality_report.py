"""A study of a model's head: each form by number of probes, timed, and which one to take.

Usage:
    report = study_model(ModelFolder.open("model"), QualityRequest(prompts=read_prompts(None)))
    report.rows, report.whole      # heads with clusters, and without
    report.pick                    # the fastest that reaches the requested recall
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from flashtune.kernels.formats.format import dtype_name
from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.timing import Timing
from flashtune.kernels.model_folder.folder import HeadParts, ModelFolder
from flashtune.kernels.weights import problem_of
from flashtune.tuner.clustering.decode_state import RunningModel, require_transformers
from flashtune.tuner.clustering.head_form import HeadForm, forms_of, with_clusters
from flashtune.tuner.clustering.head_latency import HeadLatency
from flashtune.tuner.clustering.quality import QualityRow, Study, usual_probes
from flashtune.tuner.progress import StepProgress
from flashtune.tuning_db.errors import FlashtuneError

Timed = TypeVar("Timed")


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRequest:
    """What to study: on which text, for how many probes, on which device, timed or not.

    screens: the screens to study besides the plain head. survey: report several numbers of probes
    and heads without clusters; else only what reaches the recall. keep_interrupted: after Ctrl-C,
    report what was counted until then.
    """

    prompts: Sequence[str]
    n_tokens: int = 32
    device: str = "cpu"
    n_probes: Sequence[int] = ()
    recall: float | None = None
    screens: Sequence[Screen] = ()
    survey: bool = True
    timed: bool = True
    keep_interrupted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedRow:
    """Quality of a form with a number of probes, and the time of a step; level says what ran.

    If not timed, the time is None and the level empty. read_bytes: per step; added_bytes: in
    memory, besides the model's own weight.
    """

    form: HeadForm
    quality: QualityRow
    read_bytes: int
    added_bytes: int
    timing: Timing | None = None
    level: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    """The results; own_form and own_probes are the model's.

    rows: heads with clusters; whole: heads without, including the dense one. pick: the row to take
    of those that reach the recall.
    """

    study: Study
    device: str
    n_states: int
    n_answers: int
    n_clusters: int
    own_form: HeadForm
    own_probes: int
    rows: tuple[TimedRow, ...] = ()
    whole: tuple[TimedRow, ...] = ()
    recall: float | None = None
    pick: TimedRow | None = None
    interrupted: bool = False

    @property
    def dense(self) -> Timing | None:
        """The dense head's time, in the model's dtype."""
        plain = next(iter(self.study.forms)).rows
        dense = (row.timing for row in self.whole if row.form == HeadForm(rows=plain))
        return next(dense, None)


def study_model(folder: ModelFolder, request: QualityRequest) -> QualityReport:
    """Run a FlashHead model on text and judge its head. Raises FlashtuneError."""
    parts, own = folder.read_head(request.device), folder.screen
    require_transformers()
    n_clusters = len(parts.clusters.centroids)
    for number in request.n_probes:
        if number > n_clusters:
            raise FlashtuneError(
                f"{number} probes are more than the model's {n_clusters} clusters: give at most "
                f"{n_clusters}"
            )
    dtype = dtype_name(parts.weight)
    own_form = with_clusters(dtype, own)
    screens = [*request.screens, *([own] if own and request.survey else [])]
    forms = forms_of(dtype, screens)
    if not request.survey:
        forms = [form for form in forms if form.clustered]
    model = RunningModel.load(folder, request.device)
    answers = model.answers(
        request.prompts, request.n_tokens, keep_interrupted=request.keep_interrupted
    )
    states = answers.states
    study = Study.of(parts, states, model.logits, forms, answers.lengths)
    rows = _rows(parts, study, request, own_form)
    interrupted = model.interrupted
    if request.timed and not interrupted:
        try:
            _time(rows, HeadLatency(parts, states))
        except KeyboardInterrupt:
            if not request.keep_interrupted:
                raise
            interrupted = True
    clustered = tuple(row for row in rows if row.form.clustered)
    return QualityReport(
        study=study,
        device=request.device,
        n_states=len(states),
        n_answers=len(answers.lengths),
        n_clusters=n_clusters,
        own_form=own_form,
        own_probes=parts.n_probes,
        rows=clustered,
        whole=tuple(row for row in rows if not row.form.clustered),
        recall=request.recall,
        pick=None if request.recall is None else _fastest(clustered, request.recall),
        interrupted=interrupted,
    )


def _rows(
    parts: HeadParts, study: Study, request: QualityRequest, own_form: HeadForm
) -> list[TimedRow]:
    """The rows to report, not timed yet: each form's numbers of probes, fewest first."""
    n_clusters = len(parts.clusters.centroids)
    rows = []
    for form, agreement in study.forms.items():
        numbers = {1}
        if form.clustered:
            numbers = set(request.n_probes)
            if request.survey and not numbers:
                own = [parts.n_probes] if form == own_form else []
                numbers = set(usual_probes(n_clusters, *own))
            if request.recall is not None:
                least = agreement.least_probes(request.recall)
                numbers |= set() if least is None else {least}
        for number in sorted(numbers):
            row = agreement.row(number)
            rows.append(_row(parts, form, row))
    if request.survey:
        dense = HeadForm(rows=dtype_name(parts.weight))
        right = QualityRow(n_probes=1, top1=1.0, top5=1.0, mass=1.0, answers=1.0)
        rows.append(_row(parts, dense, right))
    return rows


def _row(parts: HeadParts, form: HeadForm, quality: QualityRow) -> TimedRow:
    n_probes = quality.n_probes
    problem = problem_of(parts.weight, parts.clusters.centroids, n_probes, n_tokens=1)
    return TimedRow(
        form=form,
        quality=quality,
        read_bytes=form.read_bytes(problem, len(parts.weight)),
        added_bytes=form.added_bytes(problem, len(parts.weight)),
    )


def _time(rows: list[TimedRow], latency: HeadLatency) -> None:
    """Time the rows one after the other, in place."""
    with StepProgress("timing the head", len(rows)) as progress:
        for number, row in enumerate(rows):
            timed = latency.of(row.form, row.quality.n_probes)
            if timed is not None:
                rows[number] = replace(row, timing=timed[0], level=timed[1])
            progress.show(number + 1)


def _fastest(rows: Iterable[TimedRow], recall: float) -> TimedRow:
    """The fastest of the rows that reach the recall; among equally fast ones, the smallest.

    If not all are timed, the one that reads the fewest bytes per step counts as the fastest.
    """
    enough = [row for row in rows if row.quality.top1 >= recall - 1e-9]
    timed = {row: row.timing for row in enough if row.timing}

    def size(row: TimedRow) -> tuple[int, int, int]:
        return row.added_bytes, row.read_bytes, row.quality.n_probes

    if len(timed) < len(enough):
        return min(enough, key=lambda row: (row.read_bytes, *size(row)))
    return fastest(timed, size)


def fastest(timed: Mapping[Timed, Timing], size: Callable[[Timed], Any]) -> Timed:
    """The fastest; among equally fast ones, the smallest.

    Two are equally fast if they differ by less than the larger spread.
    """
    best = min(timed.values(), key=lambda timing: timing.median_us)
    alike = [
        each
        for each, timing in timed.items()
        if timing.median_us - best.median_us <= max(timing.spread_us, best.spread_us)
    ]
    return min(alike, key=size)
