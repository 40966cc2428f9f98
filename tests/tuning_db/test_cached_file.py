"""Files of a cache: whole or not there, whatever was left in their place."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtune.tuning_db import cached_file
from flashtune.tuning_db.cached_file import is_whole_folder, keep, keep_folder, whole

FILES = {"flashtune/__init__.py": b"", "flashtune/a/b.py": b"b = 1\n", "data.json": b"{}"}


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"some bytes", bytes(1000), bytes(range(256)) * 20]
)
def test_what_is_kept_is_read_back(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    keep(path, content)
    assert whole(path) == content
    assert path.read_bytes().startswith(content)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    keep(path, content + b"!")
    assert whole(path) == content + b"!"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:3],
        lambda data: data[:-1],
        lambda data: data[1:],
        lambda data: data + b"\n",
        lambda data: bytes(len(data)),
        lambda data: b"X" + data[1:],
        lambda data: data[:-64] + hashlib.sha256(b"").hexdigest().encode(),
        lambda data: b"some bytes",
    ],
)
def test_what_is_not_whole_is_not_there(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert whole(path) is None
    keep(path, b"some bytes")
    path.write_bytes(spoil(path.read_bytes()))
    assert whole(path) is None
    path.unlink()
    path.mkdir()
    assert whole(path) is None


def test_a_file_has_its_name_only_once_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(path.exists())
        sync(descriptor)

    monkeypatch.setattr(cached_file.os, "fsync", fsync)
    keep(path, b"new")
    assert seen[0] is False


def test_a_disk_that_fills_up_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    keep(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cached_file.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            keep(path, b"new")
    assert whole(path) == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("state", ["absent", "whole", "cut", "lacking", "empty", "a file"])
def test_a_folder_is_whole_after_it_was_kept(state: str, tmp_path: Path) -> None:
    folder = tmp_path / "code" / "digest"
    if state == "a file":
        folder.parent.mkdir()
        folder.write_text("")
    elif state != "absent":
        keep_folder(folder, FILES)
        assert is_whole_folder(folder, FILES)
    if state == "cut":
        (folder / "flashtune/a/b.py").write_bytes(b"b =")
    elif state == "lacking":
        (folder / "data.json").unlink()
    elif state == "empty":
        (folder / "flashtune/a/b.py").write_bytes(b"")
    assert is_whole_folder(folder, FILES) is (state == "whole")
    keep_folder(folder, FILES)
    assert is_whole_folder(folder, FILES)
    assert [each.name for each in folder.parent.iterdir()] == ["digest"]


@pytest.mark.parametrize(
    "state",
    ["more", "open", "open inside", "another's", "another's file", "a link", "a link inside"],
)
def test_a_folder_that_others_could_change_or_that_has_more_is_made_again(
    state: str, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    folder = tmp_path / "code" / "digest"
    before = os.umask(0)
    try:
        keep_folder(folder, FILES)
    finally:
        os.umask(before)
    assert is_whole_folder(folder, FILES)
    if state == "more":
        (folder / "flashtune/torch.py").write_bytes(b"")
    elif state.startswith("open"):
        (folder / "flashtune" if "inside" in state else folder).chmod(0o777)
    elif state.startswith("another's"):
        give_away(folder / "data.json" if "file" in state else folder)
    else:
        inner = folder / "flashtune/a" if "inside" in state else folder
        inner.rename(tmp_path / "elsewhere")
        inner.symlink_to(tmp_path / "elsewhere")
    assert not is_whole_folder(folder, FILES)
    keep_folder(folder, FILES)
    assert is_whole_folder(folder, FILES)


def test_a_folder_is_not_made_where_others_can_write(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code").chmod(0o777)
    with pytest.raises(PermissionError, match="other users can write"):
        keep_folder(tmp_path / "code" / "digest", FILES)


def test_what_was_left_behind_by_a_process_that_was_killed_is_removed_later(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / "build-old", tmp_path / "build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part").write_bytes(b"half")
    os.utime(old, (0, time.time() - 7200))
    keep(tmp_path / "file", b"content")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["build-new", "file"]
