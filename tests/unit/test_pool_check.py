"""Whether a shard is whole, and what a pool that is asked tells the master and the caller."""

import random
import sqlite3
from functools import partial

import pytest
import trio

from droppexd.coding import encode_chunk
from droppexd.errors import CatalogError, IntegrityError, NoSuchShard, PeerBusy, StoreError
from droppexd.model import ExtentId, Layout, Role, ShardHeader, VersionId
from droppexd.roles.pool import PoolSettings, serve_pool
from droppexd.roles.pool_check import ShardState, check_shard
from droppexd.store.disk import open_disk_store
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.messages import (
    Announce,
    CheckShards,
    Done,
    Heard,
    Heartbeat,
    LostShard,
    ReportLost,
    ShardName,
    Welcomed,
)

CHUNK = 3000
EXTENT = ExtentId(1, 1)
LAYOUT = Layout(2, 1)


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self.random.uniform(low, high)


def put(store, counter=1, *, size=2 * CHUNK + 100, index=0, small=False):
    """Store shard `index` of an extent of random bytes, as an app codes it."""
    extent = ExtentId(1, counter)
    data = random.Random(counter).randbytes(size)
    encoded = [
        encode_chunk(extent, LAYOUT, chunk, data[start : start + CHUNK])
        for chunk, start in enumerate(range(0, size, CHUNK))
    ]
    header = ShardHeader(
        incarnation=bytes(16),
        extent=extent,
        index=index,
        layout=LAYOUT,
        size=size,
        chunk_size=CHUNK,
        checksums=tuple(one.checksums[index] for one in encoded),
        version=VersionId(1, counter),
        name=f"files/{counter}",
    )
    pieces = [bytes(one.pieces[index]) for one in encoded]
    if small:
        (outcome,) = store.put_small([(header, pieces[0])])
        assert isinstance(outcome, int)
    else:
        writer = store.begin(header.stored_size)
        for chunk, piece in enumerate(pieces):
            writer.write(chunk, piece)
        writer.finish(header)
    return header


@pytest.fixture
def disk():
    return SimulatedDisk()


@pytest.fixture
def store(disk):
    return SimulatedStore(disk, entropy=SeededEntropy())


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("size", [1, CHUNK, 2 * CHUNK + 100])
def test_a_whole_shard_is_sound(store, index, size):
    header = put(store, index=index, size=size)
    checked = check_shard(store, EXTENT, index)
    assert (checked.state, checked.size, checked.chunks) == (ShardState.SOUND, header.stored_size, ())
    assert (checked.name, checked.version) == ("files/1", VersionId(1, 1))


def test_a_shard_that_is_not_held_is_absent(store):
    put(store)
    assert check_shard(store, EXTENT, 1).state == ShardState.ABSENT
    assert check_shard(store, ExtentId(1, 2), 0).state == ShardState.ABSENT


def test_damaged_pieces_are_told_by_their_chunks(store, disk):
    header = put(store)
    disk.flip_piece(EXTENT, 0, 1)
    disk.flip_checksum(EXTENT, 0, 2)
    checked = check_shard(store, EXTENT, 0)
    assert (checked.state, checked.chunks) == (ShardState.DAMAGED, (1, 2))
    assert checked.size == header.stored_size
    assert "piece 1" in checked.reason


def test_a_damaged_header_tells_nothing_of_the_shard(store, disk):
    put(store)
    disk.damage_header(EXTENT, 0)
    checked = check_shard(store, EXTENT, 0)
    assert (checked.state, checked.size, checked.chunks) == (ShardState.DAMAGED, 0, ())


def test_a_store_that_cannot_tell_is_neither_sound_nor_damaged(store):
    put(store)
    store.close()
    checked = check_shard(store, EXTENT, 0)
    assert (checked.state, checked.reason) == (ShardState.UNREADABLE, "the store is closed")


def test_what_reads_well_at_the_second_try_is_sound(store):
    put(store)
    examine, failures = store.examine, [IntegrityError("cannot read the header"), NoSuchShard("replaced")]

    def fail_once(extent, index):
        if failures:
            raise failures.pop()
        return examine(extent, index)

    store.examine = fail_once
    assert check_shard(store, EXTENT, 0).state == ShardState.DAMAGED
    failures[:] = [NoSuchShard("replaced")]
    assert check_shard(store, EXTENT, 0).state == ShardState.SOUND


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pool"


@pytest.fixture
def disk_store(folder):
    opened = open_disk_store(folder, entropy=SeededEntropy(), ballast_bytes=0)
    yield opened
    opened.close()


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_is_found_in_a_file_that_readers_keep_open(disk_store, folder):
    put(disk_store)
    (path,) = (folder / "large").glob("*/*-00")
    disk_store.read(EXTENT, 0, 0)
    assert check_shard(disk_store, EXTENT, 0).state == ShardState.SOUND
    flip(path, 4096 + 1600)
    assert check_shard(disk_store, EXTENT, 0).chunks == (1,)
    flip(path, 20)
    checked = check_shard(disk_store, EXTENT, 0)
    assert (checked.state, checked.chunks) == (ShardState.DAMAGED, ())
    flip(path, 20)
    path.write_bytes(path.read_bytes()[:-1])
    assert check_shard(disk_store, EXTENT, 0).chunks == (1, 2)
    path.unlink()
    assert check_shard(disk_store, EXTENT, 0).state == ShardState.ABSENT


@pytest.mark.parametrize(
    ("change", "state", "chunks"),
    [
        ("piece = CAST(substr(piece, 1, 9) || x'00' || substr(piece, 11) AS BLOB)", "damaged", (0,)),
        ("piece = CAST(substr(piece, 1, 9) AS BLOB)", "damaged", (0,)),
        ("piece = 'text'", "damaged", (0,)),
        ("piece = 7", "damaged", ()),
        ("header = CAST(substr(header, 1, 40) || x'00' || substr(header, 42) AS BLOB)", "damaged", ()),
        ("generation = generation + 1", "damaged", ()),
    ],
)
def test_a_damaged_small_shard_is_found(folder, disk_store, change, state, chunks):
    put(disk_store, size=1000, small=True)
    assert check_shard(disk_store, EXTENT, 0).state == ShardState.SOUND
    with sqlite3.connect(folder / "index.db") as database:
        database.execute(f"UPDATE small SET {change}")
    database.close()
    checked = check_shard(disk_store, EXTENT, 0)
    assert (checked.state.value, checked.chunks) == (state, chunks)


def test_a_small_shard_in_the_place_of_another_is_damaged(folder, disk_store):
    put(disk_store, 1, size=1000, small=True)
    put(disk_store, 2, size=1000, small=True)
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("UPDATE small SET (header, piece) = (SELECT header, piece FROM small LIMIT 1)")
    database.close()
    assert check_shard(disk_store, ExtentId(1, 1), 0).state == ShardState.SOUND
    assert check_shard(disk_store, ExtentId(1, 2), 0).state == ShardState.DAMAGED


# -- asked by a peer -----------------------------------------------------------------------------------


class Master:
    def __init__(self):
        self.lost = []
        self.refuse = []
        self.known = True

    def handlers(self):
        return {Announce: self.announce, Heartbeat: self.heartbeat, ReportLost: self.report_lost}

    async def announce(self, _call, _request, _body):
        while not self.known:
            await trio.sleep(1)
        return Welcomed(
            number=3, cluster_id=bytes(range(16)), incarnation=bytes(16), term=1, heartbeat_ms=1000
        )

    async def heartbeat(self, _call, _request, _body):
        return Heard(review=False, term=1)

    async def report_lost(self, _call, request, _body):
        if self.refuse:
            raise self.refuse.pop()
        self.lost.append((request.number, request.boot_id, request.shards))
        return Done()


@pytest.fixture
def scene(play, store):
    """Run a story with a pool on the simulated store and its master, and an app's connections."""

    def run(body, *, known=True):
        async def story(stage):
            master = Master()
            master.known = known
            controller = await stage.serve("controller", master.handlers(), role=Role.CONTROLLER)
            transport = await stage.transport("pool", Role.POOL)
            serve = partial(
                serve_pool,
                transport=transport,
                address="tcp://127.0.0.1:7702",
                store=store,
                controllers=[controller],
                runtime=stage.runtime,
                settings=PoolSettings(name="pool", machine="m"),
            )
            if known:
                await stage.nursery.start(serve)
            else:
                stage.nursery.start_soon(serve)
                await trio.sleep(0.5)
            await body(master, partial((await stage.connections("app")).call, "tcp://127.0.0.1:7702"))

        play(story)

    return run


def names(*shards):
    return CheckShards(shards=tuple(ShardName(ExtentId(1, counter), index) for counter, index in shards))


def test_a_pool_says_what_it_found_and_its_master_knows_what_is_lost(scene, store, disk):
    sizes = {counter: put(store, counter).stored_size for counter in (1, 2, 3)}
    disk.flip_piece(ExtentId(1, 2), 0, 0)

    async def body(master, call):
        reply, _ = await call(names((1, 0), (2, 0), (3, 0), (3, 1)), timeout_s=5)
        assert [(check.shard.extent.counter, check.state, check.size) for check in reply.checks] == [
            (1, "sound", sizes[1]),
            (2, "damaged", sizes[2]),
            (3, "sound", sizes[3]),
            (3, "absent", 0),
        ]
        assert [shards for _, _, shards in master.lost] == [
            (LostShard(ExtentId(1, 2), 0, True),),
            (LostShard(ExtentId(1, 3), 1, False),),
        ]
        assert {told[:2] for told in master.lost} == {(3, store.identity.boot_id)}

    scene(body)


def test_nothing_is_reported_of_sound_and_unreadable_shards(scene, store):
    put(store)

    def fail(extent, index):
        raise StoreError("too many open files")

    async def body(master, call):
        reply, _ = await call(names((1, 0)), timeout_s=5)
        assert [check.state for check in reply.checks] == ["sound"]
        store.examine = fail
        reply, _ = await call(names((1, 0)), timeout_s=5)
        assert [check.state for check in reply.checks] == ["unreadable"]
        assert master.lost == []

    scene(body)


def test_a_loss_that_cannot_be_reported_is_an_error_to_the_caller(scene, store):
    async def body(master, call):
        master.refuse = [CatalogError("the disk is full")]
        with pytest.raises(CatalogError):
            await call(names((1, 0)), timeout_s=5)
        assert (await call(names((1, 0)), timeout_s=5))[0].checks[0].state == "absent"
        assert len(master.lost) == 1

    scene(body)


def test_a_pool_without_a_number_reports_nothing(scene, store):
    put(store)

    async def body(master, call):
        assert (await call(names((1, 0)), timeout_s=5))[0].checks[0].state == "sound"
        with pytest.raises(PeerBusy, match="not known"):
            await call(names((2, 0)), timeout_s=5)

    scene(body, known=False)
