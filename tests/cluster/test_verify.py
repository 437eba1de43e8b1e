"""Verification with real processes: flipped bits are found wherever they are, and whole shards are not blamed."""

import hashlib
import json
import sqlite3
from contextlib import closing

import pytest

from droppexd.model import CHUNK_SIZE
from droppexd.store.header_file import BLOCK_BYTES

LARGE, MIDDLE, SMALL = 2 * CHUNK_SIZE + 12_345, 200_000, 4000
"""Shards as files; pieces in databases; and copies in databases."""


@pytest.fixture
def cluster(new_cluster):
    with new_cluster(pools=3) as running:
        yield running


@pytest.fixture
def filled(cluster, content):
    """Three files of each kind, and how many shards they have."""
    for seed, (kind, size) in enumerate((("large", LARGE), ("middle", MIDDLE), ("small", SMALL))):
        for number in range(3):
            cluster.put(f"files/{kind}-{number}", content(size, 10 * seed + number))
    return 6 * 3 + 3 * 2  # 2+1 and, for the small ones, 1+1.


def verify(cluster, *arguments, code):
    return json.loads(cluster.droppex("verify", *arguments, "--json", code=code).stdout)


def flip(file, offset):
    """Turn one bit of a file around; doing it again mends it."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def flip_in_database(pool, extent, index):
    """Turn one bit of a small shard around, in the file of a pool that does not run."""
    with closing(sqlite3.connect(pool.data / "index.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (piece,) = database.execute(
            "SELECT piece FROM shard JOIN small USING (generation) WHERE key = ?",
            (extent.to_bytes() + bytes([index]),),
        ).fetchone()
    raw = (pool.data / "index.db").read_bytes()
    assert raw.count(piece[:64]) == 1
    flip(pool.data / "index.db", raw.index(piece[:64]) + 5)


def test_a_sound_cluster_is_sound_as_a_whole_and_file_by_file(cluster, filled):
    report = verify(cluster, code=0)
    assert (report["sound"], report["shards"], report["lost"]) == (True, filled, 0)
    assert [pool["findings"] for pool in report["pools"]] == [[]] * 3
    assert "all is sound" in cluster.droppex("verify").stdout
    for name, shards in (("files/large-0", 3), ("files/middle-2", 3), ("files/small-1", 2)):
        report = verify(cluster, name, code=0)
        assert (report["shards"], report["sound"], report["faults"]) == (shards, shards, [])
        assert report["survives_pools"] == 1
    # A second pass is another pass: everything is read again.
    assert verify(cluster, code=0)["shards"] == filled


def test_flipped_bits_are_found_and_named(cluster, filled):
    flip(cluster.shard_files("files/large-1")[0], BLOCK_BYTES + CHUNK_SIZE // 2 + 17)
    flip(cluster.shard_files("files/large-2")[2], 40)
    (extent,) = cluster.describe("files/small-2").extents
    holder = cluster.holders("files/small-2")[1]
    assert holder.terminate() == 0
    flip_in_database(holder, extent.id, 1)
    holder.start()
    cluster.wait_until_up()
    report = verify(cluster, code=1)
    assert (report["sound"], report["lost"], report["unreadable"], report["unasked"]) == (False, 3, 0, 0)
    findings = {
        (finding["name"], finding["state"]) for pool in report["pools"] for finding in pool["findings"]
    }
    # What the damaged header said of its file is lost with it.
    assert findings == {("files/large-1", "damaged"), ("files/small-2", "damaged"), (None, "damaged")}


def test_the_file_with_a_flipped_bit_is_the_one_that_is_blamed(cluster, filled):
    victim = cluster.holders("files/large-1")[1].name
    flip(cluster.shard_files("files/large-1")[1], BLOCK_BYTES + 17)
    report = verify(cluster, "files/large-1", code=1)
    assert (report["shards"], report["sound"], report["damaged"]) == (3, 2, 1)
    (fault,) = report["faults"]
    assert (fault["shard"], fault["pool_name"], fault["state"]) == (1, victim, "damaged")
    assert report["survives_pools"] == 0
    assert verify(cluster, "files/large-0", code=0)["sound"] == 3


def test_pools_that_are_away_are_named_and_nothing_is_called_sound(cluster, filled):
    gone = cluster.holders("files/large-0")[0]
    gone.kill()
    report = verify(cluster, code=6)
    assert (report["sound"], report["lost"], report["unasked"]) == (False, 0, 1)
    assert [pool["name"] for pool in report["pools"] if pool["error"]] == [gone.name]
    report = verify(cluster, "files/large-0", code=6)
    assert (report["sound"], report["unreachable"], report["survives_pools"]) == (2, 1, 0)
    cluster.holders("files/large-0")[1].kill()
    report = verify(cluster, "files/large-0", code=5)
    assert (report["sound"], report["survives_pools"]) == (1, -1)
    assert "cannot be read now" in cluster.droppex("verify", "files/large-0", code=5).stdout


def test_a_pool_finds_damage_by_itself(new_cluster, content, wait_until):
    with new_cluster(pools=3, pool={"scrub_every": "3s"}) as cluster:
        cluster.put("files/a", content(LARGE))
        flip(cluster.shard_files("files/a")[0], BLOCK_BYTES + 17)
        holder = cluster.holders("files/a")[0]
        wait_until(lambda: "the scrub found shard" in holder.log.read_text(), "the damage is not found")
        assert holder.terminate() == 0
        assert json.loads((holder.data / "scrub.json").read_text())["written_ms"]
        holder.start()


# -- a stopped pool's folder ---------------------------------------------------------------------------


def snapshot(folder):
    """Return name, size, time of change and content of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (state.st_mode, state.st_mtime_ns, state.st_size, content)
    return found


def check(droppexd, pool, code):
    before = snapshot(pool.data)
    done = droppexd("pool", "check", "--data", pool.data, "--json", code=code)
    assert snapshot(pool.data) == before
    return json.loads(done.stdout)


def test_a_stopped_pools_folder_is_checked_and_left_as_it_was(cluster, filled, droppexd):
    pools = cluster.pools
    running = droppexd("pool", "check", "--data", pools[0].data, code=1)
    assert f"in use by another droppexd (process {pools[0].pid})" in running.stderr
    held = {pool["name"]: pool["shards"] for pool in verify(cluster, code=0)["pools"]}
    pools[0].kill()  # Its database has a log, and its records are as a killed process leaves them.
    assert pools[1].terminate() == 0
    for pool in pools[:2]:
        report = check(droppexd, pool, 0)
        assert (report["sound"], report["problems"], report["findings"]) == (True, [], [])
        assert report["shards"] == held[pool.name]
    for pool in pools[:2]:
        pool.start()
    cluster.wait_until_up()


def test_damage_in_a_stopped_pools_folder_is_found(cluster, filled, droppexd):
    extents = {name: cluster.describe(name).extents[0] for name in ("files/large-0", "files/small-0")}
    pool = cluster.holders("files/small-0")[1]  # With three pools each has a shard of a large file.
    index = {name: cluster.holders(name).index(pool) for name in extents}
    assert pool.terminate() == 0
    assert check(droppexd, pool, 0)["sound"]

    file = pool.shard_file(extents["files/large-0"].id, index["files/large-0"])
    flip(file, BLOCK_BYTES + 99)
    flip_in_database(pool, extents["files/small-0"].id, index["files/small-0"])
    report = check(droppexd, pool, 1)
    assert (report["damaged"], report["absent"], report["problems"]) == (2, 0, [])
    assert {finding["name"] for finding in report["findings"]} == {"files/large-0", "files/small-0"}
    text = droppexd("pool", "check", "--data", pool.data, code=1).stdout
    assert "damaged: files/large-0, shard" in text
    assert "2 damaged" in text

    flip(file, BLOCK_BYTES + 99)
    flip_in_database(pool, extents["files/small-0"].id, index["files/small-0"])
    moved = file.with_name("moved")
    file.rename(moved)
    assert check(droppexd, pool, 1)["absent"] == 1
    moved.rename(file)
    assert check(droppexd, pool, 0)["sound"]

    for record in ("pool.json", "boot.json"):
        flip(pool.data / record, 20)
        (problem,) = check(droppexd, pool, 1)["problems"]
        assert record in problem
        flip(pool.data / record, 20)
    assert check(droppexd, pool, 0)["sound"]


def test_other_folders_are_no_pools(droppexd, tmp_path):
    assert "no folder" in droppexd("pool", "check", "--data", tmp_path / "none", code=1).stderr
    (tmp_path / "other").mkdir()
    assert "not the data folder" in droppexd("pool", "check", "--data", tmp_path / "other", code=1).stderr
    assert not list((tmp_path / "other").iterdir())
    droppexd("pool", "check", code=2)
