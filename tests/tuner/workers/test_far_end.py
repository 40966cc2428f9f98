"""The far end of a connection, without a connection: what it unpacks, and what it trusts."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flashtune.tuner.workers.ssh import SshTransport, code_archive

MODULE = "flashtune.tuning_db.errors"  # which ends by itself


def far_end(cache: Path) -> "subprocess.CompletedProcess[bytes]":
    """Run it as ssh would, where nothing of ours is installed."""
    transport = SshTransport(destination="nowhere", module=MODULE)
    bootstrap = transport.command[-1].partition(' -c "')[2].removesuffix('"')
    kept = ("PATH", "LANG", "HOME")
    env = {name: value for name, value in os.environ.items() if name in kept}
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", bootstrap],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**env, "FLASHTUNE_CACHE": str(cache)},
        cwd=cache,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(transport.preamble)
    process.stdin.flush()  # and it stays open: where it ends, the far end kills its worker
    out, errors = process.stdout.read(), process.stderr.read()
    process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def files(cache: Path) -> dict[str, bytes]:
    [folder] = (cache / "code").iterdir()
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_code_arrives_and_runs(tmp_path: Path) -> None:
    done = far_end(tmp_path)
    assert (done.returncode, done.stdout) == (0, b"flashtune: ready\n"), done.stderr
    with zipfile.ZipFile(io.BytesIO(code_archive())) as archive:
        assert files(tmp_path) == {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("left", [b"", b"\0\0\0", b"class Flashtune", None])
def test_code_that_is_not_whole_is_unpacked_again(left: bytes | None, tmp_path: Path) -> None:
    far_end(tmp_path)
    whole = files(tmp_path)
    [folder] = (tmp_path / "code").iterdir()
    module = folder / "flashtune/tuning_db/errors.py"
    if left is None:
        module.unlink()
    else:
        module.write_bytes(left)
    done = far_end(tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == whole


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "code").write_text("")
    done = far_end(tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith(b"the worker has no cache folder") and done.stderr.count(b"\n") == 1
    )
    assert b": set FLASHTUNE_CACHE there to a folder that only you can write to" in done.stderr


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The folder of an earlier run."""
    far_end(tmp_path)
    [folder] = (tmp_path / "code").iterdir()
    return folder


@pytest.mark.parametrize("how", ["open", "a link"])
def test_nothing_is_run_from_a_folder_that_others_can_change(
    how: str, left: Path, tmp_path: Path
) -> None:
    """Though it looks right while it is checked."""
    if how == "open":
        left.chmod(0o777)
    else:
        left.rename(tmp_path / "elsewhere")
        left.symlink_to(tmp_path / "elsewhere")
    before = left.stat().st_ino
    done = far_end(tmp_path)
    assert (done.returncode, done.stdout) == (0, b"flashtune: ready\n"), done.stderr
    assert left.stat().st_ino != before
    assert not left.is_symlink()
    assert left.stat().st_mode & 0o777 == 0o700


def test_what_else_lies_in_the_folder_is_not_run(left: Path, tmp_path: Path) -> None:
    (left / "sitecustomize.py").write_text("import os; os.write(1, b'planted')")
    done = far_end(tmp_path)
    assert (done.returncode, done.stdout) == (0, b"flashtune: ready\n"), done.stderr
    assert not (left / "sitecustomize.py").exists()


def test_a_folder_for_everybody_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir(mode=0o700)
    (tmp_path / "code").chmod(0o777)
    done = far_end(tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"other users can write to it" in done.stderr and done.stderr.count(b"\n") == 1
