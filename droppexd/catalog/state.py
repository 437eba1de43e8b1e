"""What the catalogue keeps in memory beside the engine: small, and read by every change."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from droppexd.catalog.keys import Placement
from droppexd.catalog.placements import Counts, survives_machines, survives_pools
from droppexd.catalog.records import SessionRecord, Totals
from droppexd.errors import SessionClosed
from droppexd.model import (
    MISSING,
    ControllerRecord,
    Extent,
    MemberRecord,
    Membership,
    PoolRecord,
    TokenRecord,
    UploadRecord,
    VersionId,
)

_MOST_REMEMBERED = 10_000


@dataclass(slots=True)
class Session:
    """A session as its master sees it.

    `floor` is what the app told last, and refuses what is older. `safe_floor` and `closed` are what a crash
    cannot take back: orders to drop shards rest on them alone.
    """

    address: str
    boot_id: bytes
    floor: int = 0
    safe_floor: int = 0
    closing: bool = False
    closed: bool = False
    trimmed: int = 0
    """Outcomes below this counter are gone already."""

    @classmethod
    def of(cls, record: SessionRecord) -> "Session":
        """Return the session that a record tells of."""
        return cls(
            address=record.address,
            boot_id=record.boot_id,
            floor=record.floor,
            safe_floor=record.floor,
            closing=not record.open,
            closed=not record.open,
        )

    def record(self) -> SessionRecord:
        """Return the record to write, with the floor as it is now."""
        return SessionRecord(not self.closing, self.floor, self.address, self.boot_id)


@dataclass(slots=True)
class State:
    """The tables of one master."""

    next_pool: int
    """The number of the next new pool; none is ever handed out twice."""
    totals: Totals = field(default_factory=Totals)
    pools: dict[int, PoolRecord] = field(default_factory=dict)
    controllers: dict[str, ControllerRecord] = field(default_factory=dict)
    members: dict[bytes, MemberRecord] = field(default_factory=dict)
    """By public key, the revoked among them."""
    members_version: int = 0
    tokens: dict[bytes, TokenRecord] = field(default_factory=dict)
    uploads: dict[VersionId, UploadRecord] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    placements: dict[Placement, Counts] = field(default_factory=dict)
    out: frozenset[int] = frozenset()
    """Pools that the master counts as lost for good; their shards are recorded as missing."""
    rebuilt_from: int | None = None
    """How many pools this was made anew from, while what only shards tell of is still to be adopted."""
    restored_ms: int | None = None
    """When the backup was written that this catalogue was restored from, while pools are to be compared with
    it; None otherwise. While it is set, shards of extents that have a record are nowhere dead."""
    on_placed: Callable[[Extent], None] | None = None
    """Called with each extent that was recorded, or recorded with other pools, once that is durable."""
    rulings: int = 0
    """Decisions about shards of unknown sessions in this term."""
    _survives: dict[Placement, tuple[int, int]] = field(default_factory=dict)

    def open_session(self, session: int) -> Session:
        """Return a session that may still change things; raise SessionClosed when it may not."""
        found = self.sessions.get(session)
        if found is None or found.closing:
            raise SessionClosed(f"session {session:x} is closed; what it had under way is lost")
        return found

    def count_ruling(self) -> None:
        """Take note of a decision about shards of unknown sessions."""
        self.rulings += 1

    def gone(self, pool: int) -> bool:
        """Return whether the shards of a pool count as missing."""
        return pool in self.out or self.pools[pool].membership == Membership.REMOVED

    def put_pool(self, pool: PoolRecord) -> None:
        """Take in a pool's record."""
        self.pools[pool.number] = pool
        self._survives.clear()

    def survives(self, placement: Placement) -> tuple[int, int]:
        """Return how many pools and how many machines an extent with this placement may lose."""
        survives = self._survives.get(placement)
        if survives is None:
            machines = {number: pool.machine for number, pool in self.pools.items()}
            survives = survives_pools(placement), survives_machines(placement, machines)
            if len(self._survives) >= _MOST_REMEMBERED:
                self._survives.clear()
            self._survives[placement] = survives
        return survives

    def confirmers(self, pools: Iterable[int]) -> tuple[int, ...]:
        """Return which of the pools of a dead extent must confirm that they dropped it.

        All, while it is not clear which pools hold shards that the records place elsewhere.
        """
        return tuple(
            pool
            for pool in sorted(set(pools if self.restored_ms is None else self.pools))
            if pool != MISSING and self.pools[pool].membership != Membership.REMOVED
        )
