"""C++ source to a shared library in the cache, by the machine's own compiler.

Usage:
    library = load_library(source, device.arch, "avx512")     # a ctypes.CDLL
    build_library(source, device.arch, "avx512")              # the same without loading it

A library's name is a hash of its source, the compiler with its version, the flags and the
machine's instruction sets: a cache folder may be shared by machines, and none loads what was
built for another. A file is loaded only if no other user can have put it there.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from flashtune.tuning_db.cached_file import BUILD, keep, whole
from flashtune.tuning_db.environment import cache_dir, named_compiler
from flashtune.tuning_db.errors import FlashtuneError, MachineTroubleError
from flashtune.tuning_db.lock import hold
from flashtune.tuning_db.private_folder import make_private
from flashtune.tuning_db.record import MOST_NAME

COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 100
EMPTY_SECONDS = 20  # for a source with nothing in it
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# Runs its arguments, and kills them and what they started when standard input ends. A compiler is
# several processes: a signal to the first one leaves the others at work.
_WATCHED = """
exec 3<&0 </dev/null
{ read _ <&3; kill -9 0; } >/dev/null 2>&1 &
"$@" 3<&-
code=$?
exec 2>/dev/null
kill -9 $!
wait
exit $code
"""
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
SIMD_FLAGS = {
    "scalar": (),
    "avx2": _AVX2,
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
    "avx512_vnni": (*_AVX512, "-mprefer-vector-width=512", "-mavx512vnni"),
    "avx512_bf16": (*_AVX512, "-mprefer-vector-width=512", "-mavx512vnni", "-mavx512bf16"),
    "neon": (),
    "neon_dot": ("-march=armv8.2-a+dotprod",),
    "neon_bf16": ("-march=armv8.2-a+dotprod+fp16+bf16",),
}


def load_library(source: str, arch: str, simd: str) -> ctypes.CDLL:
    """Build the library unless the cache has it, and load it.

    Raises FlashtuneError if the compiler refuses the source, and MachineTroubleError if no
    compiler works, the cache can't be used, or the library does not load.
    """
    path = build_library(source, arch, simd)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineTroubleError(
            f"{path} cannot be loaded ({error}): delete it, so that it is compiled again"
        ) from error


def build_library(source: str, arch: str, simd: str) -> Path:
    """The library's file, compiled unless the cache has it; errors as in `load_library`."""
    command = [*_compiler(named_compiler()), *FLAGS, *SIMD_FLAGS[simd]]
    key = "\n".join((source, arch, *command, _version(command[0])))
    folder = cache_dir() / "cpp"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = folder / f"{name}.so"
    if whole(path) is not None:
        return path
    try:
        make_private(folder)
        with hold(folder / f"{name[:2]}.lock", COMPILE_SECONDS):
            if whole(path) is None:
                keep(path, _compile(command, source, folder))
    except OSError as error:
        raise MachineTroubleError(
            f"compiled kernels cannot be kept in {folder} ({error}): set FLASHTUNE_CACHE to a "
            "folder that only you can write to"
        ) from error
    return path


def _compile(command: list[str], source: str, scratch: Path) -> bytes:
    """The library. scratch: a folder for intermediate files.

    A source that is refused is not the machine's fault if the same command compiles an empty one.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=BUILD) as folder:
        try:
            return _run(command, source, Path(folder), COMPILE_SECONDS)
        except FlashtuneError as error:
            try:
                _run(command, "", Path(folder), min(COMPILE_SECONDS, EMPTY_SECONDS))
            except FlashtuneError:
                raise MachineTroubleError(str(error)) from error
            raise


def _run(command: list[str], source: str, folder: Path, seconds: float) -> bytes:
    text, library = folder / "decode.cpp", folder / "decode.so"
    text.write_text(source, "utf-8")
    library.unlink(missing_ok=True)
    try:
        done = _watched([*command, str(text), "-o", str(library)], folder, seconds)
    except subprocess.TimeoutExpired as error:
        raise FlashtuneError(
            f"{command[0]} took more than {seconds} s to compile a kernel: set CXX to another "
            "compiler"
        ) from error
    if done.returncode or not library.exists():
        said = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise FlashtuneError(
            f"{command[0]} failed with exit code {done.returncode}: "
            f"{said.strip() or 'no output'} (set CXX to try another compiler)"
        )
    return library.read_bytes()


def _watched(
    command: list[str], scratch: Path, seconds: float
) -> "subprocess.CompletedProcess[str]":
    """Run a command that ends with this process, and in time, with all that it started.

    scratch: where it leaves temporary files if it is killed.
    """
    ends, held = os.pipe()  # which the system closes for a process that is killed
    try:
        with subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, "sh", *command],
            stdin=ends,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(scratch)},
            start_new_session=True,
        ) as process:
            try:
                said, errors = process.communicate(timeout=seconds)
            except BaseException:
                with suppress(ProcessLookupError):  # it may have ended meanwhile
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    finally:
        os.close(ends)
        os.close(held)
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def _compiler(named: str) -> list[str]:
    """$CXX with its arguments, else the first compiler there is."""
    if named.strip():
        program, *arguments = named.split()
        found = shutil.which(program)
        if found is None:
            raise MachineTroubleError(
                f"CXX names the compiler {program!r}, which was not found: correct CXX"
            )
        return [found, *arguments]
    for program in COMPILERS:
        found = shutil.which(program)
        if found:
            return [found]
    raise MachineTroubleError(
        f"no C++ compiler found ({', '.join(COMPILERS)}): install g++, or set CXX to a compiler"
    )


def compiler_version() -> str:
    """The compiler's name for itself and its version, one line; empty if there is none."""
    try:
        said = _version(_compiler(named_compiler())[0])
    except FlashtuneError:
        return ""
    return next(iter(said.splitlines()), "")[:MOST_NAME]


@functools.cache
def _version(compiler: str) -> str:
    """What the compiler reports about itself; empty if it reports nothing."""
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineTroubleError(
            f"{compiler} cannot be run ({error}): set CXX to another compiler"
        ) from error
    return done.stdout
