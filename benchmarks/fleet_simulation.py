"""How one driver scales: searches with 1 to 512 simulated workers, on a simulated clock.

    python benchmarks/fleet_simulation.py --compile-times compile.json       # records them first
    python benchmarks/fleet_simulation.py --from compile.json --out simulation.json

The driver is the real one: proposals, Optuna, evaluators, pools, lines of JSON, poll, the
database. Its processor time advances the simulated clock, second for second; its waits for the
disk do not. Only workers are simulated. For recorded configs, a config's time is the one measured
on an H200; for others it is predicted by the cost model, which was fitted to those. Compiling
takes the processor time that it took here, and measuring takes the time that docs/performance.md
reports for an H200: 30 s for 150 evaluations. All recorded problems are searched in one run. With
--own-models each of Optuna's proposals has a model of its own, however many workers wait. With
--keep the databases stay, for a report of simulated searches:

    python benchmarks/fleet_simulation.py --from compile.json --workers 8 --problems 1 \
        --trials 1000 --keep kept
    flashtune report --db kept/8-0.db -o report.html
"""

import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from flashtune.kernels.backends.target import backend_of
from flashtune.kernels.measure.trial import FAR_BEHIND
from flashtune.kernels.plans.candidate import Candidate
from flashtune.kernels.plans.config import Config
from flashtune.kernels.predict.cost_model import shipped_model
from flashtune.tuner.predict.calibration import SHIPPED, read_calibration
from flashtune.tuner.search.evaluate import MeasuringEvaluator
from flashtune.tuner.search.proposal import Proposals
from flashtune.tuner.search.search import Budget, Event, Search
from flashtune.tuner.search.session import in_turns
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.answers.message import from_line, to_line
from flashtune.tuner.workers.answers.reply import Reply, policy_of
from flashtune.tuner.workers.connection import Connection, Ending
from flashtune.tuner.workers.pool import WorkerPool, rest
from flashtune.tuner.workers.process import wait_for_any
from flashtune.tuner.workers.task import Task
from flashtune.tuner.workers.transport import Place
from flashtune.tuning_db.device import Toolchain, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome
from flashtune.tuning_db.store import Store

WORKERS = (1, 8, 64, 512)
PROBES = (256, 512)
COMPILERS = 4  # for each worker that measures
MEASURE_SECONDS = 0.2  # 30 s for 150 evaluations, compilers keeping ahead: docs/performance.md
COMPARE_SECONDS = 1.0  # for finalists: about the replays of 40 measured configs
NOISE = 0.005  # of a time
SAMPLED = 60  # configs compiled to learn how long that takes


class Clock:
    """Simulated seconds: the driver's processor time, and its waits for workers."""

    def __init__(self) -> None:
        """The clock starts now."""
        self._waited = self._outside = 0.0
        self._began = time.process_time()
        self._now = 0.0

    @property
    def driver(self) -> float:
        """Processor seconds of the driver."""
        return time.process_time() - self._began - self._outside

    def __call__(self) -> float:
        """The time when the simulation last changed it: asking costs nothing."""
        return self._now

    def wait_until(self, when: float) -> None:
        """Set the clock forward."""
        self._waited += max(0.0, when - self._now)
        self._now = max(when, self._now)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock for the simulation's own work."""
        began = time.process_time()
        self._now = self._waited + began - self._began - self._outside
        try:
            yield
        finally:
            self._outside += time.process_time() - began


class Landscape:
    """The times of configs: as measured if recorded, else as predicted."""

    def __init__(self) -> None:
        """Read the shipped data."""
        self._measured = {
            (sample.problem, sample.config): sample.measurement.median_us
            for sample in read_calibration(SHIPPED).samples
        }
        self._model = shipped_model()
        self._known: dict[Candidate, float | None] = {}

    @property
    def problems(self) -> list[Problem]:
        """The recorded problems of one token in 16 bits, at 256 and 512 probes."""
        recorded = {problem for problem, _ in self._measured}
        usual = {
            replace(problem, n_tokens=1, epilogue="argmax")
            for problem in recorded
            if not problem.n_rescored and problem.n_probes in PROBES
        }
        return sorted(recorded & usual)

    def configs(self, problem: Problem) -> list[Config]:
        """The recorded configs of a problem."""
        return [config for other, config in self._measured if other == problem]

    def time_us(self, candidate: Candidate) -> float | None:
        """Microseconds; None if there is neither a record nor a prediction."""
        if candidate not in self._known:
            found = self._measured.get((candidate.problem, candidate.config))
            if found is None:
                try:
                    found = self._model.predict(candidate, candidate.launches).time_us
                except FlashtuneError:
                    found = None
            self._known[candidate] = found
        return self._known[candidate]


class Simulated:
    """A connection to a worker that answers when its time has come."""

    connected, unsent, has_more, is_quiet = True, 0, False, True

    def __init__(self, world: "World") -> None:
        """The worker is idle."""
        self._world = world
        self._reader, self._writer = os.pipe()
        self._answer = b""
        self.due = math.inf

    def fileno(self) -> int:
        """A pipe, as real workers have."""
        return self._reader

    def input(self) -> int | None:
        """None: all input is taken at once."""
        return None

    def push(self) -> None:
        """Nothing is unsent."""

    def write(self, line: str) -> None:
        """Take a request."""
        with self._world.clock.stopped():
            request, data = from_line(line)
            if data is None:  # the question whether it has started
                self._answer, self.due = line.encode(), self._world.clock()
                return
            reply, seconds = self._world.answer(Task.from_data(data))
            self._answer = to_line(request, reply.data()).encode()
            self.due = self._world.clock() + seconds

    def speak(self) -> None:
        """Make the answer readable."""
        os.write(self._writer, b".")
        self.due = math.inf

    def read(self) -> bytes | None:
        """The answer."""
        os.read(self._reader, 1)
        return self._answer

    def hang_up(self) -> None:
        """Nothing runs."""

    def end(self, patience: float = 0.0) -> Ending:
        """The worker ends at once."""
        with self._world.clock.stopped():
            os.close(self._reader)
            os.close(self._writer)
        return Ending(code=0, said="", why_lost=None)


class World:
    """The workers, and how long their work takes."""

    def __init__(self, landscape: Landscape, compile_seconds: Sequence[float], seed: int) -> None:
        """No request has been made yet."""
        self.clock = Clock()
        self._landscape, self._compile_seconds = landscape, compile_seconds
        self._random = random.Random(seed)

    def start(self) -> Connection:
        """Start a connection, as a transport does."""
        with self.clock.stopped():
            return Simulated(self)

    def answer(self, task: Task) -> tuple[Reply, float]:
        """A worker's reply, and the seconds until it comes."""
        if task.kind == "compile":
            return Reply(), self._random.choice(self._compile_seconds)
        measurements = tuple(self._measured(each, task) for each in task.candidates)
        seconds = MEASURE_SECONDS if task.kind == "measure" else COMPARE_SECONDS
        return Reply(measurements=measurements), seconds

    def ready(self, connections: Sequence[Any], seconds: float) -> list[Any]:
        """Instead of waiting, set the clock to the next event."""
        with self.clock.stopped():
            next_due = min((each.due for each in connections), default=math.inf)
            self.clock.wait_until(min(next_due, self.clock() + seconds))
            now = self.clock()
            for each in connections:
                if each.due <= now:
                    each.speak()
        return wait_for_any(connections, 0.0)

    def _measured(self, candidate: Candidate, task: Task) -> Measurement:
        time_us, policy = self._landscape.time_us(candidate), policy_of(task)
        if time_us is None:
            return Measurement(outcome=Outcome.CRASH, error="no time is known", policy=policy)
        time_us *= self._random.gauss(1.0, NOISE)
        slow = task.best_us is not None and time_us > FAR_BEHIND * task.best_us
        outcome = Outcome.PRUNED if slow and task.kind == "measure" else Outcome.OK
        return Measurement(
            outcome=outcome,
            median_us=time_us,
            spread_us=NOISE * time_us,
            samples=10,
            policy=policy,
        )


def simulate(
    landscape: Landscape,
    compile_seconds: Sequence[float],
    problems: Sequence[Problem],
    workers: int,
    trials: int,
    seed: int,
    keep: str | None,
) -> dict[str, Any]:
    """Search all problems at once; returns the results and their times.

    keep: a folder for the database.
    """
    world, device = World(landscape, compile_seconds, seed), find_device("h200")
    best: dict[Problem, list[tuple[float, float]]] = {problem: [] for problem in problems}
    evaluated: list[float] = []

    def told(problem: Problem) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            with world.clock.stopped():
                if not event.comparing:
                    evaluated.append(world.clock())
                if event.best is not None:
                    true_us = landscape.time_us(Candidate(problem, event.best, device))
                    assert true_us is not None
                    if not best[problem] or best[problem][-1][1] != true_us:
                        best[problem].append((world.clock(), true_us))

        return tell

    def pool(count: int, kind: str) -> WorkerPool:
        places = [Place(name=f"{kind} {number}", transport=world) for number in range(count)]
        return WorkerPool(places, ready=world.ready, clock=world.clock)

    with ExitStack() as stack:
        folder = keep or stack.enter_context(tempfile.TemporaryDirectory())
        store = stack.enter_context(Store(Path(folder, f"{workers}-{seed}.db")))
        compilers, measurers = pool(COMPILERS * workers, "compiler"), pool(workers, "worker")
        waiting, begun = list(problems), []
        evaluators = []
        while waiting or begun:
            while waiting and len(begun) < workers:
                problem = waiting.pop(0)
                evaluator = MeasuringEvaluator(
                    problem, device, compilers, measurers, seed=0, sharers=lambda: len(begun)
                )
                evaluators.append(evaluator)
                search = Search(
                    Space(problem, device, known_good=()),
                    evaluator,
                    store,
                    Budget(trials=trials),
                    toolchain=Toolchain(triton="3.6.0"),
                    seed=seed,
                    on_event=told(problem),
                )
                begun.append(search.steps())
            for seconds in in_turns(begun):
                rest([compilers, measurers], seconds)
        wall, driver = world.clock(), world.clock.driver
        compilers.close()
        measurers.close()
    busy = len(evaluated) * MEASURE_SECONDS / (workers * evaluated[-1])
    return {
        "workers": workers,
        "problems": len(problems),
        "trials": trials,
        "seed": seed,
        "wall_seconds": wall,
        "driver_seconds": driver,
        "evaluations": len(evaluated),
        "evaluations_per_second": len(evaluated) / evaluated[-1],
        "busy": busy,
        "best_us": {problem.describe(): best[problem] for problem in problems},
    }


def record_compile_times(landscape: Landscape, out: Path) -> None:
    """Processor seconds of compiling configs for an H200, each in a fresh cache."""
    device, problem = find_device("h200"), landscape.problems[-1]
    drawn = random.Random(0).sample(landscape.configs(problem), SAMPLED)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        backend_of(Candidate(problem, drawn[0], device)).compile(
            Candidate(problem, drawn[0], device)
        )
        seconds = []
        for config in drawn[1:]:
            before = _processor_seconds()
            candidate = Candidate(problem, config, device)
            backend_of(candidate).compile(candidate)
            seconds.append(round(_processor_seconds() - before, 3))
    out.write_text(json.dumps({"problem": problem.describe(), "seconds": seconds}) + "\n")
    print(f"{out}: {len(seconds)} configs, {sum(seconds) / len(seconds):.2f} s each")


def _processor_seconds() -> float:
    """The processor seconds of this process and of the compilers that it ran."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _in_its_own_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run one simulation in a new process: caches filled by another would make it cheaper."""
    program = (
        "import json, runpy, sys; names = runpy.run_path(sys.argv[1]); "
        "print(json.dumps(names['run_case'](json.loads(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, __file__, json.dumps(case)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run a simulation with these arguments."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if case["own_models"]:
        propose = Proposals.propose
        Proposals.propose = lambda self, **how: propose(self)  # type: ignore[method-assign]
    landscape = Landscape()
    problems = landscape.problems[-case["problems"] :]
    found = simulate(
        landscape,
        case["compile"],
        problems,
        case["workers"],
        case["trials"],
        case["seed"],
        case["keep"],
    )
    return {"own_models": case["own_models"], **found}


@click.command()
@click.option("--compile-times", type=click.Path(path_type=Path), help="Record them there.")
@click.option("--from", "source", type=click.Path(exists=True, path_type=Path))
@click.option("--workers", multiple=True, type=int, default=WORKERS)
@click.option("--problems", default=12)
@click.option("--trials", default=150)
@click.option("--seeds", default=1)
@click.option("--own-models", is_flag=True)
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for the databases.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    compile_times: Path | None,
    source: Path | None,
    workers: Sequence[int],
    problems: int,
    trials: int,
    seeds: int,
    own_models: bool,
    keep: Path | None,
    out: Path | None,
) -> None:
    """Record how long compiling takes, or simulate with what was recorded."""
    if compile_times is not None:
        record_compile_times(Landscape(), compile_times)
        return
    if source is None:
        raise click.UsageError("give --compile-times or --from")
    recorded = json.loads(source.read_text())
    if keep is not None:
        keep.mkdir(exist_ok=True)
    runs = []
    for count in workers:
        for seed in range(seeds):
            case = {
                "workers": count,
                "problems": problems,
                "trials": trials,
                "seed": seed,
                "own_models": own_models,
                "keep": str(keep) if keep else None,
                "compile": recorded["seconds"],
            }
            found = _in_its_own_process(case)
            runs.append(found)
            print(
                f"{count} workers, seed {seed}: {found['wall_seconds']:.1f} s, "
                f"{found['evaluations_per_second']:.1f} evaluations/s, driver "
                f"{1e3 * found['driver_seconds'] / found['evaluations']:.2f} ms each"
            )
    if out is not None:
        out.write_text(json.dumps({"compile": recorded, "runs": runs}) + "\n")


if __name__ == "__main__":
    main()
