"""How a time was taken: what for, and whether a step ran behind another kernel.

Usage:
    policy_of(FINAL, behind=True)      # "final-behind", kept with each measurement
    is_final("final-behind")           # True
    taken_behind("final")              # False

On a GPU a step is timed behind a kernel that writes its hidden state, as decode runs it. Older
records of GPUs, whose policies have no suffix, were timed back to back: a step could begin while
the one before it still ran. Such times are of another kind, and stale. A step on a CPU begins when
it is called; its policies have no suffix either.
"""

SEARCH = "search"  # for a config that a search tries
FINAL = "final"  # for a search's finalists, timed side by side
RACE = "race"  # for the configs of a race at a model's first load

BEHIND = "-behind"


def policy_of(purpose: str, *, behind: bool) -> str:
    """The policy of a time that is taken for this purpose."""
    return purpose + BEHIND if behind else purpose


def taken_behind(policy: str) -> bool:
    """Whether the step ran behind another kernel."""
    return policy.endswith(BEHIND)


def is_final(policy: str) -> bool:
    """Whether a search's finalists were timed side by side."""
    return policy.removesuffix(BEHIND) == FINAL


def is_of_a_race(policy: str) -> bool:
    """Whether it was timed in a race."""
    return policy.removesuffix(BEHIND) == RACE
