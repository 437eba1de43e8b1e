"""The end of a round: faults are over, everybody runs, and the cluster must come to rest."""

import trio

from droppexd.errors import DroppexError, PeerBusy
from droppexd.model import MISSING, ClusterStatus, PoolState, shard_size
from droppexd.placement import Placement
from droppexd.store.simulated import OVERHEAD_BYTES
from tests.simulation.simulator import catalogue
from tests.simulation.simulator.checks.bounds import Bounds
from tests.simulation.simulator.cluster import Cluster
from tests.simulation.simulator.plan import Operation, Verb
from tests.simulation.simulator.workload import Person

READABLE = "acknowledged-is-readable"
RESTS = "comes-to-rest"

_PATIENCE_S = 10.0
_BETWEEN_TRIES_S = 2.0
_REAPED_S = 6.0
"""After an app may forget a silent transfer, until it has looked for such."""


def unrest(cluster: Cluster, bounds: Bounds) -> str:
    """Return the first thing that still keeps the cluster from being at rest; empty when nothing does."""
    for name in cluster.wanted:
        process = cluster.processes.get(name)
        if process is None or not process.ready:
            return f"{name} is not ready"
    if cluster.replacing:
        return f"pools {sorted(cluster.replacing)} are still to be replaced"
    if cluster.deciding:
        return "an operator is about to be heard"
    if cluster.agreed is not None and cluster.agreed.difference():
        return cluster.agreed.difference()
    return bounds.not_given_back() or _unnamed(cluster) or _redundancy(cluster) or _drained(cluster)


def _unnamed(cluster: Cluster) -> str:
    world = cluster.world
    for number, disk in catalogue.disks(world).items():
        if disk.lost:
            continue
        for extent_id, index in disk.order:
            record = catalogue.extent(world, extent_id)
            pool = None if record is None else record.pools[index]
            if pool == number:
                continue
            if pool == MISSING and number in record.pools and not disk.sound((extent_id, index)):
                # Damaged, and kept while the shard is missing, which no pool has room for: it may be all that
                # is left of it. Here it cannot be mended, for the pool has another shard of the extent.
                continue
            return f"{disk.name} holds shard {index} of extent {extent_id}, which no record names"
    silent = any(
        disk.lost and number not in catalogue.removed(world)
        for number, disk in catalogue.disks(world).items()
    )
    if catalogue.garbage(world) and not silent:
        return f"{catalogue.garbage(world)} dead extents are not confirmed by their pools"
    return ""


def _redundancy(cluster: Cluster) -> str:
    """Say which extent lacks shards though there are pools that could have them."""
    by_number = catalogue.disks(cluster.world)
    for record in catalogue.extents(cluster.world):
        sound = catalogue.sound_shards(record, by_number)
        size = OVERHEAD_BYTES + shard_size(record.size, record.chunk_size, record.layout.k)
        room = [
            disk
            for number, disk in by_number.items()
            if not disk.lost and number not in record.pools and disk.free() >= 2 * size
        ]
        if sound < record.layout.total and (room or sound < sum(pool != MISSING for pool in record.pools)):
            return f"extent {record.id} has {sound} of {record.layout.total} shards"
    return ""


def _drained(cluster: Cluster) -> str:
    """Say which extent has a shard on a pool that is drained, though there is a pool that could have it."""
    by_number = catalogue.disks(cluster.world)
    members = catalogue.members(cluster.world)
    draining = catalogue.draining(cluster.world)
    for record in catalogue.extents(cluster.world):
        size = OVERHEAD_BYTES + shard_size(record.size, record.chunk_size, record.layout.k)
        room = [
            number
            for number in members
            if number not in record.pools
            and not by_number[number].lost
            and by_number[number].free() >= 2 * size
        ]
        on = [number for number in record.pools if number in draining and not by_number[number].lost]
        if on and room and MISSING not in record.pools:
            return f"extent {record.id} is still on pool {on[0]}, which is drained"
    return ""


async def untruth(person: Person, cluster: Cluster) -> str:
    """Return what `status` says that is not so; empty when there is nothing."""
    try:
        status = await person.status()
    except DroppexError as error:
        return f"no status: {error}"
    world = cluster.world
    versions = list(catalogue.versions(world))
    found = (status.files, status.size, status.extents, status.garbage)
    names = len(catalogue.names(world))
    size = sum(version.size for version in versions)
    extents = sum(len(version.extents) for version in versions)
    wanted = (names, size, extents, catalogue.garbage(world))
    if found != wanted:
        return f"status counts files, bytes, extents, garbage {found}; there are {wanted}"
    return _states(status, cluster) or _survival(status, cluster) or _misplaced(status, cluster)


def _states(status: ClusterStatus, cluster: Cluster) -> str:
    by_number = catalogue.disks(cluster.world)
    for pool in status.pools:
        disk = by_number.get(pool.number)
        gone = disk is None or disk.lost
        if gone == (pool.state in (PoolState.UP, PoolState.READ_ONLY)):
            return f"status calls pool {pool.number} {pool.state}"
    return ""


def _misplaced(status: ClusterStatus, cluster: Cluster) -> str:
    """Say that shards are to move still, or which is though status says that none is.

    Where a disk was full when they were looked for they stay: there only those count that have ample room.
    """
    if not status.repair.balanced:
        return "status says that shards are to be moved"
    placement = Placement(status.pools)
    ample = {pool.number for pool in status.pools if pool.writable and pool.free > pool.capacity // 2}
    for record in catalogue.extents(cluster.world):
        move = placement.move(record.id, record.layout, record.pools, ample.__contains__)
        if MISSING not in record.pools and move is not None:
            at, pool = move
            return f"status calls all in place; shard {at} of extent {record.id} belongs on pool {pool}"
    return ""


def _survival(status: ClusterStatus, cluster: Cluster) -> str:
    by_number = catalogue.disks(cluster.world)
    counted: dict[int, int] = {}
    for record in catalogue.extents(cluster.world):
        survives = catalogue.sound_shards(record, by_number) - record.layout.k
        counted[survives] = counted.get(survives, 0) + 1
    told = {line.survives: line.extents for line in status.survival if line.extents}
    if told != counted:
        return f"status counts extents by losses survived {told}; there are {counted}"
    return ""


async def check_readable(person: Person, cluster: Cluster, first: int) -> None:
    """Read every name whole: what has k sound shards of each extent must come back.

    An app learns within some seconds where pools are that were started again; it gets that long. And where a
    client has vanished with the only transfer that an app takes at once, until that is forgotten.
    """
    for number, name in enumerate(cluster.names, first):
        reading = Operation(number=number, client=0, verb=Verb.GET, name=name, patience_s=60.0)
        began = trio.current_time()
        while error := await _read(person, cluster, reading):
            busy_s = cluster.shape.idle_s + _REAPED_S if error.startswith(PeerBusy.__name__) else 0.0
            if trio.current_time() >= began + _PATIENCE_S + busy_s:
                break
            await trio.sleep(_BETWEEN_TRIES_S)
        if error:
            cluster.world.report(READABLE, f"{name} has enough sound shards, and cannot be read: {error}")


async def _read(person: Person, cluster: Cluster, reading: Operation) -> str:
    """Read a name and return the error if there is one, and no good reason for it."""
    world = cluster.world
    found = catalogue.names(world).get(reading.name)
    error = await person.do(reading)
    if not error or found is None or found != catalogue.names(world).get(reading.name):
        return ""  # A change that nobody waits for any more may still come through.
    by_number = catalogue.disks(world)
    version = next(one for one in catalogue.versions(world) if one.id == found.version)
    records = [catalogue.extent(world, extent_id) for extent_id in version.extents]
    readable = all(catalogue.sound_shards(record, by_number) >= record.layout.k for record in records)
    return error if readable else ""
