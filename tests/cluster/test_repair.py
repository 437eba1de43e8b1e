"""Clusters of real processes that lose shards, disks and pools, and mend themselves."""

import shutil

import pytest

from droppexd.errors import DroppexError
from droppexd.model import CHUNK_SIZE, MISSING, PoolState

LARGE, SMALL = 2 * CHUNK_SIZE + 12_345, 4000

QUICK = {"heartbeat": "500ms", "down_after": "4s", "delete_grace": "1s"}


def is_whole(cluster, names):
    """Whether every extent of these files has all of its shards on pools that are up."""
    try:
        described = [cluster.describe(name) for name in names]
    except DroppexError:
        return False
    places = [place for one in described for extent in one.extents for place in extent.shards]
    return all(place.pool != MISSING and place.state == PoolState.UP for place in places)


def is_at_rest(cluster):
    try:
        status = cluster.status()
    except DroppexError:
        return False
    repair = status.repair
    return repair.balanced and not (repair.left or repair.moving or status.garbage)


def put_files(cluster, content, count=3):
    files = {f"docs/large-{n}": content(LARGE + n, n) for n in range(count)}
    files |= {f"docs/small-{n}": content(SMALL + n, 10 + n) for n in range(count)}
    for name, data in files.items():
        cluster.put(name, data)
    return files


def check_all(cluster, files):
    """Every byte is right."""

    async def read(client):
        for name, data in files.items():
            assert await client.get_bytes(name) == data, name

    cluster.run(read)


def shards_on(cluster):
    return sum(pool.shards for pool in cluster.status().pools)


def recorded(cluster, names):
    """Return how many shards these files have."""
    return sum(len(extent.shards) for name in names for extent in cluster.describe(name).extents)


def test_pools_that_stay_away_are_rebuilt_around_and_return_to_be_cleared(new_cluster, content, wait_until):
    with new_cluster(pools=8, controller=QUICK | {"replace_after": "6s"}) as cluster:
        files = put_files(cluster, content)
        holders = cluster.holders("docs/large-0")[:2]
        for pool in holders:
            pool.kill()
        wait_until(lambda: cluster.status().repair.left == 0 and is_whole(cluster, files), "not rebuilt")
        check_all(cluster, files)
        for pool in holders:
            pool.start()
        cluster.wait_until_up()
        # What was rebuilt elsewhere leaves the disks of those that came back.
        wait_until(
            lambda: shards_on(cluster) == recorded(cluster, files), "shards that no record names are left"
        )
        check_all(cluster, files)


def test_a_pool_is_replaced_by_hand_and_its_name_taken_by_an_empty_folder(new_cluster, content, wait_until):
    with new_cluster(pools=7, controller=QUICK | {"replace_after": "1h"}) as cluster:
        files = put_files(cluster, content)
        lost = cluster.holders("docs/large-0")[0]
        refused = cluster.droppex("pools", "replace", lost.name, "--yes", code=4)
        assert "is up: stop it first" in refused.stderr
        lost.kill()
        shutil.rmtree(lost.data)
        lost.spawn()
        with pytest.raises(AssertionError, match="Is its disk mounted"):
            lost.wait_until_ready()
        assert lost.wait() != 0
        wait_until(lambda: any(pool.state == PoolState.DOWN for pool in cluster.status().pools), "not down")
        told = cluster.droppex("pools", "replace", lost.name, "--yes")
        assert "is given up" in told.stdout
        shutil.rmtree(lost.data, ignore_errors=True)
        lost.start()
        wait_until(lambda: is_at_rest(cluster) and is_whole(cluster, files), "not rebuilt")
        check_all(cluster, files)
        assert len(cluster.status().pools) == 7


def test_a_pool_from_an_old_image_is_compared_both_ways(new_cluster, content, wait_until, tmp_path):
    with new_cluster(pools=6, controller=QUICK | {"replace_after": "1h"}) as cluster:
        files = put_files(cluster, content, count=2)
        cluster.put("docs/dead", content(LARGE, 77))
        pool = cluster.holders("docs/large-0")[0]
        pool.terminate()
        shutil.copytree(pool.data, tmp_path / "image")
        pool.start()
        cluster.wait_until_up()
        cluster.remove("docs/dead")
        later = content(LARGE, 78)
        cluster.put("docs/later", later)
        files["docs/later"] = later
        wait_until(lambda: cluster.status().garbage == 0, "the removed file was not cleared away")
        pool.kill()
        shutil.rmtree(pool.data)
        shutil.copytree(tmp_path / "image", pool.data)
        pool.start()
        wait_until(lambda: is_at_rest(cluster) and is_whole(cluster, files), "not reconciled")
        check_all(cluster, files)
        extents = sum(len(cluster.describe(name).extents) for name in files)

        def held():  # As its last heartbeat said.
            return next(one.shards for one in cluster.status().pools if one.name == pool.name)

        wait_until(lambda: held() <= extents, "what was dead is still there")


def test_a_damaged_shard_that_a_read_meets_is_mended_in_place(new_cluster, content, wait_until):
    with new_cluster(pools=6, controller=QUICK) as cluster:
        files = put_files(cluster, content, count=1)
        file, other = cluster.shard_files("docs/large-0")[:2]
        for damaged, at in ((file, 4096 + 100), (other, -100)):
            with damaged.open("r+b") as stream:
                stream.seek(at, 0 if at > 0 else 2)
                byte = stream.read(1)
                stream.seek(-1, 1)
                stream.write(bytes([byte[0] ^ 1]))
        before = (file.stat().st_ino, other.stat().st_ino)
        for _ in range(5):
            assert cluster.get("docs/large-0") == files["docs/large-0"]
        wait_until(
            lambda: file.stat().st_ino != before[0] and other.stat().st_ino != before[1],
            "the damaged shards were not replaced",
        )
        wait_until(lambda: is_at_rest(cluster) and is_whole(cluster, files), "not mended")
        check_all(cluster, files)


def test_repair_goes_on_through_restarts_of_everybody(new_cluster, content, wait_until):
    with new_cluster(pools=8, controller=QUICK | {"replace_after": "6s"}) as cluster:
        files = put_files(cluster, content, count=6)
        for pool in cluster.holders("docs/large-0")[:2]:
            pool.kill()
        wait_until(lambda: cluster.status().repair.left > 0, "nothing is missing")
        cluster.controller.restart()
        for pool in [pool for pool in cluster.pools if pool.running][:3]:
            pool.restart()
        wait_until(lambda: is_at_rest(cluster) and is_whole(cluster, files), "not rebuilt after the restarts")
        check_all(cluster, files)
