"""Named members of one kind: plans, kinds of device, number formats, epilogues.

Usage:
    PLANS: Registry[Plan] = Registry("plan", room="flashtune.kernels.plans")
    PLANS["staged"]                  # FlashtuneError names the members if there is no such one
    with PLANS.added(member): …      # temporarily, as tests do

A room is a package whose `MEMBERS` lists its members, one file each. It is imported when the
registry is first used, so that naming a member does not import the package of members: a problem
can check the name of its format although formats are in a higher layer (decision 8).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol, TypeVar

from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.one_line import quoted


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """Its name in records, tables and command lines."""


Member = TypeVar("Member", bound=Named)


class Registry(Mapping[str, Member]):
    """The members by name: those added, then those of the room in the order of its `MEMBERS`."""

    def __init__(self, kind: str, room: str) -> None:
        """kind: the word for a member in messages."""
        self._kind, self._room = kind, room
        self._added: dict[str, Member] = {}
        self._listed: dict[str, Member] | None = None

    def __getitem__(self, name: Any) -> Member:
        """The member of that name; raises FlashtuneError if there is none."""
        members = self._members()
        if not isinstance(name, str) or name not in members:
            raise FlashtuneError(
                f"{self._kind} must be one of {', '.join(members)}, not {quoted(name)}"
            )
        return members[name]

    def __contains__(self, name: Any) -> bool:
        """Whether there is a member of that name."""
        return isinstance(name, str) and name in self._members()

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._members())

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._members())

    @contextmanager
    def added(self, member: Member) -> Iterator[Member]:
        """Add a member within a `with`; raises ValueError if the name is taken."""
        if member.name in self:
            raise ValueError(f"a {self._kind} named {member.name} already exists")
        self._added[member.name] = member
        try:
            yield member
        finally:
            del self._added[member.name]

    def _members(self) -> Mapping[str, Member]:
        if self._listed is None:
            members: tuple[Member, ...] = import_module(self._room).MEMBERS
            self._listed = {member.name: member for member in members}
        return {**self._added, **self._listed} if self._added else self._listed
