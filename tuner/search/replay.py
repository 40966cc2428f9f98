"""An evaluator that looks up recorded measurements, to test searches without a GPU.

Usage:
    evaluator = ReplayEvaluator(records)
    search(space, evaluator, …)
    evaluator.asked        # how many evaluations the search spent
"""

from collections.abc import Iterable, Sequence

from flashtune.kernels.plans.config import Config, parse_config
from flashtune.tuner.search.evaluate import Evaluation, Steps
from flashtune.tuning_db.record import Measurement, Outcome, Provenance, Record


class ReplayEvaluator:
    """Gives each config its recorded measurement; a config without one is INVALID."""

    provenance = Provenance.MEASURED

    def __init__(self, records: Iterable[Record], *, at_once: int = 1) -> None:
        """`at_once`: how many configs may be under way, as with parallel compilers."""
        self._found = {parse_config(record.config): record.measurement for record in records}
        self._at_once = at_once
        self._submitted: list[Config] = []
        self.asked = 0

    @property
    def room(self) -> int:
        """How many more configs may be submitted now."""
        return self._at_once - len(self._submitted)

    @property
    def pending(self) -> int:
        """Configs submitted whose evaluation has not been collected."""
        return len(self._submitted)

    @property
    def workers(self) -> tuple[int, int]:
        """As many as configs may be under way."""
        return self._at_once, self._at_once

    @property
    def starves(self) -> bool:
        """Never: nothing takes time."""
        return False

    def submit(self, config: Config) -> None:
        """Take a config."""
        self._submitted.append(config)
        self.asked += 1

    def rest(self, seconds: float) -> None:
        """Return at once: there is nothing to wait for."""

    def collect(self) -> list[Evaluation]:
        """The measurement of the config submitted first."""
        if not self._submitted:
            return []
        config = self._submitted.pop(0)
        missing = Measurement(outcome=Outcome.INVALID, error="not on record")
        return [Evaluation(config, self._found.get(config, missing))]

    def compare(self, configs: Sequence[Config]) -> Steps[list[Evaluation]]:
        """Nothing: there is nothing new to look up."""
        yield from ()
        return []

    def close(self) -> None:
        """Nothing is under way."""
