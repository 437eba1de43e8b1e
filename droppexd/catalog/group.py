"""How the controllers of a cluster agree which of them is the master.

A controller takes part in a **group**. It campaigns, and the group gives a **mandate** to one at a time: an
engine whose writes fail once another controller has the mandate. The group does not decide what the
catalogue's term is; the master begins one when it opens the catalogue (`catalogue.py`).
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol

import trio

from droppexd.catalog.engine import Engine, Entry


class Health(NamedTuple):
    """How the engine of a controller is. Both texts are for people, a line each; empty when all is well."""

    failure: str = ""
    """Why it takes no writes now."""
    warnings: tuple[str, ...] = ()
    """What will stop it from taking writes unless something is done."""


class Ranges(Protocol):
    """What reads keys in order."""

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        ...


class Stale(Ranges, Protocol):
    """A view of the catalogue that may be old, for when there is no other."""

    def age_s(self) -> float:
        """Return how old what was read is at most, in seconds; infinite when nobody knows."""
        ...


class Mandate(Protocol):
    """The right to change the catalogue, until it is lost."""

    @property
    def engine(self) -> Engine:
        """The catalogue's engine. `txn` raises NotMaster once another controller may have the mandate."""
        ...

    @property
    def above_term(self) -> int:
        """A term that the catalogue's next one must be above."""
        ...

    @property
    def immediate(self) -> bool:
        """Whether `confirm` has nothing to wait for."""
        ...

    async def confirm(self, *, changed: bool) -> None:
        """Return once all that the engine has told may be passed on: no other master can contradict it.

        With `changed` it outlasts the loss of this controller's disk as well, where journals are kept. Raise
        NotMaster when that cannot be had.
        """
        ...

    def keep_journals(self, pools: Mapping[str, str], most: int) -> None:
        """Hear which pools, by name with their addresses, are to keep the log; were all up, `most` would."""
        ...

    async def lost(self) -> None:
        """Return when the mandate is over: another controller may have it now."""
        ...


class Group(Protocol):
    """The controllers that share a catalogue, as one of them sees it."""

    @property
    def kind(self) -> str:
        """The engine's name as the configuration spells it: `sqlite` or `etcd`."""
        ...

    @property
    def alone(self) -> bool:
        """Whether no other controller can go on when this one cannot."""
        ...

    @property
    def revision(self) -> int:
        """The last revision that this controller knows its engine to have."""
        ...

    @property
    def endpoints(self) -> Sequence[str]:
        """Where the engine is, for a controller that joins; empty when it is in this process."""
        ...

    @property
    def prefix(self) -> str:
        """What the engine's keys begin with, for a controller that joins."""
        ...

    @property
    def master(self) -> str:
        """The address of the controller that has the mandate, as far as this one knows; empty: nobody."""
        ...

    @property
    def health(self) -> Health:
        """How the engine was when this controller used it last."""
        ...

    @property
    def former_names(self) -> frozenset[str]:
        """What this controller was called before, as far as that matters."""
        ...

    def stale(self) -> Stale | None:
        """Return what this controller knows of the catalogue, for one answer; None when it knows nothing."""
        ...

    def admits(self, name: str, address: str) -> bool:
        """Return whether a controller that joins may be a member now; it asks again otherwise."""
        ...

    def needs(self, name: str) -> bool:
        """Return whether the master could confirm nothing without this controller."""
        ...

    def vouch_gone(self, name: str) -> None:
        """Take an operator's word that this controller never returns."""
        ...

    def campaign(self, address: str) -> AbstractAsyncContextManager[Mandate]:
        """Wait until this controller, which others reach at `address`, has the mandate; leaving returns it.

        Raise IdentityError when it can never be the master: the catalogue is somebody else's.
        """
        ...


class Undivided:
    """What is easy where the engine itself sees to it that there is one master, who knows all."""

    above_term = 0
    immediate = True

    async def confirm(self, *, changed: bool) -> None:
        """Return at once."""

    def keep_journals(self, _pools: Mapping[str, str], _most: int) -> None:
        """Do nothing."""


class Unrestricted:
    """What a group does in which controllers come and go as they like."""

    former_names: frozenset[str] = frozenset()

    def stale(self) -> Stale | None:
        """Return None: it is the engine that knows."""
        return None

    def admits(self, _name: str, _address: str) -> bool:
        """Return True."""
        return True

    def needs(self, _name: str) -> bool:
        """Return False."""
        return False

    def vouch_gone(self, _name: str) -> None:
        """Do nothing."""


class _Sole(Undivided):
    """The mandate of a controller that is alone: nobody takes it away."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def lost(self) -> None:
        await trio.sleep_forever()


class SoleGroup(Unrestricted):
    """A group of one controller, whose engine nobody else can open."""

    kind = "sqlite"
    alone = True
    endpoints: Sequence[str] = ()
    prefix = ""
    health = Health()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.master = ""
        """The address of the controller that has the mandate; empty: nobody."""

    @property
    def revision(self) -> int:
        """The last revision that this controller knows its engine to have."""
        return self._engine.revision

    @asynccontextmanager
    async def campaign(self, address: str) -> AsyncIterator[Mandate]:
        """Return the mandate at once."""
        self.master = address
        try:
            yield _Sole(self._engine)
        finally:
            self.master = ""
