"""The default number of probes of a new FlashHead model, found by running the model.

Usage:
    chosen = choose_probes(source, folder, None, read_prompts(None), n_tokens=64, device="cpu")
    chosen.n_probes, chosen.why

The dense head's answers, generated once, show for every number of probes which answers stay the
same. Then a few numbers of probes are timed in whole steps, in turns, and `verdict` chooses. Both
parts are limited in time: a slow model gets fewer answers or rounds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from flashtune.kernels.formats.screen import Screen
from flashtune.kernels.measure.memory import free_bytes
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuner.bench.bench import BenchRequest, bench_model
from flashtune.tuner.bench.lineup import Entry
from flashtune.tuner.bench.verdict import LEAST_SAME, judge
from flashtune.tuner.clustering.clustered_folder import Chosen
from flashtune.tuner.clustering.decode_state import RunningModel, require_transformers
from flashtune.tuner.clustering.head_form import with_clusters
from flashtune.tuner.clustering.quality import Study
from flashtune.tuning_db.errors import FlashtuneError

ANSWER_SECONDS, STEP_SECONDS = 120.0, 60.0  # for the answers, for the turns
_ROUNDS, _STEPS = 24, 8  # of the turns, which need not be whole answers
_ENOUGH = 18
"""The least number of answers n after which a number of probes that keeps them all can be expected
to keep 95 % of others: (n + 1) / (n + 2). With fewer answers, only the result of probing all
clusters is known."""


def choose_probes(
    source: ModelFolder,
    folder: ModelFolder,
    screen: Screen | None,
    prompts: Sequence[str],
    n_tokens: int,
    device: str,
) -> Chosen:
    """The number of probes for a folder's clusters behind a screen, and the reason.

    source: the model's folder; folder: that of its clusters, which may be the same. Raises
    FlashtuneError if the model cannot be run here, or not in time.
    """
    require_transformers()
    _check_memory(source, device)
    running = RunningModel.load(source, device)
    answers = running.answers(prompts, n_tokens, seconds=ANSWER_SECONDS)
    parts = folder.read_head(device)
    form = with_clusters(folder.dtype, screen)
    study = Study.of(parts, answers.states, running.logits, [form], answers.lengths)
    agreement = study.of_form(form)
    n_clusters = len(parts.clusters.centroids)
    numbers = {parts.n_probes, n_clusters}
    if len(answers.lengths) >= _ENOUGH:
        numbers |= {agreement.least_for_answers(share) or n_clusters for share in (LEAST_SAME, 1)}
    del parts, study
    dense = Entry(dtype=folder.dtype)
    entries = [replace(dense, n_probes=number, screen=screen) for number in sorted(numbers)]
    request = BenchRequest(
        prompts=prompts, n_tokens=_STEPS, rounds=_ROUNDS, device=device, seconds=STEP_SECONDS
    )
    report = bench_model(folder, [dense, *entries], request, running)
    if report.interrupted:
        raise KeyboardInterrupt
    heads = {}
    for row in report.rows:
        if row.entry.n_probes is not None:
            same = int(agreement.answers[row.entry.n_probes - 1])
            judged = row.judged(report.dense_us)
            heads[row.entry.n_probes] = replace(judged, same=same, answers=len(answers.lengths))
    verdict = judge(list(heads.values()))
    [number] = [number for number, head in heads.items() if head is verdict.pick]
    return Chosen(n_probes=number, screen=screen, why=verdict.describe())


def _check_memory(folder: ModelFolder, device: str) -> None:
    """Raise FlashtuneError if the model does not fit into the free memory."""
    size = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    free = free_bytes(torch.device(device))
    if size > free:
        raise FlashtuneError(
            f"the model needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on "
            f"{device}"
        )
