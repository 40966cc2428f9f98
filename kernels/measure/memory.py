"""How much memory is free on a device, without allocating it, and how much steps take.

Usage:
    free_bytes(weight.device)
    scratch_bytes(problem)
"""

from pathlib import Path

import torch

from flashtune.tuning_db.problem import Problem

_MOST_BLOCKS = 1024  # of a launch with one block a multiprocessor
_MEMORY = Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_GROUP_FILES = {
    "": ("memory.max", "memory.current"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
}


def scratch_bytes(problem: Problem) -> int:
    """More bytes than the scratch of any plan's step for this problem takes.

    Scores and lists of clusters of each token, and of all tokens together; where candidates are
    decided again the logits of all tokens, what each program found best, and the best of each
    block.
    """
    tokens, again = problem.n_tokens, problem.n_rescored > 0
    lists = (tokens * (4 + 8) + 2 * 4) * problem.n_clusters
    logits = 2 * 4 * tokens * problem.vocab_size if again else 0
    blocks = 8 * _MOST_BLOCKS * (1 + problem.n_rescored)
    return lists + logits + blocks + 64 * tokens


def free_bytes(device: torch.device) -> int:
    """Bytes still available on a CUDA device, including torch's own reserve, or on a CPU.

    For a CPU: what is left of the machine's memory and of its container's limit; 0 if the system
    reports neither. Of a GPU that shares the machine's memory (a Jetson's), what the machine has
    available: CUDA does not count what the system could free, such as cached files.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if torch.cuda.get_device_properties(device).is_integrated:
            free = _available(_MEMORY) or free
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    return min(_available(_MEMORY), *_group_rooms(_CGROUP, _CGROUPS))


def _available(path: Path) -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    for line in _text(path).splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return 0


def _group_rooms(membership: Path, root: Path) -> list[int]:
    """Bytes left under each control group's limit; page cache not in use counts as free."""
    rooms = [2**63]
    for line in _text(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names, top = _GROUP_FILES[controllers], root / controllers
        for parent in (Path(group), *Path(group).parents):
            folder = top / parent.relative_to("/")
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                stat = dict(each.split() for each in _text(folder / "memory.stat").splitlines())
                rooms.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return rooms


def _text(path: Path) -> str:
    """The file's text; empty if there is none."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
