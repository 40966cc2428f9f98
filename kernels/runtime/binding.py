"""From a problem to something that runs: choose, render, compile, load, check; else fall back.

Usage:
    bound = bind(problem, weights)     # a missing kernel never raises
    step = bound.take_step()           # with scratch of its own: one for each stream
    step(weights, hidden, out)
    bound.troubles                     # what went wrong on the way, one line each

It tries the chosen config, then the default config, then plain torch. A choice that was not
measured here with these tools is raced first, if there is time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from flashtune.kernels.backends.host import device_of, toolchain
from flashtune.kernels.backends.target import backend_of, target_of
from flashtune.kernels.backends.torch import TorchStep
from flashtune.kernels.epilogues.epilogue import epilogue_of, new_out, poisoned_out
from flashtune.kernels.formats.format import format_of
from flashtune.kernels.plans import FALLBACK
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.runtime.choice import Choice, Level, default_choice, fallback_choice
from flashtune.kernels.runtime.race import Race, Start, hold
from flashtune.kernels.runtime.records import best_choice
from flashtune.kernels.runtime.trouble import is_of_a_signal, note, one_line
from flashtune.kernels.weights import Step, Weights
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem

LOG = logging.getLogger("flashtune")
N_SPARES = 4  # steps made ahead, for streams whose first call is being captured
_SLIP = 1e-4  # of the sum of a logit's terms: far above float32's rounding error


@dataclass(kw_only=True, slots=True)
class Bound:
    """A problem's choice, ready to run. Not safe to use from several threads at once."""

    problem: Problem
    choice: Choice
    troubles: list[str]
    new_step: Callable[[], Step]
    spares: list[Step] = field(default_factory=list)
    race: Race | None = None

    def take_step(self) -> Step:
        """A step that shares no scratch with any other."""
        return self.spares.pop() if self.spares else self.new_step()


def bind(problem: Problem, weights: Weights, *, race_seconds: float | None = None) -> Bound:
    """The best that runs here, compiled, loaded and checked, with spare steps.

    Takes seconds if kernels must be compiled, and up to `race_seconds` more if a race is held
    (None: no race). It must not be called while the current stream is being captured.
    """
    troubles: list[str] = []
    race = None
    where = weights.weight.device
    try:
        device = device_of(where)
        choice = best_choice(problem, device, toolchain(device), troubles)
        if race_seconds is not None and choice.level is not Level.TORCH and not choice.settled:
            choice, race = _race(problem, weights, device, choice, race_seconds, troubles)
        while choice.level is not Level.TORCH:
            try:
                new_step = compile_step(Candidate(problem, choice.config, device), where)
                steps = [new_step() for _ in range(N_SPARES + 1)]
                _check(steps[0], problem, weights)
            except Exception as error:  # Triton and drivers raise exceptions of any type
                if is_of_a_signal(error):
                    raise
                troubles.append(f"the {choice.level.value} config failed: {one_line(error)}")
                choice = _next_choice(problem, choice, device, troubles[-1])
            else:
                return Bound(
                    problem=problem,
                    choice=choice,
                    troubles=troubles,
                    new_step=new_step,
                    spares=steps,
                    race=race,
                )
        if FALLBACK not in target_of(device).plans:  # where there should have been a kernel
            note(troubles, choice.why)
    except Exception as error:  # the driver, or an unusable table of ours
        if is_of_a_signal(error):
            raise
        troubles.append(one_line(error))
        choice = fallback_choice(troubles[-1])
    return Bound(
        problem=problem,
        choice=choice,
        troubles=troubles,
        new_step=lambda: TorchStep(problem),
        race=race,
    )


def give_up(bound: Bound, error: Exception) -> None:
    """Make a bound problem run plain torch, because a call of its kernels has failed."""
    trouble = f"a call of the {bound.choice.level.value} config failed: {one_line(error)}"
    note(bound.troubles, trouble)
    bound.choice = fallback_choice(trouble, bound.choice.skipped)
    bound.new_step = lambda: TorchStep(bound.problem)
    bound.spares.clear()


def _race(
    problem: Problem,
    weights: Weights,
    device: Device,
    choice: Choice,
    seconds: float,
    troubles: list[str],
) -> tuple[Choice, Race]:
    start = Start(
        problem=problem,
        weights=weights,
        device=device,
        toolchain=toolchain(device),
        seconds=seconds,
        troubles=troubles,
    )
    return hold(start, choice)


def _next_choice(problem: Problem, failed: Choice, device: Device, trouble: str) -> Choice:
    """What to try after a choice whose config failed."""
    default = default_choice(problem, device, skipped=failed.skipped)
    if failed.level is Level.DEFAULT or default.config == failed.config:
        return fallback_choice(trouble, failed.skipped)
    return default if default.level is Level.TORCH else replace(default, why=trouble)


def compile_step(candidate: Candidate, torch_device: torch.device) -> Callable[[], Step]:
    """Compile a candidate's kernels; each call of the result loads them with their own scratch.

    Lets exceptions of the templates, Triton and the driver through.
    """
    return backend_of(candidate).loader(candidate, torch_device)


def _check(step: Step, problem: Problem, weights: Weights) -> None:
    """Run a step twice on centroids as hidden states; raise unless its tokens can be right.

    If every cluster is probed, no centroid is read, and rows of the weight serve as the states.

    A step may probe more clusters than asked, so its token's logit is at least the reference's.
    For logits, it checks the best logit's token, and that every logit was written.
    """
    rows = torch.arange(problem.n_tokens, device=weights.centroids.device) % problem.n_clusters
    dtype = format_of(problem.state_dtype).torch_dtype
    probes_all = problem.n_probes == problem.n_clusters
    states = weights.rows if probes_all else weights.centroid_rows
    hidden = states(problem, rows, torch.float32).to(dtype)
    epilogue = epilogue_of(problem.epilogue)
    out = new_out(problem, hidden.device)
    TorchStep(problem)(weights, hidden, out)
    expected = epilogue.tokens_of(out)
    least, size = _logits(problem, weights, hidden, expected)
    slip = _SLIP * size
    if problem.epilogue == "logits":  # these can differ so much and round alike
        slip += torch.finfo(dtype).eps * least.abs()
    for _ in range(2):
        out = poisoned_out(problem, hidden.device)
        step(weights, hidden, out)
        if bool(out.isnan().any()):
            raise FlashtuneError("it left logits unwritten")
        tokens = epilogue.tokens_of(out)
        if not bool(((tokens >= 0) & (tokens < problem.vocab_size)).all()):
            raise FlashtuneError("its tokens are not in the vocabulary")
        logits, _ = _logits(problem, weights, hidden, tokens)
        if bool((logits < least - slip).any()):
            raise FlashtuneError("its tokens are not the best ones")


def _logits(
    problem: Problem, weights: Weights, hidden: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logit that decides for each token, and the sum of its terms' magnitudes."""
    if problem.n_rescored and weights.model_weight is not None:
        rows = weights.model_weight[tokens].float()
    else:
        which = torch.stack([(weights.ids == token).nonzero()[0, 0] for token in tokens])
        rows = weights.rows(problem, which, torch.float32)
    terms = rows * hidden.float()
    return terms.sum(dim=1), terms.abs().sum(dim=1)
