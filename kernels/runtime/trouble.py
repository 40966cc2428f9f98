"""What went wrong on the way to a step, as lines that `explain` shows."""

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import spelled


def note(troubles: list[str], trouble: str) -> None:
    """Add a trouble, once."""
    if trouble not in troubles:
        troubles.append(trouble)


def one_line(error: Exception) -> str:
    """The error's first line, printable, with its kind where it isn't one of ours."""
    first = spelled(next(iter(str(error).splitlines()), ""))
    return first if isinstance(error, FlashtuneError) else f"{type(error).__name__}: {first}"
