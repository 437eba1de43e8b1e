"""Everything at once: clients at work while pools die for good, go back in time and rot."""

import io
import random
import shutil
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import trio

from droppexd.client import open_client
from droppexd.daemon import system_runtime
from droppexd.errors import DroppexError
from droppexd.model import MISSING, PoolState
from droppexd.store.header_file import BLOCK_BYTES
from droppexd.wire.messages import ANYTHING
from droppexd.wire.zeromq import open_zeromq_transport

MISSING_STATES = (PoolState.DOWN, PoolState.OUT)
NEWS_S = 20.0
"""What the master takes to learn, and a busy machine to let it."""

SETTINGS = {"heartbeat": "500ms", "down_after": "4s", "replace_after": "8s", "delete_grace": "1s"}


class Traffic(threading.Thread):
    """A client that puts, gets and removes without a pause, and knows what it stored."""

    def __init__(self, cluster, seed, sizes):
        super().__init__()
        self._cluster = cluster
        self._draw = random.Random(seed)
        self._sizes = sizes
        self._folder = f"traffic-{seed}"
        self._over = False
        self.files = {}
        self.unsure = set()
        """Names of which nobody knows whether their last change took place."""
        self.done = 0
        self.wrong = []

    def end(self):
        self._over = True
        self.join()

    def run(self):
        trio.run(self._main)

    async def _main(self):
        async with (
            open_zeromq_transport() as transport,
            open_client(self._cluster.app.addresses["app"], transport, system_runtime()) as client,
        ):
            while not self._over:
                name = f"{self._folder}/{self._draw.randrange(12)}"
                try:
                    await self._do(client, name)
                except DroppexError:
                    await trio.sleep(0.1)
                else:
                    self.done += 1

    async def _do(self, client, name):
        what = self._draw.random()
        if what < 0.4:
            data = self._draw.randbytes(self._draw.choice(self._sizes))
            self.unsure.add(name)
            await client.put_file(name, io.BytesIO(data), size=len(data), condition=ANYTHING)
            self.files[name] = data
            self.unsure.discard(name)
        elif what < 0.5 and name in self.files and name not in self.unsure:
            self.unsure.add(name)
            await client.remove(name)
            del self.files[name]
            self.unsure.discard(name)
        elif (
            name in self.files
            and name not in self.unsure
            and await client.get_bytes(name) != self.files[name]
        ):
            self.wrong.append(name)


def untruths(status, running):
    """Return what `status` says, or leaves out, that cannot be; `running` are the names of the pools that run."""
    states = {pool.name: pool.state for pool in status.pools}
    found = {f"{name} runs and is {states[name]}" for name in running if states[name] in MISSING_STATES}
    weak = sum(count.extents for count in status.survival if count.survives < 2)
    # Until it is out, or compared, nothing is done for what a pool may still have.
    waiting = any(state in (PoolState.DOWN, PoolState.CHECKING) for state in states.values())
    if weak and not waiting and not status.repair.left and not status.repair.moving:
        found.add("extents survive too little, and nothing is done about it")
    return found


class Watch(threading.Thread):
    """Somebody who looks at `status` all the time, and notes what it says for too long that cannot be."""

    def __init__(self, cluster):
        super().__init__()
        self._cluster = cluster
        self._over = threading.Event()
        self.looks = 0
        self.wrong = set()

    def end(self):
        self._over.set()
        self.join()

    def run(self):
        since = {}
        while not self._over.wait(0.5):
            try:
                status = self._cluster.status()
            except DroppexError:
                continue  # Busy, or not heard in time: no answer is no untruth.
            self.looks += 1
            now = time.monotonic()
            found = untruths(status, [pool.name for pool in self._cluster.pools if pool.running])
            since = {what: since.get(what, now) for what in found}
            self.wrong |= {what for what, began in since.items() if now - began > NEWS_S}


def tells_of_two_losses(cluster):
    """Whether status shows two pools as missing, and extents that survive no more loss."""
    try:
        status = cluster.status()
    except DroppexError:
        return False
    missing = [pool for pool in status.pools if pool.state in MISSING_STATES]
    return len(missing) == 2 and any(count.extents for count in status.survival if count.survives == 0)


def put_still(cluster, folder, count, sizes):
    """Store files that stay as they are, and return their contents."""
    draw = random.Random(folder)
    files = {f"{folder}/{number}": draw.randbytes(draw.choice(sizes)) for number in range(count)}

    async def put(client):
        names = iter(files)

        async def some():
            for name in names:
                data = files[name]
                await client.put_file(name, io.BytesIO(data), size=len(data))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(some)

    cluster.run(put)
    return files


def rot(pool, count, seed=3):
    """Flip a bit in so many of a pool's large shards."""
    draw = random.Random(seed)
    files = sorted((pool.data / "large").glob("*/*"))
    for file in draw.sample(files, min(count, len(files))):
        with file.open("r+b") as stream:
            at = draw.randrange(BLOCK_BYTES, file.stat().st_size)
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ 1]))


def unrest(cluster):
    """Return what still keeps the cluster from rest; nothing when it is at rest."""
    try:
        status = cluster.status()
    except DroppexError as error:
        return str(error)
    repair = status.repair
    if repair.left or repair.moving or status.garbage:
        return f"{repair}, {status.garbage} garbage"
    weak = [count for count in status.survival if count.extents and count.survives < 2]
    return f"extents survive too little: {weak}" if weak else ""


def are_whole(cluster, names):
    """Whether all shards of these files are on pools that are up, by the records."""

    async def look(client):
        described = [await client.describe(name) for name in names]
        places = [place for one in described for extent in one.extents for place in extent.shards]
        return all(place.pool != MISSING and place.state == PoolState.UP for place in places)

    try:
        return cluster.run(look)
    except DroppexError:
        return False


def check_records(cluster, names):
    """Every shard is on record, and no pool that is up holds one more."""
    assert are_whole(cluster, names)

    async def count(client):
        described = [await client.describe(name) for name in names]
        return sum(len(extent.shards) for one in described for extent in one.extents)

    recorded = cluster.run(count)
    status = cluster.status()
    assert sum(pool.shards for pool in status.pools if pool.state == PoolState.UP) == recorded


def under_fire(cluster, image, wait_until, *, still, sizes, rotten):
    """Run the story; `image` is a folder for the copy of a pool."""
    files = put_still(cluster, "early", still // 2, sizes)
    old = cluster.pools[2]
    old.terminate()
    shutil.copytree(old.data, image)
    old.start()
    cluster.wait_until_up()
    files |= put_still(cluster, "late", still - still // 2, sizes)
    traffic = [Traffic(cluster, seed, sizes) for seed in (1, 2)]
    watch = Watch(cluster)
    for one in (*traffic, watch):
        one.start()
    try:
        wait_until(lambda: all(one.done > 5 for one in traffic), "the clients do nothing")
        for pool in cluster.pools[:2]:
            pool.kill()
        wait_until(lambda: tells_of_two_losses(cluster), "status does not tell of the dead pools")
        # Not earlier: a third loss is more than these layouts survive.
        wait_until(lambda: cluster.status().repair.done, "nothing is rebuilt")
        wait_until(lambda: are_whole(cluster, files), "the dead pools' shards are not rebuilt")
        old.kill()
        shutil.rmtree(old.data)
        shutil.copytree(image, old.data)
        old.start()
        wait_until(lambda: are_whole(cluster, files), "not rebuilt")
        rot(cluster.pools[3], rotten)
        cluster.droppex("verify", "--json", code=1)
        wait_until(lambda: are_whole(cluster, files), "not mended")
    finally:
        for one in (*traffic, watch):
            one.end()
    assert watch.looks > 3
    assert not watch.wrong
    for one in traffic:
        assert one.done > 10
        assert not one.wrong
        files |= {name: data for name, data in one.files.items() if name not in one.unsure}
    # What was deleted before they were out waits for them to confirm that it is gone: they never will.
    for pool in cluster.pools[:2]:
        cluster.droppex("pools", "replace", pool.name, "--yes")
    wait_until(lambda: not unrest(cluster), lambda: f"the cluster does not come to rest: {unrest(cluster)}")
    wait_until(lambda: is_settled(cluster), "shards are left that no record names")
    for name, data in files.items():
        assert cluster.get(name) == data, name
    check_records(cluster, cluster.names())
    cluster.droppex("verify", "--json")


def is_settled(cluster):
    try:
        check_records(cluster, cluster.names())
    except (AssertionError, DroppexError):
        return False
    return True


@pytest.mark.parametrize(
    ("state", "survives", "left", "wrong"),
    [
        (PoolState.UP, 2, 0, False),
        (PoolState.OUT, 1, 5, False),
        (PoolState.DOWN, 1, 0, False),
        (PoolState.CHECKING, 1, 0, False),
        (PoolState.OUT, 2, 0, False),
        (PoolState.OUT, 1, 0, True),
        (PoolState.UP, 1, 0, True),
    ],
)
def test_the_watch_notices_losses_that_nobody_works_on(state, survives, left, wrong):
    status = SimpleNamespace(
        pools=[SimpleNamespace(name="a", state=state), SimpleNamespace(name="b", state=PoolState.UP)],
        survival=[SimpleNamespace(survives=survives, extents=3)],
        repair=SimpleNamespace(left=left, moving=0),
    )
    assert bool(untruths(status, ["b"])) is wrong
    assert bool(untruths(status, ["a", "b"])) is (wrong or state in MISSING_STATES)


SIZES = (3000, 100_000, 400_000, 5_000_000)


def test_files_outlive_two_dead_pools_one_from_the_past_and_one_that_rots(new_cluster, wait_until, tmp_path):
    with new_cluster(pools=8, controller=SETTINGS) as cluster:
        under_fire(
            cluster,
            tmp_path / "image",
            wait_until,
            still=60,
            sizes=SIZES,
            rotten=5,
        )


@pytest.mark.full_size
def test_three_gib_in_two_thousand_files_outlive_them_too(new_cluster, wait_until, tmp_path):
    patient = partial(wait_until, patience_s=1800)
    with new_cluster(pools=8, controller=SETTINGS) as cluster:
        under_fire(cluster, tmp_path / "image", patient, still=2000, sizes=(*SIZES, 2_600_000), rotten=50)
