"""A worker's answer to a task, and how a search checks it.

Usage:
    line = to_line(request, reply.data())                 # at the worker
    reply = read_reply(answer_to(request, line), task)    # at the search; raises ReplyError

A candidate's misbehaviour is its failure: a worker reports it, and a time shorter than the device
could take (`least_time`) is turned into a failure here. A reply that none of our workers would
send raises ReplyError.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from flashtune.kernels.backends.target import policy_for
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.tuner.workers.answers.least_time import least_us
from flashtune.tuner.workers.answers.message import (
    ReplyError,
    flag,
    items,
    members,
    number,
    text,
    whole_number,
)
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.policy import FINAL, SEARCH
from flashtune.tuning_db.record import Measurement, Outcome

MOST_US = 1e9  # of a step: more than any deadline allows
_MOST_SAMPLES = 10**6
_MOST_USES = 64
_MOST_JOULES = 1e6  # of a step: a megawatt for a second
_MOST_NAME = 100  # characters
_MOST_COUNT = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One answer: a measurement per config, and for a compilation its kernels' resources.

    A successful compilation has no measurement. In a comparison, None stands for a config that was
    not timed, though perhaps not through its own fault: another one took the worker or its device
    down. `fatal` says that the worker must not be used any more.
    """

    measurements: tuple[Measurement | None, ...] = ()
    uses: tuple[KernelUse, ...] = ()
    fatal: bool = False

    @property
    def measurement(self) -> Measurement | None:
        """The measurement of a task's only config; None for a successful compilation."""
        return self.measurements[0] if self.measurements else None

    def data(self) -> dict[str, Any]:
        """The reply as plain data."""
        return asdict(self)


def policy_of(task: Task) -> str:
    """The policy of the measurements that a task asks for."""
    return policy_for(FINAL if task.kind == "compare" else SEARCH, task.device)


def read_reply(data: Any, task: Task) -> Reply:
    """Read `Reply.data` back as the answer to a task."""
    data = members(data, "measurements", "uses", "fatal")
    n_configs = len(task.candidates)
    reply = Reply(
        measurements=tuple(
            None if each is None else _measurement(each, task, task.candidates[place])
            for place, each in enumerate(items(data, "measurements", n_configs))
        ),
        uses=tuple(map(_use, items(data, "uses", _MOST_USES))),
        fatal=flag(data, "fatal"),
    )
    compiled = task.kind == "compile" and not reply.measurements
    if len(reply.measurements) != n_configs and not compiled:
        raise ReplyError(
            f"it has measurements of {len(reply.measurements)} configs, not {n_configs}"
        )
    if None in reply.measurements and task.kind != "compare":
        raise ReplyError("it has no outcome for the config")
    if reply.uses and not compiled:
        raise ReplyError("it reports kernels that were not to be compiled")
    return reply


def _measurement(data: Any, task: Task, candidate: Candidate) -> Measurement:
    data = members(data, *(field.name for field in fields(Measurement)))
    if data["outcome"] not in list(Outcome):
        raise ReplyError("outcome is unknown")
    if data["policy"] != policy_of(task):
        raise ReplyError("policy differs from the task's")
    outcome = Outcome(data["outcome"])
    if outcome in (Outcome.OK, Outcome.PRUNED):
        return _timed(data, outcome, task, candidate)
    untimed = [data[name] is None for name in ("median_us", "spread_us", "joules")]
    if not all(untimed) or data["samples"] != 0:
        raise ReplyError(f"it has a time for the outcome {outcome.value}")
    return Measurement(outcome=outcome, error=text(data, "error"), policy=data["policy"])


def _timed(
    data: dict[str, Any], outcome: Outcome, task: Task, candidate: Candidate
) -> Measurement:
    pruned = task.kind == "measure" and task.best_us is not None
    if task.kind == "compile" or (outcome is Outcome.PRUNED and not pruned):
        raise ReplyError(f"outcome is {outcome.value}, which was not asked for")
    if data["error"] != "":
        raise ReplyError(f"it has an error for the outcome {outcome.value}")
    median_us = number(data, "median_us", MOST_US)
    spread_us = number(data, "spread_us", MOST_US)
    samples = whole_number(data, "samples", _MOST_SAMPLES, least=1)
    joules = None if data["joules"] is None else number(data, "joules", _MOST_JOULES)
    if (joules is not None) != (task.energy and outcome is Outcome.OK):
        raise ReplyError("it has energy that was not asked for, or lacks it")
    least = least_us(candidate.problem, candidate.device)
    if median_us < least:
        error = (
            f"a time of {median_us:.3g} us is impossible: reading its bytes takes at least "
            f"{least:.3g} us"
        )
        return Measurement(outcome=Outcome.WRONG_RESULT, error=error, policy=data["policy"])
    return Measurement(
        outcome=outcome,
        median_us=median_us,
        spread_us=spread_us,
        samples=samples,
        joules=joules,
        policy=data["policy"],
    )


def _use(data: Any) -> KernelUse:
    data = members(data, *(field.name for field in fields(KernelUse)))
    for name in items(data, "arguments", _MOST_USES):
        if not isinstance(name, str) or not name.isidentifier() or len(name) > _MOST_NAME:
            raise ReplyError("arguments are not names")
    return KernelUse(
        kernel=text(data, "kernel", _MOST_NAME),
        programs=whole_number(data, "programs", _MOST_COUNT, least=1),
        warps=whole_number(data, "warps", _MOST_COUNT, least=1),
        registers=whole_number(data, "registers", _MOST_COUNT, least=1),
        shared_bytes=whole_number(data, "shared_bytes", _MOST_COUNT),
        spilled=whole_number(data, "spilled", _MOST_COUNT),
        dynamic_bytes=whole_number(data, "dynamic_bytes", _MOST_COUNT),
        arguments=tuple(data["arguments"]),
    )
