"""The pools as the master sees them: permanent records, and what heartbeats tell. Pure; time is handed in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from droppexd.errors import Conflict, IdentityError, NotFound, PeerBusy
from droppexd.model import (
    DISK_FULL,
    MAX_TROUBLE,
    ClusterMap,
    Membership,
    PoolInfo,
    PoolRecord,
    PoolState,
    ScrubReport,
)
from droppexd.wire.messages import Announce, Heartbeat

_SILENT_HEARTBEATS = 2.5
"""After so many heartbeats without a word a start of a pool is taken to be over."""

_FREE_STEPS = 64
"""Free space matters to the map in steps of 1/64 of a disk."""

_SIZE_STEPS = 16
"""The size of a disk matters in steps of 4%: that many double it."""

_ROOM_BYTES = 64 * 1024 * 1024
"""Below so much free space (a whole shard at 4+2), or 1/64 of a smaller disk, a pool counts as full.

It is one no more with twice as much, so that it does not come and go with every shard.
"""

_MAPS_PER_TERM_BITS = 32


@dataclass(slots=True)
class SeenPool:
    """One pool: its record, and what was last heard of it."""

    record: PoolRecord
    heard_at: float | None = None
    """None: not since this master began."""
    failed: bool = False
    failure: str = ""
    """Why its disk failed, in its own words."""
    full: bool = False
    capacity: int = field(init=False)
    free: int = 0
    shards: int = 0
    down: bool = True
    out: bool = False
    """Whether it was down for so long that its shards count as missing."""
    compared: int = 0
    """With which start of a master it has compared all that it holds since it was announced; 0: none."""
    quarantined: int = 0
    scrub: ScrubReport = field(default_factory=ScrubReport)
    challenged_at: float | None = None
    """When another start of the same pool first asked to take over."""

    def __post_init__(self) -> None:
        self.capacity = self.record.capacity

    @property
    def state(self) -> PoolState:
        """What the master makes of it."""
        if self.out:
            return PoolState.OUT
        if self.down:
            return PoolState.DOWN
        if self.record.checking:
            return PoolState.CHECKING
        return PoolState.READ_ONLY if self.failed or self.full else PoolState.UP

    @property
    def trouble(self) -> str:
        """Why it takes no writes, while it is read-only."""
        if self.state != PoolState.READ_ONLY:
            return ""
        if not self.failed:
            return DISK_FULL
        why = f"its disk failed: {self.failure}" if self.failure else "its disk failed"
        return why[:MAX_TROUBLE]

    @property
    def removed(self) -> bool:
        """Whether it is removed for good."""
        return self.record.membership == Membership.REMOVED

    @property
    def draining(self) -> bool:
        """Whether an operator wants it emptied."""
        return self.record.membership == Membership.DRAINING

    def info(self) -> PoolInfo:
        """Return the pool as the map tells of it."""
        record = self.record
        return PoolInfo(
            number=record.number,
            pool_id=record.pool_id,
            name=record.name,
            machine=record.machine,
            zone=record.zone,
            address=record.address,
            state=self.state.value,
            membership=record.membership,
            capacity=self.capacity,
            free=self.free,
            shards=self.shards,
            scrub=self.scrub,
            trouble=self.trouble,
        )

    def hear(self, said: Announce | Heartbeat, now: float) -> None:
        """Take down what a pool says of itself."""
        self.heard_at = now
        self.down = self.out = False
        self.failed = said.read_only
        self.failure = said.trouble
        self.capacity = said.capacity
        self.free = said.free
        room = max(1, min(_ROOM_BYTES, said.capacity // _FREE_STEPS))
        self.full = said.free < (2 * room if self.full else room)
        self.shards = said.shards
        if isinstance(said, Heartbeat):
            self.scrub = said.scrub

    def matters(self) -> tuple[object, ...]:
        """Return what readers of the map must learn of when it changes."""
        free_step = self.free * _FREE_STEPS // self.capacity if self.capacity else 0
        # Placement goes by capacity: a disk that was made larger is worth a new map, a few blocks are not.
        return self.record, self.state, self.trouble, free_step, _size_step(self.capacity)


class PoolTable:
    """All pools of the cluster. A pool that this master has not heard of is down."""

    def __init__(
        self,
        records: Mapping[int, PoolRecord],
        *,
        cluster_id: bytes,
        incarnation: bytes,
        term: int,
        heartbeat_s: float,
        down_after_s: float,
        replace_after_s: float,
        began: float,
    ) -> None:
        self._pools = {number: SeenPool(record=record) for number, record in sorted(records.items())}
        self._cluster_id = cluster_id
        self._incarnation = incarnation
        self._term = term
        self._silent_s = heartbeat_s * _SILENT_HEARTBEATS
        self._down_after_s = down_after_s
        self._replace_after_s = replace_after_s
        self._began = began
        # Versions of a later term are higher, so that nobody takes an old master's map for fresher.
        self._version = term << _MAPS_PER_TERM_BITS
        self._map: ClusterMap | None = None

    # -- what others see -----------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version of the map as it is now."""
        return self._version

    def map(self) -> ClusterMap:
        """Return the cluster map."""
        if self._map is None:
            self._map = ClusterMap(
                cluster_id=self._cluster_id,
                incarnation=self._incarnation,
                term=self._term,
                version=self._version,
                pools=self.infos(),
            )
        return self._map

    def settled(self, now: float) -> bool:
        """Whether each pool was heard of, or has had the time to be, since this master began."""
        return now - self._began >= self._down_after_s or all(
            pool.heard_at is not None for pool in self._pools.values() if not pool.removed
        )

    def infos(self) -> tuple[PoolInfo, ...]:
        """Return all pools, with figures that may be fresher than the map's."""
        return tuple(pool.info() for pool in self._pools.values() if not pool.removed)

    def unreadable(self) -> frozenset[int]:
        """Return the numbers of the pools that nothing can be relied on to be read from now."""
        return frozenset(
            number
            for number, pool in self._pools.items()
            if pool.down or pool.record.checking or pool.removed
        )

    def out(self) -> frozenset[int]:
        """Return the numbers of the pools whose shards count as missing: out, or removed."""
        return frozenset(number for number, pool in self._pools.items() if pool.out or pool.removed)

    def removed(self) -> frozenset[int]:
        """Return the numbers of the pools that are removed for good."""
        return frozenset(number for number, pool in self._pools.items() if pool.removed)

    def failed(self) -> frozenset[int]:
        """Return the numbers of the pools whose disks failed, and which can still be read."""
        return frozenset(
            number
            for number, pool in self._pools.items()
            if pool.failed and not pool.down and not pool.removed
        )

    def leaving(self) -> frozenset[int]:
        """Return the numbers of the pools that are to be emptied, and can be read: failed, or draining."""
        draining = (number for number, pool in self._pools.items() if pool.draining and not pool.down)
        return self.failed().union(draining)

    def compared(self, start: int) -> frozenset[int]:
        """Return the numbers of the pools that have compared all that they hold since this start."""
        return frozenset(number for number, pool in self._pools.items() if pool.compared == start)

    def uncompared(self, start: int) -> list[PoolRecord]:
        """Return the records of the pools that have not."""
        return [pool.record for pool in self._pools.values() if pool.compared != start and not pool.removed]

    def quarantined(self) -> int:
        """Return how many shards on pools belong to no history that the catalogue knows."""
        return sum(pool.quarantined for pool in self._pools.values() if not pool.down)

    def known(self, number: int) -> PoolRecord:
        """Return a pool's record; raise NotFound for a number that was never handed out."""
        return self._seen(number).record

    def named(self, name: str) -> PoolRecord:
        """Return the pool of this name or number, by number also a removed one: numbers are used once.

        Raise NotFound, or Conflict when several have the name.
        """
        found = [
            pool.record
            for number, pool in self._pools.items()
            if name == str(number) or (name == pool.record.name and not pool.removed)
        ]
        exact = [record for record in found if record.name == name] or found
        if len(exact) > 1:
            numbers = ", ".join(str(record.number) for record in exact)
            raise Conflict(f"several pools are called {name!r}: name one by its number ({numbers})")
        if not exact:
            raise NotFound(f"there is no pool {name!r}; `droppex pools` lists them")
        return exact[0]

    def running(self, number: int, boot_id: bytes) -> PoolRecord:
        """Return a pool's record; raise NotFound unless this start of it was announced last."""
        pool = self._seen(number)
        if pool.removed or pool.record.boot_id != boot_id:
            raise NotFound(f"this start of pool {number} is not known here; announce it")
        return pool.record

    def is_down(self, number: int) -> bool:
        """Return whether a pool is silent."""
        return self._seen(number).down

    def _seen(self, number: int) -> SeenPool:
        pool = self._pools.get(number)
        if pool is None:
            raise NotFound(f"pool {number} is not known here; announce it")
        return pool

    # -- what pools tell -----------------------------------------------------------------------

    def judge(self, announce: Announce, now: float, wall_ms: int) -> PoolRecord:
        """Return the record for a pool that started, with number 0 for one that is new to the cluster.

        Raise IdentityError when it belongs to another cluster, or is a copy of a pool that lives; PeerBusy
        while that is not clear: an earlier start of it was heard a moment ago from another address.
        """
        if announce.cluster_id and announce.cluster_id != self._cluster_id:
            raise IdentityError(
                f"pool {announce.name!r} belongs to cluster {announce.cluster_id.hex()}, and this is cluster "
                f"{self._cluster_id.hex()}; give the pool an empty data folder to join this one"
            )
        pool = next((one for one in self._pools.values() if one.record.pool_id == announce.pool_id), None)
        if pool is None:
            if not announce.cluster_id:
                self._check_name(announce)
            # Else it is no empty folder: it has joined in a history that was lost with a newer catalogue.
            return PoolRecord(
                number=0,
                pool_id=announce.pool_id,
                name=announce.name,
                machine=announce.machine,
                zone=announce.zone,
                address=announce.address,
                boot_id=announce.boot_id,
                joined_ms=wall_ms,
                capacity=announce.capacity,
            )
        if pool.record.membership == Membership.REMOVED:
            raise IdentityError(f"pool {announce.name!r} was removed from the cluster; it cannot come back")
        self._challenge(pool, announce, now)
        # A start whose predecessor is not the last one that was heard of: the folder may be an old copy.
        known = pool.record.boot_id
        strange = bool(known) and known not in (announce.boot_id, announce.previous_boot_id)
        resized = _size_step(announce.capacity) != _size_step(pool.record.capacity)
        return replace(
            pool.record,
            checking=pool.record.checking or strange,
            name=announce.name,
            machine=announce.machine,
            zone=announce.zone,
            address=announce.address,
            boot_id=announce.boot_id,
            capacity=announce.capacity if resized else pool.record.capacity,
        )

    def _check_name(self, announce: Announce) -> None:
        """Refuse an empty folder in the place of a pool's: its disk may only not be mounted."""
        for pool in self._pools.values():
            record = pool.record
            if not pool.removed and (record.name, record.machine) == (announce.name, announce.machine):
                raise IdentityError(
                    f"this data folder is new, but pool {record.name!r} of machine {record.machine!r} is "
                    f"known to the cluster with another one. Is its disk mounted? If that one is lost, run "
                    f"`droppex pools replace {record.name}` first; if this is one more pool of the machine, "
                    "give it another name"
                )

    def _challenge(self, pool: SeenPool, announce: Announce, now: float) -> None:
        """Let a new start of a pool take over from the last, unless that one still lives elsewhere."""
        record = pool.record
        if announce.boot_id == record.boot_id or announce.address == record.address:
            return
        # Of a pool that this master has not heard of yet, nobody knows whether its last start still lives:
        # it gets as long to be heard as one that fell silent when this master began.
        heard_at = self._began if pool.heard_at is None else pool.heard_at
        if now - heard_at > self._silent_s:
            return
        heard_since = pool.challenged_at is not None and heard_at > pool.challenged_at
        follows = pool.heard_at is None or announce.previous_boot_id == record.boot_id
        if heard_since or not follows:
            raise IdentityError(
                f"pool {record.name!r} is running at {record.address}; this one, at {announce.address}, "
                "has a copy of its data folder. Stop one of the two, for good"
            )
        if pool.challenged_at is None:
            pool.challenged_at = now
        raise PeerBusy(
            f"pool {record.name!r} may still run at {record.address}, where it was a moment ago; "
            "announce it again in some seconds"
        )

    def enter(self, record: PoolRecord, announce: Announce, now: float) -> None:
        """Take in a pool whose record is durable."""
        pool = self._pools.setdefault(record.number, SeenPool(record))
        before = None if pool.heard_at is None else pool.matters()
        pool.record = record
        pool.challenged_at = None
        pool.compared = 0
        pool.hear(announce, now)
        self._note(before, pool)

    def heartbeat(self, beat: Heartbeat, now: float) -> PoolRecord | None:
        """Take in a heartbeat; return the record to be written when the pool's folder is checked now.

        Raise NotFound when the pool must announce itself, and with that compare what it holds with the
        records: its number is not known, its boot id is not the one that was announced last, or it was out.
        """
        pool = self._seen(beat.number)
        if pool.removed:
            raise IdentityError(
                f"pool {pool.record.name!r} was removed from the cluster; it cannot come back"
            )
        if pool.record.boot_id != beat.boot_id:
            raise NotFound(f"this start of pool {beat.number} is not known here; announce it")
        if pool.out:
            raise NotFound(f"pool {beat.number} was counted as lost meanwhile; announce it")
        before = pool.matters()
        pool.hear(beat, now)
        pool.quarantined = beat.quarantined
        pool.compared = beat.compared
        self._note(before, pool)
        return replace(pool.record, checking=False) if pool.record.checking and beat.reconciled else None

    def checked(self, record: PoolRecord) -> None:
        """Take in that what a pool holds was compared with the records."""
        pool = self._seen(record.number)
        if pool.record.boot_id == record.boot_id:
            before = pool.matters()
            pool.record = record
            self._note(before, pool)

    def expire(self, now: float) -> list[PoolRecord]:
        """Mark the pools down that were silent for too long, and return them."""
        silent: list[PoolRecord] = []
        for pool in self._pools.values():
            if not pool.down and pool.heard_at is not None and now - pool.heard_at > self._down_after_s:
                before = pool.matters()
                pool.down = True
                silent.append(pool.record)
                self._note(before, pool)
        return silent

    def give_up(self, now: float, most: int) -> list[PoolRecord]:
        """Count pools as out that were down for `replace_after_s`; return the new ones.

        At most `most` are out at once. The time is of this master's own observation.
        """
        given_up: list[PoolRecord] = []
        out = sum(pool.out and not pool.removed for pool in self._pools.values())
        for pool in self._pools.values():
            silent_since = self._began if pool.heard_at is None else pool.heard_at
            if (
                pool.down
                and not pool.out
                and not pool.removed
                and now - silent_since >= self._replace_after_s
                and out < most
            ):
                before = pool.matters()
                pool.out = True
                out += 1
                given_up.append(pool.record)
                self._note(before, pool)
        return given_up

    def decide(self, record: PoolRecord) -> None:
        """Take note of what an operator decided about a pool, whose record is durable."""
        pool = self._seen(record.number)
        before = pool.matters()
        pool.record = record
        self._note(before, pool)

    def remove(self, record: PoolRecord) -> None:
        """Take in that a pool was removed for good."""
        pool = self._seen(record.number)
        before = pool.matters()
        pool.record = record
        pool.down = True
        self._note(before, pool)

    def _note(self, before: tuple[object, ...] | None, pool: SeenPool) -> None:
        if before != pool.matters():
            self._version += 1
            self._map = None


def _size_step(capacity: int) -> int:
    return int(math.log2(max(1, capacity)) * _SIZE_STEPS)
