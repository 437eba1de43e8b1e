"""The pools as the master sees them: permanent records, and what heartbeats tell. Pure; time is handed in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from droppexd.errors import IdentityError, NotFound, PeerBusy
from droppexd.model import ClusterMap, Membership, PoolInfo, PoolRecord, PoolState
from droppexd.wire.messages import Announce, Heartbeat

_SILENT_HEARTBEATS = 2.5
"""After so many heartbeats without a word a start of a pool is taken to be over."""

_FREE_STEPS = 64
"""Free space matters to the map in steps of 1/64 of a disk."""

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
    full: bool = False
    capacity: int = 0
    free: int = 0
    shards: int = 0
    down: bool = True
    challenged_at: float | None = None
    """When another start of the same pool first asked to take over."""

    @property
    def state(self) -> PoolState:
        """What the master makes of it."""
        if self.down:
            return PoolState.DOWN
        return PoolState.READ_ONLY if self.failed or self.full else PoolState.UP

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
        )

    def hear(self, said: Announce | Heartbeat, now: float) -> None:
        """Take down what a pool says of itself."""
        self.heard_at = now
        self.down = False
        self.failed = said.read_only
        self.capacity = said.capacity
        self.free = said.free
        room = max(1, min(_ROOM_BYTES, said.capacity // _FREE_STEPS))
        self.full = said.free < (2 * room if self.full else room)
        self.shards = said.shards

    def matters(self) -> tuple[object, ...]:
        """Return what readers of the map must learn of when it changes."""
        free_step = self.free * _FREE_STEPS // self.capacity if self.capacity else 0
        return self.record, self.state, free_step


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
        began: float,
    ) -> None:
        self._pools = {number: SeenPool(record) for number, record in sorted(records.items())}
        self._cluster_id = cluster_id
        self._incarnation = incarnation
        self._term = term
        self._silent_s = heartbeat_s * _SILENT_HEARTBEATS
        self._down_after_s = down_after_s
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

    def infos(self) -> tuple[PoolInfo, ...]:
        """Return all pools, with figures that may be fresher than the map's."""
        return tuple(pool.info() for pool in self._pools.values())

    def unreadable(self) -> frozenset[int]:
        """Return the numbers of the pools that nothing can be read from now."""
        return frozenset(number for number, pool in self._pools.items() if pool.down)

    def full(self) -> frozenset[int]:
        """Return the numbers of the pools that take no writes for want of room alone."""
        return frozenset(number for number, pool in self._pools.items() if pool.full and not pool.failed)

    def known(self, number: int) -> PoolRecord:
        """Return a pool's record; raise NotFound for a number that was never handed out."""
        return self._seen(number).record

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
            return PoolRecord(
                number=0,
                pool_id=announce.pool_id,
                name=announce.name,
                machine=announce.machine,
                zone=announce.zone,
                address=announce.address,
                boot_id=announce.boot_id,
                joined_ms=wall_ms,
            )
        if pool.record.membership == Membership.REMOVED:
            raise IdentityError(f"pool {announce.name!r} was removed from the cluster; it cannot come back")
        self._challenge(pool, announce, now)
        return replace(
            pool.record,
            name=announce.name,
            machine=announce.machine,
            zone=announce.zone,
            address=announce.address,
            boot_id=announce.boot_id,
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
        pool.hear(announce, now)
        self._note(before, pool)

    def heartbeat(self, beat: Heartbeat, now: float) -> None:
        """Take in a heartbeat.

        Raise NotFound when the pool must announce itself: its number is not known, or its boot id is not
        the one that announced itself last.
        """
        pool = self._seen(beat.number)
        if pool.record.boot_id != beat.boot_id:
            raise NotFound(f"this start of pool {beat.number} is not known here; announce it")
        before = pool.matters()
        pool.hear(beat, now)
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

    def _note(self, before: tuple[object, ...] | None, pool: SeenPool) -> None:
        if before != pool.matters():
            self._version += 1
            self._map = None
