"""Reads when pools are dead, stopped or wrong: the right bytes, or an error that names what is missing."""

import itertools
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from droppexd.errors import NotEnoughShards
from droppexd.model import CHUNK_SIZE
from droppexd.store.header_file import BLOCK_BYTES, decode_block, encode_block, seal, unseal

LARGE, MIDDLE, SMALL = 2 * CHUNK_SIZE + 12_345, 200_000, 4000
"""Shards as files; pieces of one chunk in databases; and copies in databases."""

PAIRS = tuple(itertools.combinations(range(6), 2))

RANGES = (
    (0, 1),
    (CHUNK_SIZE - 1, 2),
    (CHUNK_SIZE // 4 - 5, 10),
    (CHUNK_SIZE // 2 + 7, CHUNK_SIZE),
    (LARGE - 3, None),
)


@pytest.fixture(scope="module")
def cluster(new_cluster):
    # Pools that come back must not be kept waiting for by an app whose map calls them down.
    with new_cluster(pools=6, controller={"down_after": "10m"}) as running:
        yield running


@pytest.fixture
def name(request):
    """A name for one test alone."""
    return "reads/" + request.node.name


@pytest.fixture
def large(cluster, content, name):
    """A file of three chunks, whose content is returned."""
    data = content(LARGE)
    assert cluster.put(name, data).layout == "4+2"
    return data


@pytest.fixture(scope="module")
def healthy(cluster, content):
    """A large and a small file from before anything was broken: for a while nothing is written to pools that
    were slow."""
    files = {"healthy/large": content(LARGE, 8), "healthy/small": content(SMALL, 9)}
    receipts = [cluster.put(name, data) for name, data in files.items()]
    assert [receipt.layout for receipt in receipts] == ["4+2", "1+2"]
    return files


@pytest.fixture
def read_right(cluster):
    """Check that whole and ranged reads of a file give what it holds."""

    def check(name, data, ranges=RANGES):
        async def read(client):
            assert await client.get_bytes(name) == data
            for start, length in ranges:
                end = None if length is None else start + length
                assert await client.get_bytes(name, start=start, length=length) == data[start:end]

        cluster.run(read)

    return check


def flip(file, offset):
    """Turn one bit of a file around; doing it again mends it, unless the cluster has done so by then."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def rewrite_header(file, change):
    """Give a shard file another header that is sealed as it should be."""
    with file.open("r+b") as stream:
        header, generation = decode_block(stream.read(BLOCK_BYTES))
        stream.seek(0)
        stream.write(encode_block(change(header), generation))


def with_flipped_checksums(header):
    return replace(header, checksums=tuple(bytes([one[0] ^ 1]) + one[1:] for one in header.checksums))


@pytest.mark.usefixtures("healthy")
def test_any_two_shards_with_flipped_bits_are_made_good(cluster, content, name, read_right):
    data = content(LARGE)
    for pair in PAIRS:
        one = f"{name}-{pair}"
        cluster.put(one, data)
        files = cluster.shard_files(one)
        for index in pair:
            for chunk in range(3):
                flip(files[index], BLOCK_BYTES + chunk * (CHUNK_SIZE // 4) + 17 * index)
        read_right(one, data, RANGES[:3])
        cluster.remove(one)


@pytest.mark.parametrize("pair", [(0, 3), (1, 4)], ids=str)
def test_flipped_checksums_under_a_valid_seal_are_made_good(cluster, large, name, read_right, pair):
    files = cluster.shard_files(name)
    for index in pair:
        rewrite_header(files[index], with_flipped_checksums)
    read_right(name, large)


def test_damaged_shortened_and_swapped_shards_are_made_good(cluster, large, name, read_right, content):
    files = cluster.shard_files(name)
    flip(files[0], 40)
    with files[2].open("r+b") as stream:
        stream.truncate(BLOCK_BYTES + 1000)
    read_right(name, large)

    # The right bytes of another shard of the same extent, header and all, are wrong here.
    swapped = name + "-swapped"
    cluster.put(swapped, large)
    files = cluster.shard_files(swapped)
    first, second = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(second)
    files[2].write_bytes(first)
    read_right(swapped, large)


def test_three_bad_shards_are_an_error_that_names_them_and_no_wrong_byte(
    cluster, large, name, read_right, wait_until
):
    files, holders = cluster.shard_files(name), cluster.holders(name)
    for index in (0, 1, 5):
        flip(files[index], BLOCK_BYTES + 3)
    done = cluster.droppex("get", name, "out", code=5)
    for index in (0, 1, 5):
        (line,) = [line for line in done.stderr.splitlines() if f"shard {index}:" in line]
        # Those that their pools have looked at by then are on record as missing.
        assert holders[index].name in line or line.endswith("missing"), done.stderr
    assert not list(cluster.folder.glob("*out*"))
    with pytest.raises(NotEnoughShards):
        cluster.get(name, 0, 10)
    # The chunks behind it are whole.
    assert cluster.get(name, CHUNK_SIZE) == large[CHUNK_SIZE:]
    flip(files[0], BLOCK_BYTES + 3)
    wait_until(lambda: reads(cluster, name), "a shard that is whole again does not count")
    read_right(name, large)


def reads(cluster, name):
    """Whether a file can be read just now."""
    try:
        cluster.get(name)
    except NotEnoughShards:
        return False
    return True


def damage_small(pool, extent, index, *, checksum):
    """Flip a bit of a shard in the database of a pool that does not run: of its checksum, or of its bytes."""
    key = extent.to_bytes() + bytes([index])
    with closing(sqlite3.connect(pool.data / "index.db")) as database, database:
        generation, header, piece = database.execute(
            "SELECT generation, header, piece FROM shard JOIN small USING (generation) WHERE key = ?", (key,)
        ).fetchone()
        if checksum:
            header = seal(with_flipped_checksums(unseal(header)), generation)
        else:
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        database.execute(
            "UPDATE small SET header = ?, piece = ? WHERE generation = ?", (header, piece, generation)
        )


def test_damaged_small_shards_are_made_good(cluster, content, name, read_right):
    files = {name + "-middle": content(MIDDLE, 2), name + "-small": content(SMALL, 3)}
    damage = []
    for one, data in files.items():
        cluster.put(one, data)
        holders, (extent,) = cluster.holders(one), cluster.describe(one).extents
        damage += [(holders[index], extent.id, index) for index in (0, 1)]
    victims = {pool.name: pool for pool, _, _ in damage}.values()
    for pool in victims:
        assert pool.terminate() == 0
    for pool, extent, index in damage:
        damage_small(pool, extent, index, checksum=index == 0)
    for pool in victims:
        pool.spawn()
    for pool in victims:
        pool.wait_until_ready()
    for one, data in files.items():
        read_right(one, data, ((0, 1), (1000, 2000), (3000, None)))


@pytest.mark.slow
def test_stopped_pools_are_read_around(cluster, healthy, read_right):
    holders = cluster.holders("healthy/large")
    try:
        for pair in ((0, 1), (3, 5)):
            for index in pair:
                holders[index].stop()
            for name, data in healthy.items():
                read_right(name, data, ((0, 1), (1000, 2000)))
            for index in pair:
                holders[index].go_on()
    finally:
        for pool in holders:
            pool.go_on()
    cluster.wait_until_up()


@pytest.mark.slow
def test_dead_pools_are_read_around_and_three_are_too_many(cluster, healthy, read_right):
    holders = cluster.holders("healthy/large")
    holders[0].kill()
    for before, victim, gone in ((None, 1, (0, 1)), (0, 4, (1, 4)), (1, 5, (4, 5))):
        if before is not None:
            holders[before].start()
        holders[victim].kill()
        assert [not pool.running for pool in holders] == [index in gone for index in range(6)]
        for name, data in healthy.items():
            read_right(name, data, ((0, 1), (1000, 2000)))

    holders[2].kill()
    done = cluster.droppex("get", "healthy/large", "out", code=5)
    assert all(holders[index].name in done.stderr for index in (2, 4, 5)), done.stderr
    assert not list(cluster.folder.glob("*out*"))
    with pytest.raises(NotEnoughShards):
        cluster.get("healthy/large", CHUNK_SIZE // 2, 1)
    for index in (2, 4, 5):
        holders[index].spawn()
    for index in (2, 4, 5):
        holders[index].wait_until_ready()
    for name, data in healthy.items():
        read_right(name, data, ((0, 1),))
