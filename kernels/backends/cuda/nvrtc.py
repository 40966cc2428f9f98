"""CUDA C++ to machine code in the cache, by NVIDIA's run-time compiler.

Usage:
    why_missing()                      # None, or what to install
    compile_cuda(source, "sm_90")      # the binary

Both libraries come as wheels, and with torch's own builds for CUDA. No GPU is needed.
"""

import contextlib
import functools
import hashlib
from typing import Any

from flashtune.tuning_db.cached_file import keep, whole
from flashtune.tuning_db.environment import cache_dir
from flashtune.tuning_db.errors import FlashtuneError

OPTIONS = ("--std=c++17",)


@functools.cache
def why_missing() -> str | None:
    """None if the compiler is available, else what a plan needs and how to get it."""
    try:
        _version()
    except Exception as error:  # its loader can raise any type
        return f"NVIDIA's run-time compiler ({_first_line(error)}): pip install 'flashtune[cuda]'"
    return None


def compile_cuda(source: str, arch: str) -> bytes:
    """The source's machine code for an architecture such as `sm_90`, from the cache if it has it.

    Raises FlashtuneError if there is no compiler, or it refuses the source.
    """
    missing = why_missing()
    if missing:
        raise FlashtuneError(f"CUDA C++ needs {missing}")
    key = "\n".join((source, arch, *OPTIONS, _version()))
    path = cache_dir() / "cuda" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    known = whole(path)
    if known is not None:
        return known
    binary = _compiled(source, arch)
    with contextlib.suppress(OSError):  # a cache that can't be written only costs time
        keep(path, binary)
    return binary


def _compiled(source: str, arch: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _taken(nvrtc.nvrtcCreateProgram(source.encode(), b"decode.cu", 0, [], []))
    try:
        options = [each.encode() for each in (f"--gpu-architecture={arch}", *OPTIONS)]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(code):
            log = bytearray(_taken(nvrtc.nvrtcGetProgramLogSize(program)))
            _taken(nvrtc.nvrtcGetProgramLog(program, log))
            lines = log.decode(errors="replace").strip("\0\n").splitlines()
            said = next((line for line in lines if "error" in line), code.name)
            raise FlashtuneError(f"NVRTC cannot compile the kernel for {arch}: {said.strip()}")
        binary = bytearray(_taken(nvrtc.nvrtcGetCUBINSize(program)))
        _taken(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


@functools.cache
def _version() -> str:
    from cuda.bindings import nvrtc

    major, minor = _taken(nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


def taken(answer: tuple[Any, ...], library: str) -> Any:
    """What a call of an NVIDIA library returns besides its status: a value, several, or none.

    Raises FlashtuneError on any code but success.
    """
    code, *rest = answer
    if int(code):
        raise FlashtuneError(f"{library} says {code.name}")
    return rest[0] if len(rest) == 1 else tuple(rest)


_taken = functools.partial(taken, library="NVRTC")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
