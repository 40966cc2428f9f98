"""What went wrong on the way to a step, as lines that `explain` shows."""

from flashtune.tuning_db.errors import FlashtuneError


def note(troubles: list[str], trouble: str) -> None:
    """Add a trouble, once."""
    if trouble not in troubles:
        troubles.append(trouble)


def one_line(error: Exception) -> str:
    """The error's first line, with its kind where it isn't one of ours."""
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, FlashtuneError) else f"{type(error).__name__}: {first}"
