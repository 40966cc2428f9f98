"""TPE by plans: the groups that Optuna would find, and no model of a plan that is not proposed."""

from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution

from flashtune.tuner.search.samplers.plan_first import FURTHER, STARTUP, PlanFirstSampler

CHOICES = CategoricalDistribution([1, 2, 4, 8])
PLANS = CategoricalDistribution(["staged", "batched"])


def objective(trial: optuna.Trial) -> float:
    """`staged.ring` exists only with four stages, `batched.rows` is best at 8."""
    if trial.suggest_categorical("plan", PLANS.choices) == "batched":
        return 20.0 - trial.suggest_categorical("batched.rows", CHOICES.choices)
    stages = trial.suggest_categorical("staged.stages", CHOICES.choices)
    trial.suggest_categorical("staged.fixed", [3])
    return 30.0 - (trial.suggest_categorical("staged.ring", CHOICES.choices) if stages == 4 else 0)


def searched(sampler: optuna.samplers.BaseSampler, trials: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=trials)
    return study


def test_models_are_of_the_plan_and_of_the_knobs_that_occur_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, set[str]]] = []
    sample = optuna.samplers.TPESampler.sample_relative

    def note(
        self: Any,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        space: Mapping[str, BaseDistribution],
    ) -> dict[str, Any]:
        asked.append((trial.number, set(space)))
        return sample(self, study, trial, dict(space))

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", note)
    study = searched(PlanFirstSampler(0), 60)
    plans = {trial.number: trial.params["plan"] for trial in study.trials}
    assert set(plans.values()) == {"staged", "batched"}
    late = [(plans[number], group) for number, group in asked if number >= 40]
    assert {frozenset(group) for _, group in late} == {
        frozenset({"plan"}),
        frozenset({"batched.rows"}),
        frozenset({"staged.stages"}),
        frozenset({"staged.ring"}),
    }
    for plan, group in late:
        assert group == {"plan"} or all(name.startswith(f"{plan}.") for name in group)


def test_the_knobs_are_those_of_optunas_own_groups() -> None:
    sampler = PlanFirstSampler(0)
    study = searched(sampler, 60)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        own = optuna.samplers.TPESampler(multivariate=True, group=True)
    assert sampler.infer_relative_search_space(
        study, study.trials[-1]
    ) == own.infer_relative_search_space(study, study.trials[-1])


def test_it_learns_and_a_seed_gives_the_same_trials() -> None:
    one, same, other = (searched(PlanFirstSampler(seed), 60) for seed in (0, 0, 1))
    params = [[trial.params for trial in study.trials] for study in (one, same, other)]
    assert params[0] == params[1] != params[2]
    late = [trial.value for trial in one.trials[30:]]
    early = [trial.value for trial in one.trials[:STARTUP]]
    assert one.best_value == 12.0
    assert late.count(12.0) / len(late) > early.count(12.0) / len(early)


def of_one_plan(trial: optuna.Trial) -> float:
    """Both knobs exist in every trial, so that Optuna needs no groups."""
    trial.suggest_categorical("plan", ["staged"])
    stages = trial.suggest_categorical("staged.stages", CHOICES.choices)
    return 20.0 - stages * trial.suggest_categorical("staged.ring", CHOICES.choices)


def test_of_one_plan_it_is_optunas_own_tpe() -> None:
    """As it proposes for a single worker."""
    own = optuna.samplers.TPESampler(
        seed=3, multivariate=True, constant_liar=True, n_startup_trials=STARTUP
    )
    params = []
    for sampler in (PlanFirstSampler(3), own):
        study = optuna.create_study(sampler=sampler)
        study.optimize(of_one_plan, n_trials=40)
        params.append([trial.params for trial in study.trials])
    assert params[0] == params[1]


def test_a_model_tells_more_than_one_proposal_the_best_first() -> None:
    sampler = PlanFirstSampler(0)
    study = searched(sampler, 60)
    assert sampler.further == [], "nobody asked for more"
    sampler.looks_further = True
    trial = study.ask()
    objective(trial)
    plan = trial.params["plan"]
    proposed = {name: each for name, each in trial.params.items() if name != "staged.fixed"}
    assert len(sampler.further) == FURTHER
    assert sampler.further[0] == {**sampler.further[0], **proposed}, "Optuna's own is the best"
    assert {each["plan"] for each in sampler.further} == {plan}
    assert len({tuple(each.values()) for each in sampler.further}) > 1
    sampler.looks_further = False
    objective(study.ask())
    assert sampler.further == []
