"""Invariants 1 and 4 as seen from the disks: what a record names is there, and stays there."""

from collections.abc import Sequence

from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.keys import EXTENTS, extent_key, parse_id
from droppexd.catalog.records import unpack_extent
from droppexd.model import MISSING, ExtentId
from tests.simulation.simulator import catalogue
from tests.simulation.simulator.world import ShardKey, WatchedDisk, World

DROPPED = "no-live-shard-dropped"
FLUSHED = "acknowledged-is-flushed"
PLACED = "records-are-true"


class LiveShardsStay:
    """Watches every drop: a shard that the catalogue names at that moment must not go."""

    def __init__(self, world: World) -> None:
        self._world = world
        world.on_drop.append(self._dropped)

    def _dropped(self, disk: WatchedDisk, key: ShardKey, generation: int) -> None:
        extent_id, index = key
        record = catalogue.extent(self._world, extent_id)
        if record is None or record.pools[index] == MISSING:
            return
        named = catalogue.disks(self._world).get(record.pools[index])
        if named is disk:
            self._world.report(
                DROPPED,
                f"{disk.name} dropped shard {index} of live extent {extent_id}, generation {generation}",
            )


class CommitsNameFlushedShards:
    """Watches every change of a record: each shard that it newly names must be flushed on its pool.

    A shard of a running upload that was dropped before its commit shows here, too.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._named: dict[bytes, tuple[int, ...]] = {}
        world.on_write.append(self._written)

    def _written(self, _revision: int, then: Sequence[Write]) -> None:
        for key, value in then:
            if not key.startswith(EXTENTS):
                continue
            before = self._named.pop(key, ())
            if value is None:
                continue
            extent_id = ExtentId(*parse_id(key))
            pools = self._named[key] = unpack_extent(extent_id, value).extent.pools
            assert key == extent_key(extent_id)
            by_number = catalogue.disks(self._world)
            for index, pool in enumerate(pools):
                if pool == MISSING or before[index : index + 1] == (pool,):
                    continue
                disk = by_number.get(pool)
                if disk is None or not disk.accounted_for((extent_id, index)):
                    self._world.report(
                        FLUSHED,
                        f"a record names shard {index} of extent {extent_id} on pool {pool} "
                        f"({disk.name if disk else 'unknown'}), where it is not on disk",
                    )


def check_placed(world: World) -> None:
    """Look at all records: every shard that one names is on its pool's disk, or a fault took it."""
    by_number = catalogue.disks(world)
    for record in catalogue.extents(world):
        for pool, key in catalogue.shards(record):
            disk = by_number.get(pool)
            if disk is None or not disk.accounted_for(key):
                world.report(
                    PLACED,
                    f"shard {key[1]} of extent {key[0]} is recorded on pool {pool} and is not there",
                )
