"""A backup of the catalogue is restored into a cluster that went on without it: nothing of it is lost."""

import copy
import random

import pytest
import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.catalog.restoring import begin_incarnation
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import NotEnoughShards
from droppexd.model import EXTENT_CHUNKS, MISSING, PoolState
from droppexd.store.simulated import SimulatedDisk

CONTENT = b"".join(n.to_bytes(4) for n in range(60_000))
CHUNK_SIZE = 16 * 1024
EXTENT_SIZE = CHUNK_SIZE * EXTENT_CHUNKS


async def put_some(client, folder: str = "docs") -> dict[str, bytes]:
    contents = {f"{folder}/large-{n}": CONTENT[n * 1000 :] for n in range(4)}
    contents[f"{folder}/larger"] = CONTENT * 6
    assert len(contents[f"{folder}/larger"]) > EXTENT_SIZE
    contents |= {f"{folder}/small-{n}": b"%d few bytes" % n for n in range(4)}
    for name, content in contents.items():
        await client.put_bytes(name, content)
    return contents


async def restore(cluster, backup, **settings) -> None:
    """Lose the catalogue, and go on with a backup; app and pools run on and never hear of it."""
    await cluster.kill("controller")
    cluster.catalog_disk = copy.deepcopy(backup)
    engine = SimulatedEngine(cluster.runtime, cluster.catalog_disk)
    await begin_incarnation(engine, cluster.entropy, written_ms=1_700_000_000_000)
    await engine.close()
    await cluster.start_controller(**settings)


async def until(condition, *, most_s: float = 600.0) -> None:
    with trio.fail_after(most_s):
        while not await condition():
            await trio.sleep(2)


async def no_longer_restored(client) -> bool:
    return not any("was restored" in warning for warning in (await client.status()).status.warnings)


async def at_rest(client) -> bool:
    repair = (await client.status()).status.repair
    return not repair.left and not repair.moving and repair.balanced


async def check_whole(client, contents: dict[str, bytes]) -> None:
    """Every file is right, and each extent has all of its shards."""
    for name, content in contents.items():
        assert await client.get_bytes(name) == content, name
        described = await client.describe(name)
        assert all(place.pool != MISSING for extent in described.extents for place in extent.shards)


async def move_shards(cluster, client, pools) -> None:
    """Let pools lose their disks one after another, so that their shards are rebuilt on others."""
    for name in pools:
        await cluster.kill(name)
        await trio.sleep(15)
        await client.replace_pool(name, force=True)
        await until(lambda: at_rest(client))
        cluster.disks[name] = SimulatedDisk()
        await cluster.start_pool(name)


def shards(cluster) -> int:
    return sum(len(disk.shards) for disk in cluster.disks.values())


def recorded(cluster) -> int:
    return sum(key.startswith(b"e/") for key in cluster.catalog_disk.entries)


async def old_catalogue_comes_back(cluster) -> tuple[int, int]:
    """Move more shards of each file than it can lose, then restore; return how many shards were there."""
    await cluster.start(pools=8)
    async with cluster.client() as client:
        contents = await put_some(client)
        before = shards(cluster)
        backup = copy.deepcopy(cluster.catalog_disk)
        await move_shards(cluster, client, [f"pool-{number}" for number in range(1, 6)])
        await trio.sleep(60)  # What was moved away is dropped by then.
        assert shards(cluster) == before
        await restore(cluster, backup)
        # Those that the backup knows by other disks are gone for good, and in the way of nobody.
        await trio.sleep(30)
        warnings = (await client.status()).status.warnings
        assert any("was restored from a backup of 2023-11-14" in warning for warning in warnings)
        for number in range(1, 6):
            await client.replace_pool(str(number), force=True)
        await until(lambda: no_longer_restored(client))
        await until(lambda: at_rest(client))
        await check_whole(client, contents)
        assert (await client.status()).status.quarantined == 0
        await trio.sleep(60)
        return before, shards(cluster)


@pytest.mark.parametrize("seed", range(1, 4))
def test_shards_that_moved_since_the_backup_are_found_where_they_are(simulate, seed):
    async def story(cluster) -> None:
        before, after = await old_catalogue_comes_back(cluster)
        assert after == before

    simulate(story, seed=seed)


def test_without_the_mark_they_would_be_dropped_and_files_lost(simulate, monkeypatch):
    """What the mark is for: the records alone call what moved dead."""
    monkeypatch.setattr(Catalogue, "restored_ms", property(lambda _: None))
    real = Catalogue.__init__

    def trusting(self, engine, runtime, state, grace_s, identity):
        state.restored_ms = None
        real(self, engine, runtime, state, grace_s, identity)

    monkeypatch.setattr(Catalogue, "__init__", trusting)

    async def story(cluster) -> None:
        await cluster.start(pools=8)
        async with cluster.client() as client:
            contents = await put_some(client)
            backup = copy.deepcopy(cluster.catalog_disk)
            await move_shards(cluster, client, [f"pool-{number}" for number in range(1, 6)])
            await restore(cluster, backup)
            await trio.sleep(30)
            lost = 0
            for name in contents:
                try:
                    await client.get_bytes(name)
                except NotEnoughShards:
                    lost += 1
            assert lost > 0

    simulate(story, seed=1)


def test_shards_that_moved_are_found_while_pools_are_away(simulate):
    """The mark stays as long as a pool is away; what the others have is recorded where it is all the same."""

    async def story(cluster) -> None:
        await cluster.start(pools=8, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client)
            backup = copy.deepcopy(cluster.catalog_disk)
            away = ("pool-1", "pool-2")
            for name in away:
                await cluster.kill(name)
            await trio.sleep(100)
            await until(lambda: at_rest(client))
            for name in away:
                await cluster.start_pool(name)
            await trio.sleep(60)
            for name in ("pool-3", "pool-4"):
                await cluster.kill(name)
            await trio.sleep(100)
            await until(lambda: at_rest(client))
            # Only the six that have every shard now are there when the backup comes back.
            await restore(cluster, backup, replace_after_s=600)
            await trio.sleep(60)
            for name, content in contents.items():
                assert await client.get_bytes(name) == content
            assert not await no_longer_restored(client)
            for name in ("pool-3", "pool-4"):
                await cluster.start_pool(name)
            await until(lambda: no_longer_restored(client))
            await until(lambda: at_rest(client))
            await trio.sleep(60)
            await check_whole(client, contents)
            states = {pool.state for pool in (await client.status()).status.pools}
            assert states == {PoolState.UP}

    simulate(story, seed=5)


def shuffle(cluster, rng: random.Random) -> int:
    """Put each extent's shards on other pools; return how many were lost on the way.

    As a long history of moves may leave them: two at most are lost, or one is still where it was, too. Not both:
    a pool counts for one shard of an extent, and one that it must drop may be in the way of one that is needed.
    """
    held = {}
    for name, disk in cluster.disks.items():
        for key in list(disk.order):
            held.setdefault(key[0], []).append((key, name, disk.shards[key]))
            disk.remove(key)
    lost = 0
    for extent in sorted(held):
        places = held[extent]
        targets = rng.sample(sorted(cluster.disks), len(places))
        gone = rng.sample(range(len(places)), rng.choice([0, 0, 0, 1, 2]))
        lost += len(gone)
        kept = [place for at, place in enumerate(zip(places, targets, strict=True)) if at not in gone]
        for (key, _, stored), target in kept:
            cluster.disks[target].add(key, copy.deepcopy(stored))
        (key, name, stored), target = rng.choice(kept)
        if not gone and rng.random() < 0.5 and name != target:
            cluster.disks[name].add(key, copy.deepcopy(stored))
    return lost


@pytest.mark.parametrize("seed", range(100, 104))
def test_wherever_shards_are_they_are_found_or_rebuilt(simulate, seed):
    async def story(cluster) -> None:
        rng = random.Random(seed)
        await cluster.start(pools=8)
        async with cluster.client() as client:
            contents = await put_some(client)
            before = shards(cluster)
            backup = copy.deepcopy(cluster.catalog_disk)
            late = rng.sample(sorted(cluster.disks), rng.randint(0, 3))
            for name in late:
                await cluster.kill(name)
            shuffle(cluster, rng)
            await restore(cluster, backup)
            for name in late:
                await trio.sleep(rng.uniform(0, 30))
                await cluster.start_pool(name)
            await until(lambda: no_longer_restored(client))
            await until(lambda: at_rest(client))
            await check_whole(client, contents)
            # A shard that had no place because its pool had another of the extent goes with the hourly look.
            await trio.sleep(4000)
            await check_whole(client, contents)
            assert shards(cluster) == before

    simulate(story, seed=seed)


def test_what_was_stored_since_is_kept_and_can_be_adopted_whoever_wrote_it(simulate):
    """The app's session is open when the backup is made, and goes on writing in it."""

    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            contents = await put_some(client)
            backup = copy.deepcopy(cluster.catalog_disk)
            later = await put_some(client, "later")
            await client.remove("docs/large-0")
            await trio.sleep(60)
            await restore(cluster, backup)
            await until(lambda: no_longer_restored(client))
            await trio.sleep(4000)
            del contents["docs/large-0"]
            await check_whole(client, contents)
            with pytest.raises(NotEnoughShards):
                await client.get_bytes("docs/large-0")
            status = (await client.status()).status
            assert any("1 files cannot be read now" in warning for warning in status.warnings)
            assert status.quarantined > 0
            found = [orphan async for orphan in client.orphans()]
            assert {orphan.name for orphan in found} == set(later)
            for orphan in found:
                receipt = await client.adopt_orphan(orphan, folder="lost+found")
                assert await client.get_bytes(receipt.name) == later[orphan.name]
            await client.remove("docs/large-0")
            await trio.sleep(60)
            status = (await client.status()).status
            assert (status.quarantined, status.garbage) == (0, 0)
            await client.put_bytes("docs/new", CONTENT)
            assert await client.get_bytes("docs/new") == CONTENT

    simulate(story, seed=6)


def test_what_is_removed_while_pools_are_compared_goes_from_everywhere(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=8, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client)
            backup = copy.deepcopy(cluster.catalog_disk)
            await cluster.kill("pool-1")
            await trio.sleep(100)
            await until(lambda: at_rest(client))
            await restore(cluster, backup)
            await trio.sleep(20)
            assert not await no_longer_restored(client)
            for name in contents:
                await client.remove(name)
            await cluster.start_pool("pool-1")
            await until(lambda: no_longer_restored(client))
            await trio.sleep(60)
            assert shards(cluster) == 0
            status = (await client.status()).status
            assert (status.quarantined, status.garbage) == (0, 0)

    simulate(story, seed=7)


def test_a_master_that_is_started_again_goes_on_comparing(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=8)
        async with cluster.client() as client:
            contents = await put_some(client)
            backup = copy.deepcopy(cluster.catalog_disk)
            await move_shards(cluster, client, ["pool-1", "pool-2", "pool-3"])
            await restore(cluster, backup)
            await cluster.kill("controller")
            await cluster.start_controller()
            await trio.sleep(15)
            await cluster.kill("controller")
            await cluster.start_controller()
            await trio.sleep(20)
            assert not await no_longer_restored(client)
            for number in range(1, 4):
                await client.replace_pool(str(number), force=True)
            await until(lambda: no_longer_restored(client))
            await until(lambda: at_rest(client))
            await check_whole(client, contents)

    simulate(story, seed=8)
