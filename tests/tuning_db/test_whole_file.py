"""What commands write: whole or not at all, and never in place of what is no file."""

import os
import threading
from pathlib import Path

import pytest

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.whole_file import write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)  # as long as a name may be
    for data in (b"one", b"another"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == [path.name]


def test_a_link_stays_one(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    for data in (b"one", b"another"):  # which leads nowhere at first
        write_whole(link, data)
        assert link.is_symlink() and file.read_bytes() == data


def test_where_it_cannot_be_written_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlashtuneError, match=r"cannot write .*file \(No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["folder", "no folder", "loop", "unread pipe", "null", "full"])
def test_what_cannot_be_written_to_is_one_line(kind: str, tmp_path: Path) -> None:
    path = {
        "folder": tmp_path, "no folder": tmp_path / "none" / "file", "loop": tmp_path / "loop",
        "unread pipe": tmp_path / "pipe", "null": Path("\0"), "full": Path("/dev/full"),
    }[kind]  # fmt: skip
    if kind == "loop":
        path.symlink_to(path)
    if kind == "unread pipe":
        os.mkfifo(path)
    before = names(tmp_path)
    with pytest.raises(FlashtuneError, match="cannot write") as caught:
        write_whole(path, b"data")
    assert str(caught.value).isprintable()
    assert names(tmp_path) == before


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, data, read = tmp_path / "pipe", b"x" * 2**20, []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    while not read:
        try:
            write_whole(pipe, data)
        except FlashtuneError:  # the reader is not there yet
            continue
        reader.join(10)
    assert read == [data] and pipe.is_fifo()


def test_a_device_stays_one() -> None:
    before = os.stat("/dev/null")
    write_whole(Path("/dev/null"), b"data")
    after = os.stat("/dev/null")
    assert (after.st_mode, after.st_rdev, after.st_ino) == (
        before.st_mode, before.st_rdev, before.st_ino,
    )  # fmt: skip
