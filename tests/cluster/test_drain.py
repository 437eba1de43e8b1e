"""A cluster grows and shrinks: a pool is emptied and taken out, and another gets its share."""

import json
from collections import Counter

import pytest

from droppexd.model import CHUNK_SIZE, Layout, Membership, PoolState
from droppexd.store.header_file import BLOCK_BYTES
from tests.cluster.test_reads import flip

SETTINGS = {"controller": {"heartbeat": "300ms", "down_after": "2s", "delete_grace": "1s"}}


def apart(cluster):
    """Put each pool on a machine of its own."""
    for pool in cluster.pools:
        pool.options += ["--machine", pool.name]


def at_rest(cluster):
    status = cluster.status()
    repair = status.repair
    return repair.balanced and not (repair.left or repair.moving or status.garbage)


def holders_of(cluster, names):
    """Return how many shards each pool has of these files, as the records say."""
    counts = Counter()
    for name in names:
        for extent in cluster.describe(name).extents:
            counts.update(place.name for place in extent.shards)
    return counts


def held(cluster):
    return {pool.name: pool.shards for pool in cluster.status().pools}


def fill(cluster, content, count=24):
    stored = {f"docs/{number}": content(400_000 + number, number) for number in range(count)}
    stored |= {f"docs/small-{number}": content(900 + number, number) for number in range(count)}
    for name, data in stored.items():
        cluster.put(name, data)
    return stored


def check_files(cluster, stored):
    for name, data in stored.items():
        assert cluster.get(name) == data, name
        assert all(
            place.state == PoolState.UP
            for extent in cluster.describe(name).extents
            for place in extent.shards
        )


@pytest.mark.slow
def test_a_pool_is_drained_and_removed_while_files_are_used(new_cluster, content, wait_until):
    with new_cluster(pools=5, prepare=apart, **SETTINGS) as cluster:
        stored = fill(cluster, content)  # In 3+2: all five are needed.
        refused = cluster.droppex("pools", "drain", "pool-3", code=4)
        assert "files in 3+2 need 5 pools, and without 'pool-3' there are 4: add a pool" in refused.stderr
        assert "empties it first" in cluster.droppex("pools", "remove", "pool-3", code=4).stderr
        added = cluster._process("pool-6", "pool")
        added.options += ["--machine", "pool-6"]
        cluster.pools.append(added)
        added.start()
        wait_until(lambda: at_rest(cluster), "the new pool does not get its share")
        share = holders_of(cluster, stored)
        assert share["pool-6"] > 0.5 * sum(share.values()) / 6
        done = cluster.droppex("pools", "drain", "pool-3")
        assert "pool pool-3 is empty: `droppex pools remove pool-3` takes it out" in done.stdout
        assert "pool-3" not in holders_of(cluster, stored)
        check_files(cluster, stored)
        cluster.put("docs/later", content(300_000))
        assert "pool-3" not in holders_of(cluster, ["docs/later"])
        number = next(pool.number for pool in cluster.status().pools if pool.name == "pool-3")
        told = json.loads(cluster.droppex("pools", "drain", "pool-3", "--json").stdout)
        assert told == {
            "number": number, "name": "pool-3", "membership": Membership.DRAINING.value, "shards": 0, "stuck": 0,
        }  # fmt: skip
        removed = cluster.droppex("pools", "remove", "pool-3")
        assert "no part of the cluster any more" in removed.stdout
        cluster.droppex("pools", "remove", str(number))  # Once more, as after an answer that was lost.
        wait_until(lambda: "pool-3" not in held(cluster), "it is still listed")
        assert cluster.pool("pool-3").wait() != 0  # Its id never comes back.
        cluster.pools.remove(cluster.pool("pool-3"))
        check_files(cluster, stored)
        wait_until(lambda: at_rest(cluster), "no rest")


@pytest.mark.slow
def test_a_drain_goes_on_over_restarts_and_can_be_undone(new_cluster, content, wait_until):
    with new_cluster(pools=4, prepare=apart, **SETTINGS) as cluster:
        stored = {f"docs/{number}": content(300_000, number) for number in range(12)}
        for name, data in stored.items():
            cluster.put(name, data, layout=Layout(1, 1))
        before = holders_of(cluster, stored)["pool-2"]
        assert before
        said = cluster.droppex("pools", "drain", "pool-2", "--no-wait").stdout
        assert "is being emptied" in said or "is empty" in said
        cluster.controller.restart()
        cluster.pool("pool-2").restart()
        wait_until(lambda: holders_of(cluster, stored)["pool-2"] == 0, "it is not emptied")
        check_files(cluster, stored)
        undone = cluster.droppex("pools", "drain", "pool-2", "--undo")
        assert "used like the others again" in undone.stdout
        wait_until(lambda: holders_of(cluster, stored)["pool-2"] > 0, "it gets nothing back")
        wait_until(lambda: at_rest(cluster), "no rest")
        check_files(cluster, stored)


@pytest.mark.slow
def test_shards_on_a_pool_that_died_with_the_master_stay_there_until_it_is_out(
    new_cluster, content, wait_until
):
    """The next master has never heard of that pool, and it weighs what it did."""
    with new_cluster(pools=4, prepare=apart, **SETTINGS) as cluster:
        stored = {f"docs/{number}": content(1000 + number, number) for number in range(40)}
        for name, data in stored.items():
            cluster.put(name, data, layout=Layout(1, 1))
        wait_until(lambda: at_rest(cluster), "no rest")
        before = holders_of(cluster, stored)
        cluster.pool("pool-2").kill()
        cluster.controller.restart()
        wait_until(lambda: heard_of(cluster) == 3, "the others are not heard of")
        wait_until(lambda: at_rest(cluster), "no rest without it")
        assert holders_of(cluster, stored) == before
        cluster.pool("pool-2").start()
        wait_until(lambda: heard_of(cluster) == 4, "it is not heard of again")
        wait_until(lambda: at_rest(cluster), "no rest with it")
        assert holders_of(cluster, stored) == before
        check_files(cluster, stored)


def heard_of(cluster):
    return sum(pool.state == PoolState.UP for pool in cluster.status().pools)


@pytest.mark.slow
def test_what_has_nowhere_to_go_is_told_and_stays(new_cluster, content, wait_until, monkeypatch):
    with new_cluster(pools=3, prepare=apart, **SETTINGS) as cluster:
        data = content(300_000)
        cluster.put("docs/one", data)  # In 2+1.
        assert (
            cluster.droppex("pools", "drain", "pool-1", "--force", "--no-wait")
            .stdout.strip()
            .endswith("`droppex status` shows how far that is")
        )
        wait_until(lambda: cluster.status().repair.moving_stuck == 1, "it is not told")
        assert "1 have nowhere to go" in cluster.droppex("status").stdout
        asked = cluster.run(lambda client: client.drain_pool("pool-2", ask=True))
        assert asked.membership == Membership.MEMBER  # To ask changes nothing.

        def membership():
            return cluster.run(lambda client: client.drain_pool("pool-1", ask=True)).membership

        cluster.droppex("pools", "drain", "pool-1", "--undo")
        with cluster.start_droppex("pools", "drain", "pool-1", "--force") as waiting:
            wait_until(lambda: membership() == Membership.DRAINING, "it is not drained")
            cluster.droppex("pools", "drain", "pool-1", "--undo")
            assert waiting.wait(60) == 0  # It sees that, and does not drain it again.
        assert membership() == Membership.MEMBER
        cluster.droppex("pools", "drain", "pool-1", "--force", "--no-wait")
        assert holders_of(cluster, ["docs/one"])["pool-1"] == 1
        assert cluster.get("docs/one") == data
        assert "still has 1 shards" in cluster.droppex("pools", "remove", "pool-1", code=4).stderr


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2, 6])
def test_what_is_damaged_on_a_pool_is_rebuilt_from_the_others_when_it_is_drained(
    new_cluster, content, chunk, wait_until
):
    with new_cluster(pools=4, prepare=apart, **SETTINGS) as cluster:
        data = content(7 * CHUNK_SIZE - 1000)
        cluster.put("one", data, layout=Layout(2, 1))
        holder = cluster.describe("one").extents[0].shards[0].name
        flip(cluster.shard_files("one")[0], BLOCK_BYTES + chunk * CHUNK_SIZE // 2 + 5)
        cluster.droppex("pools", "drain", holder)
        assert holder not in holders_of(cluster, ["one"])
        wait_until(lambda: at_rest(cluster), "no rest")
        cluster.pool(holder).kill()
        # Both that are left of the three suffice: what was moved is sound.
        for other in range(1, 3):
            one = cluster.describe("one").extents[0].shards[other]
            cluster.pool(one.name).kill()
            assert cluster.get("one") == data
            cluster.pool(one.name).start()
