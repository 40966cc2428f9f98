"""What every evaluator promises, and what each makes of workers' replies."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest

from flashtune.kernels.backends.cpp.this_cpu import this_cpu
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.kernels.plans.config import Config
from flashtune.kernels.predict.cost_model import VERSION, predict
from flashtune.tuner.search.evaluate import (
    Evaluation,
    Evaluator,
    MeasuringEvaluator,
    PredictingEvaluator,
)
from flashtune.tuner.search.replay import ReplayEvaluator
from flashtune.tuner.search.space import Space
from flashtune.tuner.workers.answers.reply import Reply
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Measurement, Outcome

FITS = tuple(
    KernelUse(kernel=name, programs=8, warps=4, registers=32, shared_bytes=0, spilled=0)
    for name in ("score", "select", "gather")
)


def ok(time_us: float) -> Measurement:
    return Measurement(outcome=Outcome.OK, median_us=time_us)


class InstantPool:
    """A pool without processes: `reply` answers each task when it is waited for."""

    def __init__(self, size: int, reply: Callable[[Task], Reply]) -> None:
        self.size, self.reply = size, reply
        self.tasks: deque[Task] = deque()
        self.asked: list[Task] = []
        self.cancelled = 0

    @property
    def working(self) -> int:
        return self.size

    @property
    def sites(self) -> dict[str, int]:
        return {"": self.size}

    def pending(self, owner: object) -> int:
        return len(self.tasks)

    def submit(self, task: Task, seconds: float, **where: object) -> None:
        assert seconds > 0
        self.tasks.append(task)
        self.asked.append(task)

    def collect(self, owner: object) -> list[tuple[Task, Reply]]:
        return [(task, self.reply(task)) for task in [self.tasks.popleft()]] if self.tasks else []

    def cancel(self, owner: object) -> None:
        self.cancelled += 1
        self.tasks.clear()


def compared(evaluator: Evaluator, configs: list[Config]) -> list[Evaluation]:
    """What a comparison comes to: nothing is waited for here."""
    steps = evaluator.compare(configs)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.fixture
def space(free_space) -> Space:
    return free_space("slack", "evict")


def compiles(task: Task) -> Reply:
    return Reply(uses=FITS)


def measures(task: Task) -> Reply:
    return Reply(measurements=tuple(ok(10.0 + number) for number in range(len(task.candidates))))


@pytest.fixture
def evaluators(space: Space, recorded) -> dict[str, Evaluator]:
    configs = list(space.configs())
    problem, device = space.problem, space.device
    return {
        "replay": ReplayEvaluator([recorded(config, 10.0) for config in configs], at_once=3),
        "predict": PredictingEvaluator(problem, device, InstantPool(2, compiles)),
        "measure": MeasuringEvaluator(
            problem, device, InstantPool(2, compiles), InstantPool(1, measures), seed=0
        ),
    }


@pytest.mark.parametrize("name", ["replay", "predict", "measure"])
def test_the_contract(evaluators: dict[str, Evaluator], name: str, space: Space) -> None:
    evaluator = evaluators[name]
    room, waiting = evaluator.room, list(space.configs())
    assert room > 0
    assert evaluator.pending == 0
    answers: dict[Config, Measurement] = {}
    submitted = 0
    while waiting or evaluator.pending:
        while waiting and evaluator.room:
            evaluator.submit(waiting.pop())
            submitted += 1
            assert evaluator.pending == submitted - len(answers)
        assert evaluator.pending <= room
        for evaluation in evaluator.collect():
            assert evaluation.config not in answers
            answers[evaluation.config] = evaluation.measurement
    assert set(answers) == set(space.configs())
    assert {each.outcome for each in answers.values()} == {Outcome.OK}
    assert evaluator.room == room
    assert len(compared(evaluator, list(answers)[:2])) in (0, 2)
    evaluator.close()


def test_replay_says_what_is_not_on_record(space: Space, recorded) -> None:
    known, unknown = list(space.configs())[:2]
    evaluator = ReplayEvaluator([recorded(known, 10.0)], at_once=2)
    evaluator.submit(known)
    evaluator.submit(unknown)
    assert [each.measurement.outcome for each in [*evaluator.collect(), *evaluator.collect()]] == [
        Outcome.OK,
        Outcome.INVALID,
    ]
    assert evaluator.asked == 2


def test_what_spills_is_predicted_to_fail(space: Space) -> None:
    spilling = KernelUse(
        kernel="gather", programs=8, warps=4, registers=255, shared_bytes=0, spilled=48
    )
    pool = InstantPool(1, lambda task: Reply(uses=(*FITS[:2], spilling)))
    evaluator = PredictingEvaluator(space.problem, space.device, pool)
    evaluator.submit(next(space.configs()))
    [evaluation] = evaluator.collect()
    assert evaluation.measurement.outcome is Outcome.OUT_OF_RESOURCES
    assert evaluation.measurement.error == "spills registers (bytes per thread: {'gather': 48})"


def test_kernels_of_which_nothing_was_said_are_a_failure(space: Space) -> None:
    pool = InstantPool(1, lambda task: Reply(uses=(FITS[0], replace(FITS[1], kernel="other"))))
    evaluator = PredictingEvaluator(space.problem, space.device, pool)
    evaluator.submit(next(space.configs()))
    [evaluation] = evaluator.collect()
    assert evaluation.measurement.outcome is Outcome.CRASH
    assert evaluation.measurement.error == "the worker did not report what select needs"


def test_kernels_that_would_take_days_are_no_prediction(space: Space) -> None:
    most = 2**31 - 1
    uses = tuple(replace(each, programs=most, warps=most) for each in FITS)
    evaluator = PredictingEvaluator(
        space.problem, space.device, InstantPool(1, lambda task: Reply(uses=uses))
    )
    evaluator.submit(next(space.configs()))
    [evaluation] = evaluator.collect()
    assert evaluation.measurement.outcome is Outcome.INVALID
    assert "predicted: median_us must be microseconds from" in evaluation.measurement.error


def test_predictions_name_the_cost_model(evaluators: dict[str, Evaluator], space: Space) -> None:
    evaluator = evaluators["predict"]
    evaluator.submit(next(space.configs()))
    [evaluation] = evaluator.collect()
    measurement = evaluation.measurement
    assert measurement.policy == VERSION
    assert measurement.samples == 0
    found = predict(Candidate(space.problem, evaluation.config, space.device), FITS)
    assert measurement.median_us == found.time_us
    assert measurement.spread_us == found.high_us - found.low_us


def test_a_plan_that_is_not_predicted_is_a_failure_and_no_more(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashtune.kernels.predict.stages.registry.PLAN_STAGES", {})
    evaluator = PredictingEvaluator(space.problem, space.device, InstantPool(1, compiles))
    evaluator.submit(next(space.configs()))
    [evaluation] = evaluator.collect()
    assert evaluation.measurement.outcome is Outcome.INVALID
    assert "search on the machine itself" in evaluation.measurement.error


def test_what_fails_to_compile_is_not_measured(space: Space) -> None:
    failure = Measurement(outcome=Outcome.COMPILE_ERROR, error="no")
    measurer = InstantPool(1, measures)
    evaluator = MeasuringEvaluator(
        space.problem,
        space.device,
        InstantPool(1, lambda task: Reply(measurements=(failure,))),
        measurer,
        seed=0,
    )
    evaluator.submit(next(space.configs()))
    assert [each.measurement for each in evaluator.collect()] == [failure]
    assert measurer.asked == []


def test_the_best_time_so_far_goes_with_each_measurement(space: Space) -> None:
    outcomes = [(Outcome.OK, 30.0), (Outcome.OK, 25.0), (Outcome.PRUNED, 15.0), (Outcome.OK, 24.0)]
    found, asked = measured_in_turn(space, outcomes, {})
    assert [task.best_us for task in asked if task.kind == "measure"] == [None, 30.0, 25.0, 25.0]
    assert {task.seed for task in asked} == {5}
    assert found == outcomes


def measured_in_turn(
    space: Space, outcomes: list[tuple[Outcome, float]], again: dict[int, float | None]
) -> tuple[list[tuple[Outcome, float | None]], list[Task]]:
    """What becomes of configs that a worker says this of, and other times when asked `again`."""
    configs = list(space.configs())[: len(outcomes)]

    def reply(task: Task) -> Reply:
        number = configs.index(task.candidates[0].config)
        outcome, time_us = outcomes[number]
        if task.kind == "measure":
            return Reply(measurements=(Measurement(outcome=outcome, median_us=time_us),))
        time = again.get(number, time_us)
        found = CRASH if time is None else ok(time)
        return Reply(measurements=(replace(found, policy="final-behind"),))

    measurer = InstantPool(1, reply)
    evaluator = MeasuringEvaluator(
        space.problem, space.device, InstantPool(1, compiles), measurer, seed=5
    )
    answers: dict[Config, Measurement] = {}
    for config in configs:
        evaluator.submit(config)
        while evaluator.pending:
            for each in evaluator.collect():
                assert each.config not in answers
                answers[each.config] = each.measurement
    assert {each.policy for each in answers.values()} == {"search-behind"}
    found = [(answers[each].outcome, answers[each].median_us) for each in configs]
    return found, measurer.asked


@pytest.mark.parametrize("liar", [0, 2])
@pytest.mark.parametrize("truth", [41.0, None])
def test_a_time_that_beats_the_rest_by_far_is_taken_twice_before_it_prunes(
    space: Space, liar: int, truth: float | None
) -> None:
    times = [40.0, 39.0, 38.0, 37.0]
    outcomes = [(Outcome.OK, 1.0 if n == liar else time) for n, time in enumerate(times)]
    found, asked = measured_in_turn(space, outcomes, {liar: truth})
    honest = [each for number, each in enumerate(outcomes) if number != liar]
    assert [each for number, each in enumerate(found) if number != liar] == honest
    assert found[liar] == ((Outcome.OK, 41.0) if truth else (Outcome.CRASH, None))
    assert min(task.best_us for task in asked if task.best_us) > 37.0
    twice = [task.candidates[0].config for task in asked if task.kind == "compare"]
    configs = list(space.configs())
    assert len(twice) == len({*twice, configs[liar]}) <= 3


class SlowToCompare(InstantPool):
    """Takes tasks a second time only when there is nothing else to do."""

    def submit(self, task: Task, seconds: float, **where: object) -> None:
        super().submit(task, seconds, **where)
        self.tasks.rotate(task.kind == "measure")


@pytest.mark.parametrize(
    ("again", "found", "twice"),
    [
        ({}, [20.0, 40.0, 30.0, 19.5], [0, 3]),
        ({0: None, 3: None}, [None, 40.0, 30.0, None], [0, 3, 2]),
        ({0: 41.0, 3: 41.0}, [41.0, 40.0, 30.0, 41.0], [0, 3, 2]),
    ],
)
def test_only_a_time_shorter_than_those_being_taken_again_is_taken_again_too(
    space: Space, again: dict[int, float | None], found: list[float | None], twice: list[int]
) -> None:
    """The others wait. If the shorter times were wrong, the shortest of those is next."""
    times = [20.0, 40.0, 30.0, 19.5]
    configs = list(space.configs())[:4]

    def reply(task: Task) -> Reply:
        number = configs.index(task.candidates[0].config)
        time_us = times[number] if task.kind == "measure" else again.get(number, times[number])
        return Reply(measurements=(CRASH if time_us is None else ok(time_us),))

    measurer = SlowToCompare(1, reply)
    evaluator = MeasuringEvaluator(
        space.problem, space.device, InstantPool(1, compiles), measurer, seed=5
    )
    for config in configs:
        evaluator.submit(config)
    answers: list[Evaluation] = []
    while evaluator.pending:
        assert len(answers) + evaluator.pending == len(configs)
        answers += evaluator.collect()
    assert len(answers) == len(configs)
    assert {each.config: each.measurement.median_us for each in answers} == dict(
        zip(configs, found, strict=True)
    )
    compared = [task.candidates[0].config for task in measurer.asked if task.kind == "compare"]
    assert compared == [configs[number] for number in twice]


def test_what_waits_for_a_second_time_is_abandoned_with_the_rest(space: Space) -> None:
    configs = list(space.configs())[:2]
    measurer = SlowToCompare(1, measures)
    evaluator = MeasuringEvaluator(
        space.problem, space.device, InstantPool(1, compiles), measurer, seed=5
    )
    for config in configs:
        evaluator.submit(config)
    assert evaluator.collect() == evaluator.collect() == []
    assert (len(measurer.tasks), evaluator.pending) == (1, 2)
    evaluator.close()
    assert evaluator.pending == 0
    evaluator.submit(configs[1])
    [again] = [each for _ in range(3) for each in evaluator.collect()]
    assert (again.config, evaluator.pending) == (configs[1], 0)


def test_a_real_lead_is_believed_when_it_shows_again(space: Space) -> None:
    outcomes = [(Outcome.OK, 40.0), (Outcome.OK, 20.0), (Outcome.OK, 19.0)]
    found, asked = measured_in_turn(space, outcomes, {})
    assert found == outcomes
    assert [task.kind for task in asked] == ["measure", "compare"] * 2 + ["measure"]
    assert asked[-1].best_us == 20.0


CRASH = Measurement(outcome=Outcome.CRASH, error="the worker died by signal 11")


@pytest.fixture
def comparison(space: Space):
    """Four configs compared by workers that do as told: `comparison(reply)`. Gives the times (or
    outcomes, or None) in order, and the numbers of the configs that each task was about.
    """
    configs = list(space.configs())[:4]

    def compare(reply: Callable[[list[int]], list[Measurement | None]]):
        def answer(task: Task) -> Reply:
            return Reply(
                measurements=tuple(reply([configs.index(each.config) for each in task.candidates]))
            )

        measurer, compilers = InstantPool(1, answer), InstantPool(1, compiles)
        evaluator = MeasuringEvaluator(space.problem, space.device, compilers, measurer, seed=0)
        evaluator.submit(configs[0])
        found = {each.config: each.measurement for each in compared(evaluator, configs)}
        assert evaluator.pending == 0  # what was under way is given up
        assert {task.kind for task in measurer.asked} == {"compare"}
        asked = [
            [configs.index(each.config) for each in task.candidates] for task in measurer.asked
        ]
        known = [found.get(config) for config in configs]
        return [each and (each.median_us or each.outcome.value) for each in known], asked

    return compare


def test_a_finalist_that_fails_leaves_the_others_their_times(comparison) -> None:
    found, asked = comparison(lambda numbers: [CRASH if n == 2 else ok(10.0 + n) for n in numbers])
    assert found == [10.0, 11.0, "crash", 13.0]
    assert asked == [[0, 1, 2, 3]]


def test_those_left_when_the_device_was_lost_are_compared_by_another_worker(comparison) -> None:
    def reply(numbers: list[int]) -> list[Measurement | None]:
        if 2 in numbers:
            return [CRASH if n == 2 else None for n in numbers]
        return [ok(10.0 + n) for n in numbers]

    assert comparison(reply) == ([10.0, 11.0, "crash", 13.0], [[0, 1, 2, 3], [0, 1, 3]])


def test_who_takes_the_worker_along_is_found_and_the_others_compared_again(comparison) -> None:
    def reply(numbers: list[int]) -> list[Measurement | None]:
        if 2 in numbers:
            return [None] * len(numbers) if len(numbers) > 1 else [CRASH]
        return [ok(10.0 + n if len(numbers) > 1 else 99.0) for n in numbers]

    found, asked = comparison(reply)
    assert found == [10.0, 11.0, "crash", 13.0]
    assert asked == [[0, 1, 2, 3], [0], [1], [2], [3], [0, 1, 3]]


def test_finalists_that_only_work_alone_keep_the_times_that_they_had_alone(comparison) -> None:
    def reply(numbers: list[int]) -> list[Measurement | None]:
        return [None] * len(numbers) if len(numbers) > 1 else [ok(10.0 + numbers[0])]

    found, asked = comparison(reply)
    assert found == [10.0, 11.0, 12.0, 13.0]
    assert len(asked) == 5


@pytest.mark.parametrize("answers", [[], [None]])
def test_configs_of_which_no_worker_says_anything_are_left_out(comparison, answers) -> None:
    found, asked = comparison(lambda numbers: answers)
    assert found == [None] * 4
    assert len(asked) == 5


def test_compilers_rest_where_they_would_disturb_the_timing(problem: Problem) -> None:
    """On a CPU nothing is measured before all is compiled, nor submitted before all is timed."""
    cpu = this_cpu()
    compiling: list[int] = []

    def reply(task: Task) -> Reply:
        compiling.append(len(compilers.tasks))
        return measures(task)

    compilers, measurer = InstantPool(2, compiles), InstantPool(1, reply)
    evaluator = MeasuringEvaluator(problem, cpu, compilers, measurer, seed=0)
    configs = list(islice(Space(problem, cpu).configs(), 14))
    answers: list[Config] = []
    largest = 0
    while configs or evaluator.pending:
        for _ in range(min(evaluator.room, len(configs))):
            assert not measurer.tasks
            evaluator.submit(configs.pop())
        largest = max(largest, evaluator.pending)
        answers += [each.config for each in evaluator.collect()]
    assert set(compiling) == {0}
    assert len(set(answers)) == len(answers) == 14
    assert largest > 1
