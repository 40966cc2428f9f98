"""What others could have put or changed is not read; what is ours is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtune.tuning_db import private_folder
from flashtune.tuning_db.private_folder import check_private, make_private, read_private

GiveAway = Callable[[Path], None]


def refused(folder: Path) -> bool:
    try:
        check_private(folder)
    except PermissionError as error:
        assert "not private" in str(error)
        return True
    return False


def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "cpp"
    make_private(folder)
    path = folder / "library"
    path.write_bytes(b"ours")
    path.chmod(0o644)
    return path


def test_what_we_made_is_read_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = kept(tmp_path)
    finally:
        os.umask(before)
    assert read_private(path) == b"ours"
    assert {each.stat().st_mode & 0o777 for each in path.parents[:2]} == {0o700}
    make_private(path.parent)


@pytest.mark.parametrize("mode", [0o646, 0o602])
def test_a_file_that_others_can_write_is_not_read(mode: int, tmp_path: Path) -> None:
    path = kept(tmp_path)
    path.chmod(mode)
    assert read_private(path) is None


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_nothing_is_read_below_a_folder_that_others_can_write(
    which: int, mode: int, tmp_path: Path
) -> None:
    path = kept(tmp_path)
    path.parents[which].chmod(mode)
    assert read_private(path) is None
    assert refused(path.parent)
    with pytest.raises(PermissionError, match=r"other users can write to it .chmod go-w.*cache"):
        make_private(path.parent / "deeper")


def test_in_a_folder_for_everybody_our_own_folders_are_safe(tmp_path: Path) -> None:
    path = kept(tmp_path)
    path.parents[1].chmod(0o1777)
    assert read_private(path) == b"ours"
    path.parent.chmod(0o1777)
    assert read_private(path) is None


def test_a_group_of_others_is_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept(tmp_path)
    path.chmod(0o664)
    for alone in (True, False):
        monkeypatch.setattr(private_folder, "_is_own_group", lambda group, alone=alone: alone)
        assert (read_private(path) is not None) is alone
    path.chmod(0o644)
    path.parent.chmod(0o770)
    assert refused(path.parent)


def test_root_s_group_and_our_own_are_no_others() -> None:
    assert private_folder._is_own_group(0)
    assert not private_folder._is_own_group(2**31 - 7)  # of no name


@pytest.mark.parametrize("which", ["file", "folder", "above"])
def test_what_another_user_owns_is_not_read(
    which: str, tmp_path: Path, give_away: GiveAway
) -> None:
    path = kept(tmp_path)
    give_away({"file": path, "folder": path.parent, "above": path.parents[1]}[which])
    assert read_private(path) is None
    assert refused(path.parent) == (which != "file")


def test_links_are_followed_to_a_folder_of_ours_only(tmp_path: Path, give_away: GiveAway) -> None:
    path = kept(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    other.symlink_to(path.parent)
    one.symlink_to("other")
    assert read_private(one / "library") == b"ours"
    assert read_private(tmp_path / "one" / ".." / "cpp" / "library") == b"ours"
    give_away(other)
    assert read_private(one / "library") is None
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        check_private(loop)


def test_a_link_a_pipe_a_folder_and_nothing_are_no_files(tmp_path: Path) -> None:
    path = kept(tmp_path)
    (path.parent / "link").symlink_to(path)
    os.mkfifo(path.parent / "pipe", 0o600)
    for name in ("link", "pipe", ".", "absent"):
        assert read_private(path.parent / name) is None
    with pytest.raises(FileNotFoundError):
        check_private(path.parent / "absent")
