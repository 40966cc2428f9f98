"""Optuna's TPE, which samples a plan first and then only the knobs of that plan.

Usage:
    sampler = PlanFirstSampler(seed)
    study = optuna.create_study(sampler=sampler)
    sampler.looks_further = True    # from now on, a model tells more than one proposal:
    sampler.further                 # what else the last one would propose, most promising first

`TPESampler(group=True)` splits the parameters into groups that occur together in trials, and fits
a model to each group for every proposal, although a config has the knobs of one plan only. It also
finds the groups again each time, from all trials. Here the groups are kept, and those of other
plans are left out, which changes no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

STARTUP = 8  # trials before the first model
FURTHER = 96  # samples of a model that tells more than one proposal: four times Optuna's own
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

_Group = dict[str, BaseDistribution]


class _RankingTpe(optuna.samplers.TPESampler):
    """Optuna's TPE. `ranked`: each parameter's samples of the last model, the best first.

    They are as Optuna keeps them, numbers of choices.
    """

    def __init__(self, **settings: Any) -> None:
        """No model yet. settings: Optuna's own."""
        super().__init__(**settings)
        self.ranked: dict[str, list[float]] = {}

    def _compute_acquisition_func(self, samples: Any, mpe_below: Any, mpe_above: Any) -> Any:
        """What Optuna maximises over the samples; they are kept, in that order."""
        values = super()._compute_acquisition_func(samples, mpe_below, mpe_above)
        order = (-values).argsort(kind="stable")
        self.ranked = {name: each[order].tolist() for name, each in samples.items()}
        return values


class PlanFirstSampler(optuna.samplers.BaseSampler):
    """For trials with a parameter `plan` and others that are called `PLAN.KNOB`."""

    def __init__(self, seed: int) -> None:
        """No trial has been seen yet."""
        self.looks_further = False
        self.further: list[dict[str, Any]] = []
        settings: dict[str, Any] = {
            "seed": seed, "multivariate": True, "constant_liar": True, "n_startup_trials": STARTUP
        }  # fmt: skip
        self._tpe = optuna.samplers.TPESampler(**settings)
        self._ranking = _RankingTpe(**settings, n_ei_candidates=FURTHER)
        self._groups: list[_Group] = []
        self._seen: set[int] = set()

    def reseed_rng(self) -> None:
        """Another seed."""
        self._tpe.reseed_rng()
        self._ranking.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> _Group:
        """The parameters of finished trials that have more than one choice."""
        for each in study.get_trials(deepcopy=False, states=_FINISHED):
            if each.number not in self._seen:
                self._seen.add(each.number)
                self._groups = _split(self._groups, each.distributions)
        return {name: each for group in self._groups for name, each in group.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: _Group
    ) -> dict[str, Any]:
        """A plan, if there are several, and its knobs; nothing before there is a model."""
        tpe = self._ranking if self.looks_further else self._tpe
        found: dict[str, Any] = {}
        further: dict[str, list[Any]] = {}
        for group in sorted(self._groups, key=lambda group: "plan" not in group):
            plan = found.get("plan", trial.params.get("plan"))
            if "plan" in group or any(name.startswith(f"{plan}.") for name in group):
                found |= tpe.sample_relative(study, trial, group)
                if self.looks_further:  # the next group's model replaces this one's samples
                    for name in group.keys() & found.keys() - {"plan"}:
                        numbers = self._ranking.ranked[name]
                        further[name] = [group[name].to_external_repr(each) for each in numbers]
        chosen = {"plan": found["plan"]} if "plan" in found else {}
        rows = zip(*further.values(), strict=True)
        self.further = [chosen | dict(zip(further, row, strict=True)) for row in rows]
        return found

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that is in no group yet."""
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Nothing: groups are updated when they are needed."""


def _split(groups: list[_Group], met: Mapping[str, BaseDistribution]) -> list[_Group]:
    """The groups, split into parameters that a trial has and those that it lacks."""
    new = dict(sorted((name, each) for name, each in met.items() if not each.single()))
    found: list[_Group] = []
    for group in groups:
        found.append({name: each for name, each in group.items() if name in new})
        found.append({name: each for name, each in group.items() if name not in new})
        new = {name: each for name, each in new.items() if name not in group}
    return [group for group in [*found, new] if group]
