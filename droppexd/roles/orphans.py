"""What shards without a record say together: pure functions of what pools tell of their headers.

Shards of one extent agree when their headers say the same of layout, sizes and version. What most say counts;
a header that says otherwise is taken for a damaged one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from droppexd.errors import InvalidName, InvalidRequest, NotEnoughShards
from droppexd.model import (
    EXTENT_CHUNKS,
    MAX_NAME_BYTES,
    MISSING,
    UNKNOWN_PLACE,
    Extent,
    ExtentId,
    Layout,
    VersionId,
    normal_name,
)
from droppexd.wire.messages import MAX_HOLDERS, OrphanExtent, OrphanHeader, OrphanPlace, OrphanShard

_ROOM_BYTES = 64
"""Of a name, left for what the master adds to make it unique."""

_Said = tuple[Layout, int, int, VersionId]


def _said(header: OrphanHeader) -> _Said:
    return header.layout, header.size, header.chunk_size, header.version


def describe_extent(extent: ExtentId, shards: Sequence[tuple[int, OrphanShard]]) -> OrphanExtent:
    """Return an extent as its shards tell of it; each comes with the number of the pool that has it."""
    indexes: dict[_Said, set[int]] = defaultdict(set)
    for _, shard in shards:
        if shard.header is not None and shard.holding.shard < shard.header.layout.total:
            indexes[_said(shard.header)].add(shard.holding.shard)
    # Sorted, so that the same shards give the same answer in whatever order their pools answered.
    common = max(sorted(indexes), key=lambda said: len(indexes[said]), default=None)
    agreeing: list[OrphanHeader] = []
    places: list[OrphanPlace] = []
    for pool, shard in sorted(shards, key=lambda one: (one[1].holding.shard, one[0])):
        index = shard.holding.shard
        agrees = shard.header is not None and _said(shard.header) == common and index in indexes[common]
        if agrees and shard.header is not None:
            agreeing.append(shard.header)
        places.append(OrphanPlace(index, pool, agrees))
    # Those that agree first: they count, should there be more than can be told.
    places.sort(key=lambda place: not place.agrees)
    # What an older release rebuilt tells less than the others do.
    header = max(agreeing, key=lambda one: (one.place != UNKNOWN_PLACE, bool(one.name)), default=None)
    return OrphanExtent(id=extent, header=header, places=tuple(places[:MAX_HOLDERS]))


def assign_pools(layout: Layout, holders: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Return a pool for each shard, MISSING where there is none; `holders` are the pools by shard index.

    No pool is named twice: a record names a pool for one shard alone. The shards with the fewest holders
    choose first.
    """
    pools = [MISSING] * layout.total
    for index in sorted(holders, key=lambda index: (len(holders[index]), index)):
        free = [pool for pool in holders[index] if pool not in pools]
        if free:
            pools[index] = min(free)
    return tuple(pools)


def check_whole(version: VersionId, extents: Iterable[OrphanExtent]) -> tuple[OrphanHeader, ...]:
    """Return what the headers say of these extents, if together they can be a version.

    All but the last must be full, each of this version, and k of its shards there. Where headers do not tell
    the places, since an older release wrote them, the ids of the upload do. Raise NotEnoughShards, and
    InvalidRequest for extents that are not one version's.
    """
    headers: list[OrphanHeader] = []
    before: tuple[int, int] = version
    full = True
    for number, extent in enumerate(extents):
        header = extent.header
        if header is None:
            raise NotEnoughShards(f"extent {extent.id}: no header of its shards can be read")
        if header.version != version or not _follows(extent.id, header.place, before, number):
            raise InvalidRequest(f"extent {extent.id} is none of version {version}, or not in its order")
        if not full:
            raise InvalidRequest(f"an extent before {extent.id} is not full: that was the end of the version")
        present = {place.shard for place in extent.places if place.agrees}
        if len(present) < header.layout.k:
            raise not_enough(extent.id, header.layout, present)
        full = header.size == header.chunk_size * EXTENT_CHUNKS
        if header.place == UNKNOWN_PLACE:
            before = extent.id
        headers.append(header)
    return tuple(headers)


def _follows(extent: ExtentId, place: int, before: tuple[int, int], number: int) -> bool:
    """Whether an extent may be the one with this number; `before` is an id of the upload that is lower."""
    if place != UNKNOWN_PLACE:
        return place == number
    return extent.session == before[0] and tuple(extent) > before


def not_enough(extent: ExtentId, layout: Layout, present: Iterable[int]) -> NotEnoughShards:
    """Return the error for an extent of which too few shards are left."""
    there = set(present)
    return NotEnoughShards(
        f"extent {extent}: {len(there)} of its shards are there and sound; {layout} is read from {layout.k}",
        [f"extent {extent} shard {index}" for index in range(layout.total) if index not in there],
    )


def candidate(extent: ExtentId, header: OrphanHeader, holders: Mapping[int, Sequence[int]]) -> Extent:
    """Return the record that an extent would have, its shards being with `holders`."""
    return Extent(
        id=extent,
        layout=header.layout,
        size=header.size,
        chunk_size=header.chunk_size,
        pools=assign_pools(header.layout, holders),
    )


def adopted_name(folder: str, hint: str, version: VersionId) -> str:
    """Return the name to give a version: its old one below a folder, or its id when that makes no name.

    Raise InvalidName for a folder that cannot be one.
    """
    folder = folder.rstrip("/")
    fallback = normal_name(f"{folder}/{version}")
    room = MAX_NAME_BYTES - _ROOM_BYTES - len(folder.encode()) - 1
    try:
        return normal_name(f"{folder}/{hint.encode()[: max(0, room)].decode(errors='ignore')}")
    except (InvalidName, UnicodeEncodeError):
        return fallback
