"""The faults: what each does to the cluster, and how it is undone. To add one, add a function here.

A fault is a generator function: it does its harm, yields, and undoes it when it is resumed. What it needs is
in its `Fault`; it decides nothing by chance. A fault that cannot be carried out now (its process does not run,
or it would take more shards than an extent can lose) returns without yielding.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import trio

from tests.simulation.simulator import catalogue
from tests.simulation.simulator.cluster import CONTROLLERS, Cluster, Shortage
from tests.simulation.simulator.plan import Fault
from tests.simulation.simulator.world import ShardKey, WatchedDisk

FaultKind = Callable[[Cluster, Fault], Iterator[None]]

HOUR_MS = 3_600_000
LATE_S = 4.0
"""Less than a pool waits for an answer."""


class Wounds:
    """Keeps the faults within what the cluster promises to survive: of no extent fewer than k shards sound.

    An extent that is being uploaded may be committed with k + 1 shards: it bears the loss of one.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._world = cluster.world

    def bearable(self, disk: WatchedDisk, keys: Iterable[ShardKey]) -> bool:
        """Whether every extent stays readable, and becomes so, when these shards of a disk go."""
        wanted = set(keys)
        by_number = catalogue.disks(self._world)
        uploading = {extent_id for extent_id, _ in wanted}
        for record in catalogue.extents(self._world):
            uploading.discard(record.id)
            losses = sum(
                key in wanted and by_number.get(pool) is disk and disk.sound(key)
                for pool, key in catalogue.shards(record)
            )
            if losses and catalogue.sound_shards(record, by_number) - losses < record.layout.k:
                return False
        harmed = wanted | {key for one in self._world.disks.values() for key in one.harmed()}
        counted = Counter(extent_id for extent_id, _ in harmed)
        return all(
            counted[extent_id] <= 1 or catalogue.is_garbage(self._world, extent_id) for extent_id in uploading
        )


# -- processes -------------------------------------------------------------------------------------


def kill(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Kill a process; of the catalogue's waiting transactions some are written."""
    name = cluster.acting(fault.one)
    if not cluster.running(name):
        return
    cluster.kill(name, written=int(fault.amount * 4))
    yield
    stood_in_for = cluster.shape.controllers == 1 and name in CONTROLLERS
    if not (stood_in_for and any(other in cluster.wanted for other in CONTROLLERS)):
        cluster.start(name)


def pause(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Stop a process and let it go on."""
    name = cluster.acting(fault.one)
    if not cluster.running(name):
        return
    process = cluster.processes[name]
    cluster.network.pause(name)
    if process.link is not None:
        process.link.paused = True
    yield
    if cluster.processes.get(name) is process:
        cluster.network.resume(name)
        if process.link is not None:
            process.link.resume()


def cut_from_store(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Cut a controller, or all of them, off from the store that they share, and from nothing else."""
    names = CONTROLLERS if fault.draw < 0.2 else (cluster.acting(fault.one),)
    cut = [cluster.processes[name].link for name in names if cluster.running(name)]
    if not all(cut) or not cut:
        return
    for link in cut:
        link.cut = True
    yield
    for link in cut:
        link.resume()


def takeover(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Start a second controller on the same engine; the first is not started again once it has ended."""
    if cluster.shape.controllers > 1:
        return
    first = next((name for name in CONTROLLERS if name in cluster.wanted), None)
    second = next((name for name in cluster.controllers if name not in cluster.processes), None)
    if first is None or second is None:
        return
    cluster.start(second)
    cluster.wanted.pop(first)
    yield
    if cluster.running(first):
        cluster.kill(first)


def promote(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Have an operator promote a controller, whatever the master does."""
    if cluster.agreed is None:
        return
    cluster.start_soon(cluster.promote, fault.one)
    yield


# -- the network -----------------------------------------------------------------------------------


def partition(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Cut two processes off from each other, or one way only."""
    cluster.network.partition(fault.one, fault.other, one_way=fault.amount < 0.4)
    yield
    cluster.network.heal(fault.one, fault.other)


def break_connections(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Break the connections between two processes; they may connect again at once."""
    cluster.network.cut(fault.one, fault.other)
    yield


def slow_network(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Let messages from and to a process take their time."""
    cluster.network.slow(fault.one, 0.02 + fault.amount**3 * 3)
    yield
    cluster.network.slow(fault.one, 0)


# -- disks -----------------------------------------------------------------------------------------


def slow_disk(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Let a disk take its time; the catalogue's, when it is a controller's."""
    latency_s = 0.002 + fault.amount**3 * 2
    if fault.one in CONTROLLERS:
        cluster.catalogue_latency_s = latency_s
    else:
        cluster.set_latency(fault.one, latency_s)
    yield
    if fault.one in CONTROLLERS:
        cluster.catalogue_latency_s = 0.0
    else:
        cluster.set_latency(fault.one, 0.0)


def late_verdicts(cluster: Cluster, _fault: Fault) -> Iterator[None]:
    """Let the controller take its time over what pools ask of many shards, after it has read the records."""
    cluster.verdict_latency_s = LATE_S
    yield
    cluster.verdict_latency_s = 0.0


def full_disk(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Leave a disk next to no room."""
    disk = cluster.disk_of[fault.one]
    disk.capacity = min(disk.capacity, disk.taken_bytes + int(fault.amount * 10_000))
    yield
    disk.capacity = disk.bought_capacity


def full_catalogue(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Leave a controller's disk no room, or so little that files can just be deleted."""
    cluster.fill_disk(fault.one, Shortage.NOTHING if fault.amount < 0.6 else Shortage.DELETES_ONLY)
    yield
    cluster.fill_disk(fault.one, None)


def failing_flush(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Fail the flushes of a pool until it is started again, or the catalogue's next one."""
    if not cluster.running(fault.one):
        return
    if fault.one in CONTROLLERS:
        engine = cluster.processes[fault.one].copy or cluster.engine
        if engine is not None:
            engine.fail_flush(written=int(fault.amount * 4))
        if cluster.agreed is not None:
            # It takes no more writes for as long as it runs.
            yield
            cluster.kill(fault.one)
            cluster.start(fault.one)
        return
    cluster.disk_of[fault.one].fail_flush()
    yield
    cluster.kill(fault.one)
    cluster.start(fault.one)


def unreadable_pieces(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Let some of a pool's shards give errors for a while."""
    disk = cluster.disk_of[fault.one]
    every = 1 + int(fault.amount * 3)
    disk.unreadable |= set(disk.order[::every])
    yield
    disk.unreadable.clear()


def bit_flip(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Flip a bit of a stored piece, of a checksum, or damage a header."""
    disk = cluster.disk_of[fault.one]
    whole = [key for key in disk.order if disk.sound(key)]
    if not whole:
        return
    # Readers ask for data first: damage to those shards is met before a scrub has it mended.
    data = [key for key in whole if key[1] < disk.shards[key].header.layout.k]
    among = data if data and fault.amount < 0.8 else whole
    key = among[int(fault.draw * len(among))]
    if not Wounds(cluster).bearable(disk, [key]):
        return
    extent, index = key
    chunk = int(fault.amount * len(disk.shards[key].pieces))
    harm = int(fault.draw * 1000) % 5
    if harm < 3:
        disk.flip_piece(extent, index, chunk)
    elif harm == 3:
        disk.flip_checksum(extent, index, chunk)
    else:
        disk.damage_header(extent, index)
    disk.spoiled.add(key)
    cluster.trace.say(f"  shard {index} of extent {extent} on {fault.one} is damaged")
    yield


def rotten_disk(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Flip a bit of every shard on a disk, where that is no loss: its pool is out."""
    disk = cluster.disk_of[fault.one]
    sound = [key for key in disk.order if disk.sound(key)]
    if disk.lost or not sound or not Wounds(cluster).bearable(disk, sound):
        return
    for extent, index in sound:
        disk.flip_piece(extent, index, 0)
        disk.spoiled.add((extent, index))
    cluster.trace.say(f"  {len(sound)} shards on {fault.one} are damaged")
    yield


def power_loss(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Let the power fail between a write of a pool and its flush."""
    if not cluster.running(fault.one):
        return
    disk = cluster.disk_of[fault.one]
    disk.fail_power(int(fault.amount * 4), lambda: cluster.kill(fault.one))
    yield
    disk.power_loss = None
    cluster.start(fault.one)


def swap_disks(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Exchange the disks of two pools that are down for that."""
    pools = (fault.one, fault.other)
    if any(cluster.disk_of[name].lost or name in cluster.absent for name in pools):
        return
    for name in pools:
        cluster.kill(name)
    one, other = (cluster.disk_of[name] for name in pools)
    cluster.disk_of[fault.one], cluster.disk_of[fault.other] = other, one
    yield
    for name in pools:
        cluster.start(name)


def roll_back(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Start a pool from a copy of its disk that was made some time ago."""
    disk = cluster.disk_of[fault.one]
    if disk.lost or not disk.pool_id:
        return
    before, spoiled = disk.snapshot(), set(disk.spoiled)
    yield
    if disk.lost or disk is not cluster.disk_of[fault.one]:
        return
    if not Wounds(cluster).bearable(disk, (set(disk.shards) - set(before.shards)) | spoiled):
        return
    cluster.kill(fault.one)
    disk.restore(before)
    disk.spoiled = spoiled
    cluster.trace.say(f"  the disk of {fault.one} is as it was {fault.for_s:.2f} s ago")
    cluster.start(fault.one)


def _may_be_lost(cluster: Cluster, disk: WatchedDisk) -> bool:
    none_lost = not any(one.lost for one in cluster.world.disks.values())
    return none_lost and Wounds(cluster).bearable(disk, disk.shards)


def lose_disk(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Lose a pool and its disk for good; one in a run."""
    disk = cluster.disk_of[fault.one]
    if not _may_be_lost(cluster, disk):
        return
    cluster.kill(fault.one)
    disk.lost = True
    yield


def replace_pool(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Lose a disk, and have an operator replace its pool, who may put an empty disk into the same machine.

    The disk that was lost is never seen again.
    """
    disk = cluster.disk_of[fault.one]
    number = catalogue.pool_number(cluster.world, disk.pool_id)
    if number is None or not _may_be_lost(cluster, disk):
        return
    cluster.kill(fault.one)
    disk.lost = True
    if fault.amount < 0.6:
        cluster.insert_disk(fault.one)
        cluster.start(fault.one)
    cluster.replace(number, force=fault.draw < 0.3)
    yield


def drain_pool(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Have an operator drain a pool, and after a while use it again, or take it out when it is empty."""
    number = catalogue.pool_number(cluster.world, cluster.disk_of[fault.one].pool_id)
    if number is None:
        return
    cluster.drain(number, fault.one, force=fault.draw < 0.3)
    yield
    if fault.amount < 0.4:
        cluster.undo_drain(number)
    elif fault.amount < 0.8:
        cluster.retire(number, fault.one)


def add_pool(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Have a pool join that was no part of the cluster before."""
    if fault.one not in cluster.absent:
        return
    cluster.absent.remove(fault.one)
    cluster.start(fault.one)
    yield


def clone(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Start a copy of a pool beside it; the master refuses it."""
    if not cluster.running(fault.one) or cluster.disk_of[fault.one].lost:
        return
    name = cluster.start_clone(fault.one)
    yield
    if cluster.running(name) and cluster.processes[name].ready:
        cluster.world.report("clones-are-refused", f"{name} was welcomed while {fault.one} runs")
    cluster.kill(name)


def wrong_clock(cluster: Cluster, fault: Fault) -> Iterator[None]:
    """Set a process's wall clock an hour forward or back."""
    cluster.set_wall_clock(fault.one, HOUR_MS if fault.amount < 0.5 else -HOUR_MS)
    yield
    cluster.set_wall_clock(fault.one, 0)


KINDS: dict[str, FaultKind] = {
    "kill": kill,
    "pause": pause,
    "takeover": takeover,
    "cut-from-store": cut_from_store,
    "promote": promote,
    "partition": partition,
    "break-connections": break_connections,
    "slow-network": slow_network,
    "slow-disk": slow_disk,
    "full-disk": full_disk,
    "full-catalogue": full_catalogue,
    "failing-flush": failing_flush,
    "unreadable-pieces": unreadable_pieces,
    "bit-flip": bit_flip,
    "rotten-disk": rotten_disk,
    "late-verdicts": late_verdicts,
    "power-loss": power_loss,
    "swap-disks": swap_disks,
    "roll-back": roll_back,
    "lose-disk": lose_disk,
    "replace-pool": replace_pool,
    "drain-pool": drain_pool,
    "add-pool": add_pool,
    "clone": clone,
    "wrong-clock": wrong_clock,
}


async def inflict(cluster: Cluster, faults: Iterable[Fault], stop: trio.Event) -> None:
    """Carry faults out in time; undo all that are under way when `stop` is set, and return."""
    began = trio.current_time()
    moments: list[tuple[float, int, bool, Fault]] = []
    for fault in faults:
        moments.append((fault.at_s, fault.number, True, fault))
        moments.append((fault.at_s + fault.for_s, fault.number, False, fault))
    running: dict[int, Iterator[None]] = {}
    for at_s, number, begins, fault in sorted(moments, key=lambda moment: moment[:2]):
        with trio.move_on_at(began + at_s):
            await stop.wait()
        if begins and not stop.is_set():
            cluster.trace.say(str(fault))
            harm = KINDS[fault.kind](cluster, fault)
            if next(harm, harm) is None:
                running[number] = harm
                cluster.world.happened[fault.kind] += 1
        elif not begins and number in running:
            cluster.trace.say(f"fault {number} is over")
            next(running.pop(number), None)
