"""What is believed of a worker's line: its own request, types, ranges; all else is refused."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from flashtune.kernels.backends.target import default_config
from flashtune.kernels.plans.candidate import Candidate, KernelUse
from flashtune.tuner.workers.answers.least_time import least_us
from flashtune.tuner.workers.answers.message import ReplyError, answer_to, clean, to_line
from flashtune.tuner.workers.answers.reply import Reply, read_reply
from flashtune.tuner.workers.answers.report import read_bandwidth, read_report
from flashtune.tuner.workers.task import Task
from flashtune.tuning_db.device import Device, Toolchain, all_devices, find_device
from flashtune.tuning_db.problem import PRESETS, Problem, parse_shape
from flashtune.tuning_db.record import Measurement, Outcome, Provenance
from flashtune.tuning_db.table import prebuilt_table

OK = Measurement(
    outcome=Outcome.OK, median_us=20.0, spread_us=0.5, samples=10, policy="search-behind"
)
FINAL = replace(OK, policy="final-behind")
USE = KernelUse(
    kernel="score", programs=8, warps=4, registers=32, shared_bytes=0, arguments=("out",)
)
NASTY = "\x1b[2J\u202e\ud800\0[/b]\nWinner: \xff"
WRONG: list[Any] = [
    None, True, -1, -0.5, 0, 1.5, 10**19, 10**400, 1e308, float("inf"), float("nan"), "", "x",
    NASTY, "9" * 5000, [], ["x"], {}, {"a": 1}, [[]], {"outcome": "ok"},
]  # fmt: skip


@pytest.fixture
def task(problem: Problem, device: Device) -> Callable[..., Task]:
    def make(kind: str, configs: int = 1, **other: Any) -> Task:
        candidate = Candidate(problem, default_config(problem, device), device)
        return Task(kind=kind, candidates=(candidate,) * configs, **other)

    return make


def read(data: Any, task: Task) -> Reply:
    return read_reply(answer_to("mine", to_line("mine", data).encode()), task)


def test_what_a_worker_says_is_taken(task) -> None:
    pruned = replace(OK, outcome=Outcome.PRUNED, samples=2)
    failed = Measurement(outcome=Outcome.CRASH, error="no", policy="search-behind")
    for asked, reply in [
        (task("measure"), Reply(measurements=(OK,))),
        (task("measure", best_us=9.0), Reply(measurements=(pruned,))),
        (task("measure"), Reply(measurements=(failed,), fatal=True)),
        (task("compile"), Reply(uses=(USE, USE))),
        (task("compile"), Reply()),  # of a CPU's kernels nothing is known
        (task("compile"), Reply(measurements=(failed,))),
        (task("compare", 3), Reply(measurements=(FINAL, None, FINAL))),
    ]:
        assert read(reply.data(), asked) == reply


@pytest.mark.parametrize(
    ("kind", "reply", "said"),
    [
        ("measure", Reply(), "measurements of 0 configs, not 1"),
        ("measure", Reply(measurements=(OK, OK)), "measurements is not a list of at most 1"),
        ("measure", Reply(measurements=(None,)), "it has no outcome for the config"),
        ("measure", Reply(measurements=(FINAL,)), "policy differs"),
        ("compare", Reply(measurements=(OK,)), "policy differs from the task's"),
        ("measure", Reply(measurements=(replace(OK, samples=0),)), "samples is not a whole"),
        ("measure", Reply(measurements=(replace(OK, spread_us=None),)), "spread_us is not a num"),
        (
            "measure",
            Reply(measurements=(replace(OK, error="x"),)),
            "it has an error for the outcome ok",
        ),
        (
            "measure",
            Reply(measurements=(replace(OK, outcome=Outcome.PRUNED),)),
            "outcome is pruned, which was not asked for",
        ),
        (
            "measure",
            Reply(measurements=(OK,), uses=(USE,)),
            "kernels that were not to be compiled",
        ),
        ("compile", Reply(measurements=(OK,)), "outcome is ok, which was not asked for"),
        ("compile", Reply(uses=(replace(USE, registers=0),)), "registers is not a whole number"),
        ("compile", Reply(uses=(replace(USE, arguments=("a b",)),)), "arguments are not names"),
    ],
)
def test_what_was_not_asked_for_is_refused(task, kind: str, reply: Reply, said: str) -> None:
    with pytest.raises(ReplyError, match=said):
        read(reply.data(), task(kind))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "not JSON"),
        (b"Segmentation fault? no, {garbage]", "not JSON"),
        (b"\xff\xfe\x00\x01", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not an object"),
        (b'{"request": "mine", "content": NaN}', "NaN is not a number"),
        (b'{"request": "mine", "content": -Infinity}', "-Infinity is not a number"),
        (b'{"request": "mine", "content": 1%s}' % (b"0" * 400), "a number of 401 digits"),
        (b'{"request": "mine", "content": 1, "content": 2}', "a name occurs twice"),
        (b'{"request": "mine"}', "not an object with just request, content"),
        (b'{"request": "yours", "content": 1}', "it answers another request"),
        (b'{"request": null, "content": 1}', "it answers another request"),
    ],
)
def test_a_line_that_answers_nothing_is_refused(line: bytes, said: str) -> None:
    with pytest.raises(ReplyError, match=said):
        answer_to("mine", line)


def test_a_time_that_nothing_could_take_is_the_configs_failure(task) -> None:
    asked = task("measure")
    least = least_us(asked.problem, asked.device)
    for time_us in (0, 0.0, 0.99 * least):
        data = Reply(measurements=(OK,)).data()
        data["measurements"][0]["median_us"] = time_us
        [found] = read(data, asked).measurements
        assert found.outcome is Outcome.WRONG_RESULT
        assert found.median_us is None
        assert "reading its bytes takes" in found.error
    [found] = read(Reply(measurements=(replace(OK, median_us=least),)).data(), asked).measurements
    assert found.median_us == least


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value inside."""
    inside = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for name, value in inside:
        found.append((*path, name))
        if isinstance(value, (dict, list, tuple)):
            found += places(value, (*path, name))
    return found


def spoiled(generator: random.Random, data: Any) -> Any:
    """The same with one value changed, left out or added."""
    data = json.loads(json.dumps(copy.deepcopy(data)))
    path = generator.choice(places(data))
    parent = data
    for name in path[:-1]:
        parent = parent[name]
    what = generator.randrange(5)
    if what == 0:
        del parent[path[-1]]
    elif what == 1 and isinstance(parent, dict):
        parent["more"] = generator.choice(WRONG)
    else:
        parent[path[-1]] = generator.choice(WRONG)
    return data


def test_whatever_is_changed_is_refused_or_in_range(task) -> None:
    generator = random.Random(5)
    asked = {
        "measure": (task("measure", best_us=9.0), Reply(measurements=(OK,))),
        "compare": (task("compare", 2), Reply(measurements=(FINAL, None))),
        "compile": (task("compile"), Reply(uses=(USE, USE))),
        "fail": (
            task("compile"),
            Reply(measurements=(Measurement(outcome=Outcome.CRASH, error="x"),)),
        ),
    }  # fmt: skip
    refused = 0
    for _ in range(3000):
        about, reply = asked[generator.choice(list(asked))]
        try:
            found = read(spoiled(generator, reply.data()), about)
        except ReplyError as error:
            assert len(str(error)) < 200
            refused += 1
            continue
        for each in filter(None, found.measurements):
            assert each.median_us is None or 0.05 <= each.median_us <= 1e9
            assert each.error.isprintable() and len(each.error) <= 500
            each.error.encode()
            assert each.policy == ("final-behind" if about.kind == "compare" else "search-behind")
        for use in found.uses:
            assert use.kernel.isprintable() and use.programs >= 1
            assert all(0 <= value < 2**31 for value in asdict(use).values() if type(value) is int)
    assert refused > 2000


class TestAReport:
    """Of a far machine's devices."""

    @staticmethod
    def report(device: Device) -> dict[str, Any]:
        tools = asdict(Toolchain(triton="3.6.0", torch="2.8.0"))
        found = {"trouble": "", "device": asdict(device), "toolchain": tools}
        missing = {"trouble": "no compiler", "device": None, "toolchain": None}
        return {"trouble": "", "devices": {device.vendor: found, "cpu": missing}}

    @pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
    def test_every_known_device_is_taken(self, device: Device) -> None:
        found = read_report(json.loads(json.dumps(self.report(device)))).found
        assert found["nvidia"].device == device
        assert (found["cpu"].device, found["cpu"].trouble) == (None, "no compiler")

    def test_a_known_device_with_other_figures_is_refused(self) -> None:
        fast = replace(find_device("orin"), memory_bandwidth=1e12)
        with pytest.raises(ReplyError, match="figures of orin-nano-super differ"):
            read_report(json.loads(json.dumps(self.report(fast))))

    def test_whatever_is_changed_is_refused_or_can_be_reckoned_with_and_shown(self) -> None:
        generator = random.Random(7)
        unknown = replace(find_device("orin"), name="another", aliases=("x",))
        refused = 0
        for _ in range(3000):
            data = spoiled(generator, self.report(unknown))
            try:
                report = read_report(answer_to("mine", to_line("mine", data).encode()))
            except ReplyError:
                refused += 1
                continue
            for each in report.found.values():
                assert each.trouble.isprintable() and len(each.trouble) <= 500
                if (device := each.device) is None:
                    continue
                assert device.title.isprintable() and device.name.isascii()
                assert 1 <= device.sm_count <= 2**16
                assert 0 <= device.memory_bandwidth <= 1e15
                assert 0 <= device.l2_bytes <= 2**40 and 0 <= device.clock_hz <= 1e11
                json.dumps(asdict(device)).encode()
        assert refused > 1500

    @pytest.mark.parametrize("wrong", [None, [], {}, {"bandwidth": "x"}, {"bandwidth": -1}])
    def test_a_bandwidth_is_a_number(self, wrong: Any) -> None:
        assert read_bandwidth({"bandwidth": 0}) == 0.0
        with pytest.raises(ReplyError):
            read_bandwidth(wrong)


def test_a_text_is_one_short_line_that_steers_no_terminal() -> None:
    assert clean(NASTY) == "?[2J???[/b] Winner: \xff"
    assert clean("a\r\n\tb" * 1000, 10) == "a ba ba ba"


class TestTheLeastTime:
    @pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
    @pytest.mark.parametrize("shape", PRESETS)
    def test_it_lies_below_what_memory_takes_and_above_nothing(
        self, device: Device, shape: str
    ) -> None:
        for more in ("", ",tokens=32", ",probes=16", ",epilogue=logits"):
            problem = parse_shape(shape + more)
            memory_us = 1e6 * problem.minimum_bytes / device.memory_bandwidth
            assert 0.05 <= least_us(problem, device) < memory_us / 3

    def test_all_that_was_measured_lies_far_above_it(self) -> None:
        tables = [prebuilt_table(device.name) for device in all_devices()]
        measured = [
            (each.measurement.median_us, least_us(each.problem, find_device(each.device)))
            for table in tables
            if table
            for each in table.records
            if each.provenance is Provenance.MEASURED
        ]
        assert len(measured) > 10
        assert min(time_us / least for time_us, least in measured if time_us) > 4

    def test_what_lies_in_a_cache_is_not_read_from_memory(self) -> None:
        problem, device = parse_shape("qwen3-0.6b"), find_device("orin")
        cached = replace(device, l2_bytes=2**30)
        assert least_us(problem, cached) < least_us(problem, device)

    def test_measured_bandwidths_are_not_believed(self, device: Device) -> None:
        """A CPU's was measured in a moment that may have been a bad one."""
        cpu = replace(device, vendor="cpu", arch="x86_64-avx2", memory_bandwidth=1.0, clock_hz=0)
        assert least_us(parse_shape("qwen3-0.6b"), cpu) < 10
