"""The catalogue as it is on its disk, read record by record, past the code that keeps it."""

from collections.abc import Iterator

from droppexd.catalog.keys import (
    DEGRADED,
    EXTENTS,
    GARBAGE,
    NAMES,
    POOLS,
    UPLOADS,
    VERSIONS,
    extent_key,
    garbage_key,
    parse_degraded,
    parse_id,
)
from droppexd.catalog.records import (
    Name,
    unpack_extent,
    unpack_name,
    unpack_pool,
    unpack_version,
)
from droppexd.model import MISSING, Extent, ExtentId, Membership, PoolRecord, Version, VersionId
from tests.simulation.simulator.world import ShardKey, WatchedDisk, World


def extents(world: World) -> Iterator[Extent]:
    """Yield the records of all live extents."""
    for key, entry in world.catalogue.entries.items():
        if key.startswith(EXTENTS):
            yield unpack_extent(ExtentId(*parse_id(key)), entry.value).extent


def owners(world: World) -> Iterator[tuple[ExtentId, VersionId]]:
    """Yield all live extents with the versions that they belong to."""
    for key, entry in world.catalogue.entries.items():
        if key.startswith(EXTENTS):
            extent_id = ExtentId(*parse_id(key))
            yield extent_id, unpack_extent(extent_id, entry.value).version


def extent(world: World, extent_id: ExtentId) -> Extent | None:
    """Return the record of an extent, if it is live."""
    entry = world.catalogue.entries.get(extent_key(extent_id))
    return None if entry is None else unpack_extent(extent_id, entry.value).extent


def versions(world: World) -> Iterator[Version]:
    """Yield the records of all live versions."""
    for key, entry in world.catalogue.entries.items():
        if key.startswith(VERSIONS):
            yield unpack_version(VersionId(*parse_id(key)), entry.value)


def uploads(world: World) -> set[VersionId]:
    """Return the versions that are uploads still."""
    return {VersionId(*parse_id(key)) for key in world.catalogue.entries if key.startswith(UPLOADS)}


def names(world: World) -> dict[str, Name]:
    """Return what each name points at."""
    return {
        key[len(NAMES) :].decode(): unpack_name(entry.value)
        for key, entry in world.catalogue.entries.items()
        if key.startswith(NAMES)
    }


def garbage(world: World) -> int:
    """Return how many dead extents some pool has not confirmed."""
    return sum(key.startswith(GARBAGE) for key in world.catalogue.entries)


def is_garbage(world: World, extent_id: ExtentId) -> bool:
    """Return whether an extent is dead, and some pool has not confirmed that."""
    return garbage_key(extent_id) in world.catalogue.entries


def degraded(world: World) -> set[tuple[int, ExtentId]]:
    """Return the degraded index."""
    return {parse_degraded(key) for key in world.catalogue.entries if key.startswith(DEGRADED)}


def pool_number(world: World, pool_id: bytes) -> int | None:
    """Return the number of a pool, once it has one."""
    return next((record.number for record in _pools(world) if record.pool_id == pool_id), None)


def removed(world: World) -> set[int]:
    """Return the numbers of the pools that an operator has replaced."""
    return {record.number for record in _pools(world) if record.membership == Membership.REMOVED}


def members(world: World) -> set[int]:
    """Return the numbers of the pools that are used like any other."""
    return {record.number for record in _pools(world) if record.membership == Membership.MEMBER}


def draining(world: World) -> set[int]:
    """Return the numbers of the pools that an operator wants emptied."""
    return {record.number for record in _pools(world) if record.membership == Membership.DRAINING}


def _pools(world: World) -> Iterator[PoolRecord]:
    for key, entry in world.catalogue.entries.items():
        if key.startswith(POOLS):
            yield unpack_pool(entry.value)


def disks(world: World) -> dict[int, WatchedDisk]:
    """Return the disks by the number of their pool."""
    found = {}
    for record in _pools(world):
        disk = world.disk_of(record.pool_id)
        if disk is not None:
            found[record.number] = disk
    return found


def shards(record: Extent) -> Iterator[tuple[int, ShardKey]]:
    """Yield pool and key of each shard that a record names."""
    for index, pool in enumerate(record.pools):
        if pool != MISSING:
            yield pool, (record.id, index)


def sound_shards(record: Extent, by_number: dict[int, WatchedDisk]) -> int:
    """Return how many shards of an extent are whole where its record says that they are."""
    return sum(pool in by_number and by_number[pool].sound(key) for pool, key in shards(record))
