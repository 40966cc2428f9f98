"""Libraries: built once, kept by content, and every way in which that can fail."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashtune.kernels.backends.cpp import compiler
from flashtune.kernels.backends.cpp.compiler import build_library, load_library
from flashtune.kernels.measure.failure import failure
from flashtune.tuning_db.cached_file import keep, whole
from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.record import Outcome

SOURCE = 'extern "C" int answer() { return 42; }\n'
ARCH = "x86_64-scalar"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and the compiler that is found by itself."""
    monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache"


def compiler_script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_built_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_library(SOURCE, ARCH, "scalar")
    assert loaded.answer() == 42

    def compile_again(*_: object) -> None:
        raise AssertionError("the cache has it")

    monkeypatch.setattr(compiler, "_compile", compile_again)
    assert isinstance(load_library(SOURCE, ARCH, "scalar"), ctypes.CDLL)


def test_a_cache_whose_name_looks_like_an_option_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHTUNE_CACHE", "-cache")
    assert load_library(SOURCE, ARCH, "scalar").answer() == 42
    assert list((tmp_path / "-cache" / "cpp").glob("*.so"))


def test_many_at_once_build_one(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    compile_once = compiler._compile

    def counted(command: list[str], source: str, scratch: Path) -> bytes:
        built.append(source)
        return compile_once(command, source, scratch)

    monkeypatch.setattr(compiler, "_compile", counted)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build_library(SOURCE, ARCH, "scalar"), range(8)))
    assert len(paths) == len(built) == 1


def test_ctrl_c_while_a_compiler_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: "subprocess.Popen[str]", *_: object, **__: object) -> None:
        process.wait()
        raise KeyboardInterrupt

    compiler.compiler_version()  # asked once
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_library(SOURCE, ARCH, "scalar")


@pytest.mark.parametrize("way", ["owner", "mode", "link", "link to a folder"])
def test_what_another_user_planted_is_not_run(
    way: str, cache: Path, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    """Under the right name, of the right form, and with a seal that is right."""
    path = build_library(SOURCE, ARCH, "scalar")
    planted = build_library(SOURCE.replace("42", "13"), ARCH, "scalar")
    theirs = tmp_path / "theirs" / path.name
    theirs.parent.mkdir()
    planted.rename(theirs)
    path.unlink()
    if way == "link":
        path.symlink_to(theirs)
    elif way == "link to a folder":
        path.parent.rename(tmp_path / "moved")
        path.parent.symlink_to(theirs.parent)
        give_away(theirs.parent)
    else:
        theirs.rename(path)
        give_away(path) if way == "owner" else path.chmod(0o777)
    if way == "link to a folder":
        with pytest.raises(MachineTroubleError, match=r"not private: it belongs to user"):
            load_library(SOURCE, ARCH, "scalar")
    else:
        assert load_library(SOURCE, ARCH, "scalar").answer() == 42


def test_a_cache_that_others_can_write_to_is_refused_in_one_line(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(
        MachineTroubleError, match=r"other users can write to it \(chmod go-w\)"
    ) as told:
        load_library(SOURCE, ARCH, "scalar")
    assert "\n" not in str(told.value)
    assert not list(cache.rglob("*.so"))


def test_source_arch_flags_and_compiler_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        build_library(SOURCE, ARCH, "scalar"),
        build_library(SOURCE + "\n", ARCH, "scalar"),
        build_library(SOURCE, "x86_64-avx2", "scalar"),
    ]
    monkeypatch.setitem(compiler.SIMD_FLAGS, "scalar", ("-O2",))
    paths.append(build_library(SOURCE, ARCH, "scalar"))
    for version in ("one", "two"):
        wrapper = compiler_script(
            tmp_path / version, f'[ "$1" = --version ] && echo {version} && exit\nexec c++ "$@"'
        )
        monkeypatch.setenv("CXX", wrapper)
        paths.append(build_library(SOURCE, ARCH, "scalar"))
    assert len(set(paths)) == len(paths)


def test_arguments_in_cxx_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -DANSWER=7")
    source = 'extern "C" int answer() { return ANSWER; }\n'
    assert load_library(source, ARCH, "scalar").answer() == 7


def test_without_a_compiler_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlashtuneError, match=r"no C\+\+ compiler .*: install g\+\+"):
        build_library(SOURCE, ARCH, "scalar")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        FlashtuneError, match="the compiler 'no-such-compiler', which was not found"
    ):
        build_library(SOURCE, ARCH, "scalar")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(FlashtuneError, match=r"error: .*nonsense"):
        build_library("nonsense", ARCH, "scalar")
    assert [path.suffix for path in (cache / "cpp").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 3", "failed with exit code 3: no output"),
        ("exit 0", "failed with exit code 0"),
        ("sleep 60", "took more than"),
    ],
)
def test_a_compiler_that_misbehaves_is_an_error(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'[ "$1" = --version ] && echo odd && exit\n{body}'
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "odd-c++", script))
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.3 if "sleep" in body else 60)
    with pytest.raises(FlashtuneError, match=message):
        build_library(SOURCE, ARCH, "scalar")


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FLASHTUNE_CACHE", str(file))
    with pytest.raises(FlashtuneError, match="set FLASHTUNE_CACHE to a folder"):
        build_library(SOURCE, ARCH, "scalar")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 3],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2] + b"x" + data[len(data) // 2 + 1 :],
        lambda data: data[:-82],  # as older versions left them, without a seal
    ],
)
def test_a_library_that_is_not_whole_is_built_again(
    spoil: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_library(SOURCE, ARCH, "scalar")
    before = path.read_bytes()
    path.unlink()  # another file: this process may have the old one mapped
    path.write_bytes(spoil(before))
    assert load_library(SOURCE, ARCH, "scalar").answer() == 42
    assert whole(path) is not None


def test_a_library_that_does_not_load_is_the_machines_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep(build_library(SOURCE, ARCH, "scalar"), b"whole, and no library")
    with pytest.raises(MachineTroubleError, match=r"cannot be loaded .*: delete it"):
        load_library(SOURCE, ARCH, "scalar")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_without_locks_libraries_are_built_all_the_same(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build_library(SOURCE, ARCH, "scalar"), range(4)))
    assert len(paths) == 1
    assert load_library(SOURCE, ARCH, "scalar").answer() == 42


@pytest.mark.parametrize(
    ("way", "machines"),
    [
        ("refused", False),
        ("broken", True),
        ("hangs", True),
        ("absent", True),
        ("unwritable", True),
    ],
)
def test_only_a_compiler_that_compiles_nothing_is_the_machines_trouble(
    way: str, machines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "nonsense" if way == "refused" else SOURCE
    bodies = {"broken": "echo 'error: out of order' >&2; exit 1", "hangs": "sleep 60"}
    if way in bodies:
        script = f'[ "$1" = --version ] && echo odd && exit\n{bodies[way]}'
        monkeypatch.setenv("CXX", compiler_script(tmp_path / "odd-c++", script))
        monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.3 if way == "hangs" else 60)
    elif way == "absent":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif way == "unwritable":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FLASHTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FlashtuneError) as caught:
        build_library(source, ARCH, "scalar")
    assert isinstance(caught.value, MachineTroubleError) is machines
    outcome = Outcome.ENVIRONMENT if machines else Outcome.INVALID
    assert failure(caught.value, Outcome.COMPILE_ERROR, "search").outcome is outcome


def test_a_process_killed_while_it_compiles_holds_no_lock(tmp_path: Path, cache: Path) -> None:
    script = compiler_script(tmp_path / "slow", '[ "$1" = --version ] && exit\nsleep 30')
    program = (
        "from flashtune.kernels.backends.cpp.compiler import build_library\n"
        f"build_library({SOURCE!r}, {ARCH!r}, 'scalar')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "CXX": script, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    while not list(cache.glob("cpp/build-*")):
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    assert load_library(SOURCE, ARCH, "scalar").answer() == 42


def is_gone(process: int) -> bool:
    """Whether it ended; who ends while nobody waits for him stays in the list, and is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def noted(path: Path) -> list[int]:
    """The processes that a script wrote down, once there are two."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and len(found := path.read_text().split()) == 2:
            return [int(each) for each in found]
        time.sleep(0.01)
    raise AssertionError("the compiler was not begun")


def forking(path: Path, pids: Path) -> str:
    """A compiler that is two processes, neither of which ends."""
    script = f'[ "$1" = --version ] && exit\nsleep 600 &\necho $$ $! > {pids}\nwait'
    return compiler_script(path, script)


def test_a_compiler_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    """A kill reaches that one alone, and neither the compiler nor what this began."""
    pids = tmp_path / "pids"
    program = (
        "from flashtune.kernels.backends.cpp.compiler import build_library\n"
        f"build_library({SOURCE!r}, {ARCH!r}, 'scalar')"
    )
    env = {**os.environ, "CXX": forking(tmp_path / "forks", pids)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen([sys.executable, "-c", program], env=env)
    begun = noted(pids)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while not all(map(is_gone, begun)) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(map(is_gone, begun))


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("CXX", forking(tmp_path / "forks", pids))
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1.0)
    monkeypatch.setattr(compiler, "EMPTY_SECONDS", 0.3)
    with pytest.raises(FlashtuneError, match="took more than"):
        build_library(SOURCE, ARCH, "scalar")
    begun, end = noted(pids), time.monotonic() + 10
    while not all(map(is_gone, begun)) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(map(is_gone, begun))
