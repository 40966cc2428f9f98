"""What to evaluate next: defaults and known winners, then Optuna's and the best's neighbours.

Usage:
    proposals = Proposals(space, sampler="tpe", seed=0, near=records)
    proposals.recall(config, measurement)      # what earlier runs found
    for config in proposals:                   # never one that is known or under way
        …
    proposals.propose(several=True)            # or None: for several workers, which would wait
        proposals.learn(config, measurement)
"""

import bisect
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import optuna

from flashtune.kernels.backends.target import baseline_config, default_config
from flashtune.kernels.plans.config import Config, config_data, parse_config
from flashtune.kernels.runtime.choice import shape_distance
from flashtune.tuner.search.samplers.plan_first import STARTUP, PlanFirstSampler
from flashtune.tuner.search.samplers.sampler import make_sampler
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.record import Measurement, Outcome, Record

NEAR_WINNERS = 4
BEST = 3  # configs of a family whose neighbours are tried
FAIR = 25  # configs that a family may spend before it is judged by its best
FAR = 1.5  # a family whose best is this many times slower than the best of all is then dropped
_STALE = 2000  # known or invalid proposals in a row before the source counts as dry


_Timed = tuple[float, int, Config]  # a time, a number that tells equal times apart, the config


class Proposals:
    """An iterator of new configs that learns from the outcomes of earlier ones."""

    def __init__(self, space: Space, *, sampler: str, seed: int, near: Iterable[Record]) -> None:
        """`near`: records of any problems or devices, whose configs are tried early.

        Raises FlashtuneError if the sampler lacks a package that it needs.
        """
        self.space = space
        self.known: dict[Config, Measurement] = {}
        self.failed = 0
        self._works: list[_Timed] = []  # fastest first
        self._families: dict[str, list[_Timed]] = {}  # configs with a time, pruned ones too
        self._spent: Counter[str] = Counter()  # configs of each family, including those under way
        self._sampler = sampler
        self._random = random.Random(seed)
        self._trials: dict[Config, int] = {}  # trials under way, as the storage counts them
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Trials end in the storage itself: `Study.tell` would copy each of them whole.
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage, sampler=make_sampler(sampler, seed), direction="minimize"
        )
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)
        self._first = deque([*references(space), *_winners(space, near), *space.starts()])
        self._turn = 0
        self._ranked: Iterator[Mapping[str, Any]] = iter(())  # parameters, best first
        self._serves = 0  # as soon as so many results are known, they are no longer proposed
        self._all = space.configs()

    def __iter__(self) -> Iterator[Config]:
        """The iterator itself."""
        return self

    def __next__(self) -> Config:
        """A config that is neither known nor under way; StopIteration if none is left."""
        config = self.propose()
        if config is None:
            raise StopIteration
        return config

    def propose(self, *, several: bool = False, hurry: bool = False) -> Config | None:
        """A config that is neither known nor under way; None if none is left.

        several: there are several workers, which would wait for Optuna to fit a model for each
        proposal. hurry: they wait now.
        """
        if self._sampler == "exhaustive":
            fresh = next((each for each in self._all if self._is_new(each)), None)
            return None if fresh is None else self._claim(fresh, None)
        for stale in range(_STALE):
            config, trial = self._propose(stale, several, hurry)
            if config is not None and self._is_new(config):
                return self._claim(config, trial)
        return None

    def recall(self, config: Config, measurement: Measurement) -> None:
        """Take over a result of an earlier run; configs outside the space are ignored."""
        if self.space.parameters(config) is None:
            return
        self._spent[self.space.family(config)] += 1
        self._know(config, measurement)
        state, time_us = optuna.trial.TrialState, measurement.median_us
        self._add_trial(config, state.PRUNED if time_us is None else state.COMPLETE, time_us)

    def retry(self, config: Config) -> None:
        """Propose a config before all others; one outside the space is ignored."""
        if self.space.holds(config_data(config)):
            self._first.appendleft(config)

    def learn(self, config: Config, measurement: Measurement) -> None:
        """Report the outcome of a proposed config; a failure is a pruned trial."""
        self._know(config, measurement)
        self._end(self._trials.pop(config), measurement.median_us)

    def correct(self, config: Config, measurement: Measurement) -> None:
        """Replace what is known of a config, which gave another result when evaluated again."""
        self._know(config, measurement)

    @property
    def best(self) -> Config | None:
        """The fastest config that worked."""
        return self._works[0][-1] if self._works else None

    def ranked(self) -> list[Config]:
        """The configs that worked, fastest first."""
        return [config for *_, config in self._works]

    def _know(self, config: Config, measurement: Measurement) -> None:
        """Record a config's measurement, in order of time."""
        family = self._families.setdefault(self.space.family(config), [])
        before = self.known.get(config)
        if before is not None:
            self.failed -= before.median_us is None
            for ranking in (family, self._works):
                ranking[:] = [each for each in ranking if each[-1] != config]
        self.known[config] = measurement
        if measurement.median_us is None:
            self.failed += 1
            return
        timed = (measurement.median_us, len(self.known), config)
        for ranking in [family, *([self._works] if measurement.outcome is Outcome.OK else [])]:
            bisect.insort(ranking, timed, key=lambda each: each[:2])

    def _propose(self, stale: int, several: bool, hurry: bool) -> tuple[Config | None, int | None]:
        """The next proposal, new or not, and the number of its trial if Optuna made one.

        A Gaussian process repeats itself where it expects the best, valid or not: after a few
        `stale` proposals in a row a neighbour is used instead. It also takes long, so a neighbour
        is preferred in a hurry.
        """
        if self._first:
            return self._first.popleft(), None
        self._turn += 1
        instead = self._sampler == "gp" and ((hurry and not stale) or stale % 4 == 3)
        if instead or (self._sampler == "tpe" and self._turn % 2):
            return self._neighbour(), None
        if several and self._sampler == "tpe":
            further = self._further()
            if further is not None or len(self.known) < STARTUP:
                return further, None
        return self._ask(several)

    def _add_trial(
        self, config: Config, state: optuna.trial.TrialState, time_us: float | None = None
    ) -> int:
        """Add a trial that Optuna did not propose."""
        trial = optuna.trial.create_trial(
            params=self.space.parameters(config),
            distributions=self.space.distributions(config),
            value=time_us,
            state=state,
        )
        return self._storage.create_new_trial(self._study_id, trial)

    def _end(self, trial: int, time_us: float | None) -> None:
        """Tell Optuna how a trial ended; a failure is a pruned one."""
        states = optuna.trial.TrialState
        if time_us is None:
            self._storage.set_trial_state_values(trial, states.PRUNED)
        else:
            self._storage.set_trial_state_values(trial, states.COMPLETE, [time_us])

    def _claim(self, config: Config, trial: int | None) -> Config:
        """Mark a config as under way, with a trial of its own if Optuna did not propose it."""
        if trial is None:
            trial = self._add_trial(config, state=optuna.trial.TrialState.RUNNING)
        self._trials[config] = trial
        self._spent[self.space.family(config)] += 1
        return config

    def _further(self) -> Config | None:
        """A valid config of Optuna's last model, the next best; a random one before there is any.

        None if the random one is invalid, or if the model serves no more: it does so for a quarter
        as many results as it knew. A model of few results would else be asked for many configs,
        which are much alike.
        """
        if len(self.known) < STARTUP:
            drawn = self.space.drawn(self._random)
            return drawn if self.space.is_valid(drawn) else None
        ranked = self._ranked if len(self.known) < self._serves else ()
        configs = (self.space.drawn(self._random, each) for each in ranked)
        return next(
            (each for each in configs if self._is_new(each) and self.space.is_valid(each)), None
        )

    def _ask(self, several: bool) -> tuple[Config | None, int | None]:
        """Optuna's proposal; Optuna is told at once if that is invalid or known."""
        sampler = self._study.sampler
        if isinstance(sampler, PlanFirstSampler):
            sampler.looks_further = several
        asked = self._study.ask()
        config, reason = self.space.suggest(asked)
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, asked.number)
        if isinstance(sampler, PlanFirstSampler):
            self._ranked = iter(sampler.further)
            self._serves = len(self.known) + len(self.known) // 4
        if reason is None and self._is_new(config):
            return config, trial
        known = self.known.get(config) if reason is None else None
        self._end(trial, known.median_us if known else None)
        return None, None

    def _neighbour(self) -> Config | None:
        """A neighbour of one of a family's best configs.

        A family with few evaluations gets as many turns as the best one; after that, it gets more
        turns the nearer its best is to the best of all.
        """
        families = {name: ranking for name, ranking in self._families.items() if ranking}
        if not families:
            return None
        best_us = min(ranking[0][0] for ranking in families.values())
        weights = [
            FAR - 1 if self._spent[name] < FAIR else max(0.0, FAR - ranking[0][0] / best_us)
            for name, ranking in families.items()
        ]
        name = self._random.choices(list(families), weights)[0]
        config = self._random.choice(families[name][:BEST])[-1]
        return self.space.neighbour(config, self._random)

    def _is_new(self, config: Config) -> bool:
        return config not in self.known and config not in self._trials


def references(space: Space) -> list[Config]:
    """The default and the baseline, if they are in the space."""
    both = (
        default_config(space.problem, space.device),
        baseline_config(space.problem, space.device),
    )
    return [config for config in both if space.parameters(config) is not None]


def _winners(space: Space, near: Iterable[Record]) -> list[Config]:
    """Valid configs of the nearest records, this device's first."""
    ranked = []
    for number, record in enumerate(near):
        distance = shape_distance(space.problem, record.problem)
        if distance is not None and record.measurement.outcome is Outcome.OK:
            ranked.append((record.device != space.device.name, distance, number, record))
    found: dict[Config, None] = {}
    for *_, record in sorted(ranked, key=lambda row: row[:3]):
        if space.holds(record.config):
            found[parse_config(record.config)] = None
    return list(found)[:NEAR_WINNERS]
