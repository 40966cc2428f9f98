"""The lock that processes share: real processes wait for it, die with it, and leave notes."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashtune.tuning_db.lock import hold, knows_locks

HOLD = """
import sys, time
from pathlib import Path
from flashtune.tuning_db.lock import hold
with hold(Path(sys.argv[1]), 5.0) as lock:
    assert lock is not None
    lock.note("at work")
    print("held", flush=True)
    sys.stdin.readline()
    lock.note("")
"""


def start_holder(path: Path) -> "subprocess.Popen[str]":
    """A process that holds the lock until it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_another_waits_until_it_is_free(tmp_path: Path) -> None:
    process = start_holder(tmp_path / "lock")
    with hold(tmp_path / "lock", 0.2) as lock:
        assert lock is None
    process.communicate("go on\n")
    assert process.returncode == 0
    with hold(tmp_path / "lock", 0.0) as lock:
        assert lock is not None and lock.left == ""


def test_the_death_of_its_holder_frees_it_and_leaves_the_note(tmp_path: Path) -> None:
    process = start_holder(tmp_path / "lock")
    process.kill()
    process.communicate()
    with hold(tmp_path / "lock", 5.0) as lock:
        assert lock is not None and lock.left == "at work"
        lock.note("a")
        lock.note("")
    with hold(tmp_path / "lock", 5.0) as lock:
        assert lock is not None and lock.left == ""


def test_two_holds_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", 0.0) as lock:
        assert lock is not None
        start = time.monotonic()
        with hold(tmp_path / "lock", 0.3) as other:
            assert other is None
        assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_work_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without notes, which may be those of a process that is at work."""
    with hold(tmp_path / "lock", 0.0) as lock:
        assert lock is not None
        lock.note("at work")
    assert knows_locks(tmp_path)

    def unknown(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unknown)
        with hold(tmp_path / "lock", 0.0) as lock:
            assert lock is not None and lock.left == ""
            lock.note("mine")
        assert not knows_locks(tmp_path)
    assert (tmp_path / "lock").read_text() == "at work"
    monkeypatch.setattr(fcntl, "lockf", unknown)
    assert not knows_locks(tmp_path)


def test_where_no_file_can_be_made_work_goes_on(tmp_path: Path) -> None:
    with hold(tmp_path / "no" / "where" / "lock", 0.0) as lock:
        assert lock is not None
        lock.note("mine")
    assert knows_locks(tmp_path / "no" / "where")  # as far as anybody can tell
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_noted_in_what_is_not_a_file_of_ours(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "lock", tmp_path / "other"
    other.write_text("somebody's")
    path.symlink_to(other) if kind == "link" else os.mkfifo(path)
    with hold(path, 0.0) as lock:
        assert lock is not None and lock.left == ""
        lock.note("at work")
    assert other.read_text() == "somebody's"
