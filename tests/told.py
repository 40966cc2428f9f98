"""What a session shows its progress to, in tests."""

from collections.abc import Callable

from flashtune.tuner.search.search import Event
from flashtune.tuning_db.problem import Problem


class Told:
    """A display that keeps the notes, and hands events to a function."""

    def __init__(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.notes, self.on_event = list[str](), on_event

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, problem: Problem, trials: int, floor_us: object) -> Callable[[Event], None]:
        return self.on_event
