"""The switch for golden files, and what tests of kernels share."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashtune.kernels.plans.candidate import PLANS, TARGETS
from flashtune.kernels.plans.config import Config, enabled, knobs
from flashtune.tuning_db.problem import Problem

RandomConfig = Callable[[random.Random], Config]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accept-golden",
        action="store_true",
        help="write generated source to tests/golden instead of comparing it",
    )


_WITHOUT_GPU = pytest.StashKey[int]()  # how many tests are left out for that


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none: hundreds of skips would hide the others."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        config.stash[_WITHOUT_GPU] = len(needing)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One process of several tells the one that prints."""
    if hasattr(session.config, "workeroutput"):
        count = session.config.stash.get(_WITHOUT_GPU, 0)
        session.config.workeroutput["without_gpu"] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what it tells; all collect the same tests."""
    count = getattr(node, "workeroutput", {}).get("without_gpu", 0)
    if count:
        node.config.stash[_WITHOUT_GPU] = count


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how many in one line."""
    count = config.stash.get(_WITHOUT_GPU, 0)
    if count:
        terminalreporter.write_line(f"{count} tests need a GPU, and there is none: left out")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries are built in a folder of the tests' own, which their processes share."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):  # one process of several
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHTUNE_CACHE", str(folder / "kernel-cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch computes in one thread: problems are tiny here, and processes share the cores.

    As many threads as cores in each process wait for one another most of the time.
    """
    import torch

    torch.set_num_threads(1)


def _dot(builder: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
    """The product of two tiles: the interpreter's own multiplies the bits of bf16 as integers."""
    wide = [builder.create_fp_ext(each, sums.dtype).data for each in (a, b)]
    return type(sums)(wide[0] @ wide[1] + sums.data, sums.dtype.scalar)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No first call says what it waits for: on a busy machine any of them may wait for long."""
    monkeypatch.setattr("flashtune.kernels.runtime.decoder.SILENCE", 3600.0)


@pytest.fixture(autouse=True)
def unraced(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Heads race only in tests that ask for `racing`: compilers would run in all others."""
    if "racing" not in request.fixturenames:
        monkeypatch.setattr("flashtune.kernels.runtime.decoder.MOST_SECONDS", 0.0)


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path look as if another user had made it."""
    theirs = set()

    def pretending(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(*arguments: object, **named: object) -> os.stat_result:
            found = look(*arguments, **named)
            if (found.st_dev, found.st_ino) not in theirs:
                return found
            return os.stat_result((*found[:4], 54321, *found[5:10]))

        return looked

    for name in ("lstat", "fstat"):
        monkeypatch.setattr(os, name, pretending(getattr(os, name)))

    def give(path: Path) -> None:
        found = path.lstat()
        theirs.add((found.st_dev, found.st_ino))

    return give


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """No device has kernels: heads run plain torch, and nothing is compiled."""
    from flashtune.kernels.backends.torch import TORCH

    with TARGETS.added(replace(TORCH, name="first")):  # it is asked before all others
        yield


@pytest.fixture
def abacus() -> Iterator[None]:
    """A kind of device and a plan that somebody added; it is asked before all others."""
    from toys.plan import EVERYTHING
    from toys.target import ABACUS

    with PLANS.added(EVERYTHING), TARGETS.added(ABACUS):
        yield


@pytest.fixture
def racing() -> None:
    """Heads of this test race as they do elsewhere."""


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels loaded from here on are run by Triton's interpreter.

    What runs a function is settled as it is decorated, so Triton's own library, decorated when
    it was imported, is decorated again. The interpreter may leave its own versions of builtins
    in `triton.language.core`; they are put back, so that later tests can compile. It cuts float32
    off to bf16 where compiled kernels round, and gives whole numbers the wrong bits there, so
    these conversions are torch's here.
    """
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    cut_off = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut_off(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)

    def widen(builder: Any, number: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return builder.cast_impl(number, target)
        rounded = torch.from_numpy(np.array(number.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", widen)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, value in list(vars(tl.core).items()):
        if not name.startswith("__"):
            monkeypatch.setattr(tl.core, name, value)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    again: dict[object, object] = {}
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                function = again.setdefault(value, triton.jit(value.fn))
                monkeypatch.setattr(module, name, function)


@pytest.fixture
def random_config() -> RandomConfig:
    """Any config that parses, valid for a problem or not: `random_config(rng)`."""

    def draw(rng: random.Random) -> Config:
        plan = rng.choice(list(PLANS.values())).config
        values = {}
        for name, known in knobs(plan).items():
            free = enabled(plan, name, values)
            values[name] = rng.choice(known["choices"]) if free else known["default"]
        return plan(**values)

    return draw


@pytest.fixture
def random_problem() -> Callable[[random.Random], Problem]:
    """A problem of odd sizes: `random_problem(rng)`."""

    def draw(rng: random.Random) -> Problem:
        clusters = rng.choice((1, 2, 31, 97, 500, 9496, 16384))
        return Problem(
            vocab_size=clusters * rng.choice((1, 5, 12, 16, 33)),
            hidden_size=rng.choice((1, 33, 64, 200, 640, 1152, 2048, 3072, 65536)),
            n_clusters=clusters,
            n_probes=rng.randint(1, min(clusters, 512)),
            n_tokens=rng.choice((1, 2, 3, 8)),
            weight_dtype=rng.choice(("bf16", "fp16", "fp32")),
            centroid_dtype=rng.choice(("bf16", "fp32")),
        )

    return draw
