"""The changes of extent records: shards that are lost, and shards that are there again.

Which pool holds a shard changes only here, and always by comparing first: with the record's edition for a
shard that is there, with the pool that the record names for one that is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from droppexd.catalog.batch import Batch
from droppexd.catalog.keys import (
    REBUILT,
    RESTORED,
    extent_key,
    garbage_key,
    parse_work,
    version_key,
    work_key,
)
from droppexd.catalog.records import StoredExtent, unpack_extent, unpack_garbage
from droppexd.model import MISSING, ExtentId

RELEASE_AT_ONCE = 500
"""Garbage records that a removed pool is taken off in one go."""

Place = tuple[ExtentId, int, int]
"""An extent, the index of a shard, and the edition of the record that was read."""


async def _load(batch: Batch, extents: Sequence[ExtentId]) -> dict[ExtentId, StoredExtent]:
    """Return the records that are there, with their versions read as well, for the counters."""
    found: dict[ExtentId, StoredExtent] = {}
    for extent in extents:
        value = await batch.get(extent_key(extent))
        if value is not None:
            found[extent] = unpack_extent(extent, value)
    await batch.load([version_key(stored.version) for stored in found.values()])
    return found


async def _put(batch: Batch, stored: StoredExtent, pools: tuple[int, ...]) -> StoredExtent:
    old = stored.extent
    new = replace(old, pools=pools, edition=old.edition + 1)
    batch.replace_extent(old, new, await batch.version(stored.version))
    return StoredExtent(new, stored.version)


def _with(pools: tuple[int, ...], shard: int, pool: int) -> tuple[int, ...]:
    return (*pools[:shard], pool, *pools[shard + 1 :])


@dataclass(frozen=True, slots=True)
class PlaceShards:
    """A pool holds these shards now, verified: record it where nobody changed the record meanwhile.

    And only while that start of the pool is its last: the next one may have asked what to drop already, or
    come up from an older copy of the disk.
    """

    pool: int
    boot_id: bytes
    """Which start of the pool says so."""
    places: Sequence[Place]

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [extent_key(extent) for extent, _, _ in self.places]

    async def judge(self, batch: Batch) -> list[Place]:
        """Compare and set each; return those that were refused."""
        state = batch.state
        if state.gone(self.pool) or state.pools[self.pool].boot_id != self.boot_id:
            return list(self.places)
        records = await _load(batch, [extent for extent, _, _ in self.places])
        refused: list[Place] = []
        for place in self.places:
            extent, shard, edition = place
            stored = records.get(extent)
            if stored is None or stored.extent.edition != edition or shard >= len(stored.extent.pools):
                refused.append(place)
                continue
            pools = _with(stored.extent.pools, shard, self.pool)
            if pools.count(self.pool) > 1:
                refused.append(place)
            else:
                records[extent] = await _put(batch, stored, pools)
        return refused


@dataclass(frozen=True, slots=True)
class LoseShards:
    """A pool says that it has not, or has damaged, shards that the records may name it for.

    A damaged shard of an extent that would have fewer than k left stays on record: one with a bad piece has
    good ones, and readers go where records send them.
    """

    pool: int
    shards: Sequence[tuple[ExtentId, int, bool]]
    """Extent, index of the shard, and whether it is there, but damaged."""

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [extent_key(extent) for extent, _, _ in self.shards]

    async def judge(self, batch: Batch) -> int:
        """Record these shards as missing; return how many were recorded for the pool before."""
        records = await _load(batch, [extent for extent, _, _ in self.shards])
        lost = 0
        for extent, shard, damaged in self.shards:
            stored = records.get(extent)
            if stored is None or (damaged and stored.extent.survives <= 0):
                continue
            pools = stored.extent.pools
            if shard < len(pools) and pools[shard] == self.pool:
                records[extent] = await _put(batch, stored, _with(pools, shard, MISSING))
                lost += 1
        return lost


@dataclass(frozen=True, slots=True)
class LosePool:
    """A pool counts as lost for good: what these extents have there is missing, whatever is left of them."""

    pool: int
    extents: Sequence[ExtentId]

    def reads(self) -> list[bytes]:
        """Return what judging reads."""
        return [extent_key(extent) for extent in self.extents]

    async def judge(self, batch: Batch) -> int:
        """Record the shards as missing, unless the pool has come back by now; return how many."""
        if not batch.state.gone(self.pool):
            return 0
        lost = 0
        for stored in (await _load(batch, self.extents)).values():
            pools = stored.extent.pools
            if self.pool in pools:
                await _put(batch, stored, _with(pools, pools.index(self.pool), MISSING))
                lost += 1
        return lost


@dataclass(frozen=True, slots=True)
class ReleaseGarbage:
    """Wait no longer for a removed pool to confirm that it dropped dead shards."""

    pool: int

    def reads(self) -> list[bytes]:
        """Return nothing: the pool's work is read as a range."""
        return []

    async def judge(self, batch: Batch) -> bool:
        """Take the pool off a bounded number of garbage records; return whether there may be more."""
        found = await batch.engine.range(work_key(self.pool, 0), work_key(self.pool + 1, 0), RELEASE_AT_ONCE)
        extents = [parse_work(entry.key) for entry in found]
        await batch.load([garbage_key(extent) for extent in extents])
        for extent in extents:
            value = await batch.get(garbage_key(extent))
            if value is not None:
                batch.confirm_garbage(extent, unpack_garbage(value), (self.pool,))
        return len(found) == RELEASE_AT_ONCE


@dataclass(frozen=True, slots=True)
class EndRestore:
    """The records of a restored catalogue are true again: what they place elsewhere is dead from now on."""

    def reads(self) -> list[bytes]:
        """Return nothing."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Take the mark away."""
        batch.delete(RESTORED)
        batch.after_commit(lambda: setattr(batch.state, "restored_ms", None))


@dataclass(frozen=True, slots=True)
class EndRebuild:
    """What shards alone told of was adopted, as far as it can be read."""

    def reads(self) -> list[bytes]:
        """Return nothing."""
        return []

    async def judge(self, batch: Batch) -> None:
        """Take the mark away."""
        batch.delete(REBUILT)
        batch.after_commit(lambda: setattr(batch.state, "rebuilt_from", None))


@dataclass(frozen=True, slots=True)
class Barrier:
    """Changes nothing: when it is judged and committed, everything judged before it is."""

    def reads(self) -> list[bytes]:
        """Return nothing."""
        return []

    async def judge(self, _batch: Batch) -> None:
        """Do nothing."""
