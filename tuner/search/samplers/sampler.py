"""Optuna's samplers, by their names in `--sampler`. Listing them loads nothing."""

import warnings
from typing import TYPE_CHECKING

from flashtune.tuning_db.errors import FlashtuneError

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "gp", "random", "exhaustive")
MOST_SEED = 2**32 - 1  # of NumPy's generators


def make_sampler(name: str, seed: int) -> "optuna.samplers.BaseSampler":
    """Optuna's sampler of that name; raises FlashtuneError if a package is missing."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            from flashtune.tuner.search.samplers.plan_first import PlanFirstSampler

            return PlanFirstSampler(seed)
        if name == "gp":
            try:
                import scipy  # noqa: F401 (Optuna imports it only after some trials)

                return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
            except ImportError as error:
                raise FlashtuneError(
                    "--sampler gp needs scipy: install flashtune[gp], or use tpe"
                ) from error
        return optuna.samplers.RandomSampler(seed=seed)
