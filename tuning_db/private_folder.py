"""Folders and files that nobody else can change: code is run only from these.

Usage:
    make_private(folder)               # PermissionError if others could put something into it
    check_private(folder)              # the same for an existing folder
    content = read_private(path)       # None: absent, not a file, or not private

This user, root, and the owner of `/` are trusted. A path is private if each folder and link on the
way to it belongs to one of them, and nobody else may write to it; in a folder such as `/tmp`
others may make files, but not replace ours. This module uses only the standard library: it is also
sent to machines that have nothing else.
"""

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

_ROOT = 0  # user and group
_MOST_LINKS = 40  # the kernel's limit


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, for this user only, and check it.

    Raises OSError; for a folder that is not private, PermissionError, saying who can write where.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raises PermissionError unless only trusted users can change a folder's content.

    Raises OSError if it does not exist.
    """
    left = [str(folder.absolute())]  # parts still to walk, the next one last
    place, links = "/", 0
    while left:
        first, _, rest = left.pop().partition("/")
        if rest:
            left.append(rest)
        if first in ("", "."):
            continue
        if first == "..":
            place = os.path.dirname(place)
            continue
        name = os.path.join(place, first)
        found = os.lstat(name)
        if not _is_trusted(found.st_uid):
            raise _refused(f"it belongs to user {found.st_uid}", name)
        if not stat.S_ISLNK(found.st_mode):
            place = name
            _check_mode(found, name, last=not left)
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        target = os.readlink(name)
        place = "/" if target.startswith("/") else place
        left.append(target)


def read_private(path: Path) -> bytes | None:
    """A file's content; None unless it is a file, not a link, that only trusted users can change.

    The folder must be private, too.
    """
    try:
        check_private(path.parent)
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return None
            if not _is_trusted(found.st_uid) or _others_may_write(found):
                return None
            return file.read()
    except OSError:
        return None


def _open(name: str, flags: int) -> int:
    """Open without following links or waiting for a pipe's writer."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _check_mode(found: os.stat_result, name: str, *, last: bool) -> None:
    """Allow a shared folder on the way if nobody there can replace the files of others."""
    sticky = bool(found.st_mode & stat.S_ISVTX) and not last
    if _others_may_write(found) and not sticky:
        raise _refused("other users can write to it (chmod go-w)", name)


def _refused(why: str, name: str) -> PermissionError:
    return PermissionError(errno.EPERM, f"not private: {why}", name)


def _is_trusted(user: int) -> bool:
    return user in (_ROOT, os.geteuid(), os.stat("/").st_uid)


def _others_may_write(found: os.stat_result) -> bool:
    group = bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)
    return group or bool(found.st_mode & stat.S_IWOTH)


def _is_own_group(group: int) -> bool:
    """Whether a group is root's, or this user's own without other members."""
    if group == _ROOT:
        return True
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    own = group == user.pw_gid and found.gr_name == user.pw_name
    return own and set(found.gr_mem) <= {user.pw_name}
