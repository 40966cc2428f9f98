"""Keeps a worker on the far side of a connection, and ends it when the connection ends.

Usage:
    ssh HOST python3 -c "import sys; exec(sys.stdin.buffer.read(SIZE))" < INPUT

INPUT is this file with the modules that it imports (SIZE bytes, see ssh.py), a line of JSON
(`size` and `digest` of an archive, the `module` to run, and a `token` of the search's own), the
archive, then the module's own input. The greeting says that all of that arrived. None of our code
is there yet when this runs: it uses only the standard library.
"""

import contextlib
import hashlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from flashtune.tuner.workers.keeper import Kept, kill
from flashtune.tuning_db.cached_file import is_whole_folder, keep_folder

GREETING = "flashtune: ready"
END_SECONDS = 20.0  # for a killed worker to be gone
PIECE_BYTES = 2**16
Pieces = queue.SimpleQueue[bytes]


def main() -> None:
    """Unpack, greet, run the module, and exit as it does: with 128 or more for a signal."""
    header = json.loads(sys.stdin.buffer.readline())
    archive = sys.stdin.buffer.read(header["size"])
    try:
        folder = unpacked(archive, header["digest"])
    except (OSError, RuntimeError) as error:  # a user without a home folder
        sys.exit(
            f"the worker has no cache folder ({error}): set FLASHTUNE_CACHE there to a folder "
            "that only you can write to"
        )
    end_earlier(header["token"])
    print(GREETING, flush=True)
    command = [sys.executable, "-m", header["module"], header["token"]]
    os._exit(run(command, folder))  # our thread still waits for input


def cache_folder() -> Path:
    """flashtune's cache on this machine."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flashtune"
    return Path(os.environ.get("FLASHTUNE_CACHE") or usual).expanduser().absolute()


def unpacked(archive: bytes, digest: str) -> Path:
    """The folder with the archive's files, unpacked unless exactly these are there already.

    Raises OSError if it can't be written, or others could change its files.
    """
    if hashlib.sha256(archive).hexdigest() != digest:
        sys.exit("flashtune's code was damaged in transfer: try again")
    folder = cache_folder() / "code" / digest
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        files = {name: file.read(name) for name in file.namelist()}
    if not is_whole_folder(folder, files):
        keep_folder(folder, files)
    return folder


def end_earlier(token: str) -> None:
    """Kill workers that a lost connection left behind: they would disturb the timing.

    token: an argument that each of them has, and no other process of this machine.
    """
    end = time.monotonic() + END_SECONDS
    while found := [each for each in Path("/proc").glob("[0-9]*") if token in arguments(each)]:
        if time.monotonic() > end:
            sys.exit(
                f"an earlier worker, process {found[0].name}, cannot be ended: end it there, "
                "then try again"
            )
        for process in found:
            kill(int(process.name))
        time.sleep(0.05)


def arguments(process: Path) -> list[str]:
    """The command line of a process; empty for one that is gone or dead."""
    try:
        return Path(process, "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def run(command: Sequence[str], folder: Path) -> int:
    """Run a command on the code in `folder`, fed from standard input; it ends when that ends."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    kept = Kept(
        command,
        stdin=subprocess.PIPE,
        cwd=folder,  # not where `torch` or `triton` may be a checkout
        env={
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",  # the folder keeps only the sent files
            "FLASHTUNE_CACHE": str(cache_folder()),
        },
    )
    pieces = Pieces()
    for work in (take, hand_on):
        threading.Thread(target=work, args=(kept, pieces), daemon=True).start()
    return kept.wait()


def take(kept: Kept, pieces: Pieces) -> None:
    """Read until the connection ends. Separate from `hand_on`, which a hung child may block."""
    source = sys.stdin.buffer
    assert isinstance(source, io.BufferedReader)
    while piece := source.read1(PIECE_BYTES):
        pieces.put(piece)
    kept.end()


def hand_on(kept: Kept, pieces: Pieces) -> None:
    """Pass what was read to the child, until it is gone."""
    target = kept.child.stdin
    assert target
    with contextlib.suppress(BrokenPipeError):
        while True:
            target.write(pieces.get())
            target.flush()


if __name__ == "__main__":
    main()
