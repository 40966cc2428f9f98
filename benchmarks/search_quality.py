"""How close a search comes to the best of an exhaustively measured space.

    flashtune search --sampler exhaustive --trials 100000 --db all.db --shape … --fix …
    python benchmarks/search_quality.py all.db --device h200 --shape … --fix …

Replays searches over the records, and prints the best of all, and for each seed the time found
with a share of the evaluations. With --cold, searches do without the starting points found by
hand, one of which may itself be the best.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flashtune.tuner.cli.options import DEVICE, FIX, SHAPE
from flashtune.tuner.search.replay import ReplayEvaluator
from flashtune.tuner.search.samplers.sampler import SAMPLERS
from flashtune.tuner.search.search import Budget, search
from flashtune.tuner.search.space import Space
from flashtune.tuning_db.device import Device
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Outcome
from flashtune.tuning_db.store import Store


@click.command()
@click.argument("database", type=click.Path(exists=True, path_type=Path))
@click.option("--device", type=DEVICE, required=True)
@click.option("--shape", "problem", type=SHAPE, required=True)
@click.option("--fix", "fixed", type=FIX, multiple=True)
@click.option("--share", default=0.15, help="Of the evaluations that a search may spend.")
@click.option("--seeds", default=5)
@click.option("--cold", is_flag=True, help="Without the known good starting points.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe")
def main(
    database: Path,
    device: Device,
    problem: Problem,
    fixed: Sequence[tuple[str, Any]],
    share: float,
    seeds: int,
    cold: bool,
    sampler: str,
) -> None:
    """Replay searches over an exhaustive database."""
    space = Space(problem, device, dict(fixed), known_good=() if cold else None)
    with Store(database, read_only=True) as store:
        records = store.records(device=device.name, problem=problem)
    records = [record for record in records if space.holds(record.config)]
    times = [
        record.measurement.median_us
        for record in records
        if record.measurement.outcome is Outcome.OK and record.measurement.median_us
    ]
    best = min(times)
    trials = int(share * len(records))
    print(f"{len(records)} configs on record, best {best:.2f} us; {trials} evaluations a search")
    for seed in range(seeds):
        evaluator = ReplayEvaluator(records)
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "replay.db")) as store:
            result = search(
                space,
                evaluator,
                store,
                Budget(trials=trials),
                toolchain=records[0].toolchain,
                sampler=sampler,
                seed=seed,
            )
        found = result.winner.measurement.median_us if result.winner else None
        assert found is not None
        print(
            f"seed {seed}: {found:.2f} us, {100 * (found / best - 1):+.1f} %, "
            f"{evaluator.asked} evaluations"
        )


if __name__ == "__main__":
    main()
