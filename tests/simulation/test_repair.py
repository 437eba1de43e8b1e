"""A cluster that mends what it loses: in one process, on the mock clock, by one seed."""

import copy

import pytest
import trio

from droppexd.errors import Conflict
from droppexd.model import MISSING
from droppexd.store.simulated import SimulatedDisk

CONTENT = b"".join(n.to_bytes(4) for n in range(60_000))


async def put_some(client, files: int = 6) -> dict[str, bytes]:
    contents = {f"docs/large-{n}": CONTENT[n * 1000 :] for n in range(files // 2)}
    contents |= {f"docs/small-{n}": b"%d few bytes" % n for n in range(files // 2)}
    for name, content in contents.items():
        await client.put_bytes(name, content)
    return contents


async def check_whole(client, contents: dict[str, bytes]) -> None:
    """Every file is right, without rebuilding anything, and each extent has all of its shards."""
    for name, content in contents.items():
        async with client.open_read(name) as download:
            read = b"".join([bytes(frame) async for frames in download for frame in frames])
        assert read == content
        assert download.rebuilt_parts == 0
        described = await client.describe(name)
        assert all(place.pool != MISSING for extent in described.extents for place in extent.shards)


async def rest(client, *, most_s: float = 600.0) -> None:
    """Wait until nothing is missing any more."""
    with trio.fail_after(most_s):
        while True:
            await trio.sleep(5)
            status = (await client.status()).status
            if not status.repair.left and not status.repair.moving and status.repair.balanced:
                return


def shards_of(cluster, name: str) -> int:
    return len(cluster.disks[name].shards)


def test_a_pool_that_stays_away_is_replaced_by_the_others(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=8, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client)
            await cluster.kill("pool-3")
            await cluster.kill("pool-5")
            await trio.sleep(45)
            assert (await client.status()).status.repair.left == 0
            await trio.sleep(60)
            await rest(client)
            status = (await client.status()).status
            assert {count.survives for count in status.survival} == {2}
            assert {pool.state for pool in status.pools if pool.name in ("pool-3", "pool-5")} == {"out"}
            await check_whole(client, contents)

    simulate(story, seed=1)


def test_a_pool_that_returns_in_time_keeps_its_shards_and_drops_what_died(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6, replace_after_s=600)
        async with cluster.client() as client:
            contents = await put_some(client)
            await cluster.kill("pool-3")
            await client.remove("docs/large-0")
            del contents["docs/large-0"]
            await trio.sleep(120)
            await cluster.start_pool("pool-3")
            await trio.sleep(30)
            await check_whole(client, contents)
            status = (await client.status()).status
            assert status.garbage == 0
            assert {count.survives for count in status.survival} == {2}

    simulate(story, seed=2)


def test_a_pool_that_returns_too_late_drops_what_was_rebuilt_elsewhere(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=8, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client)
            total = sum(shards_of(cluster, name) for name in cluster.disks)
            await cluster.kill("pool-3")
            assert shards_of(cluster, "pool-3")
            await trio.sleep(100)
            await rest(client)
            await cluster.start_pool("pool-3")
            await trio.sleep(60)
            await check_whole(client, contents)
            assert sum(shards_of(cluster, name) for name in cluster.disks) == total

    simulate(story, seed=3)


def test_shards_that_found_no_other_pool_count_again_when_theirs_returns(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client)
            await cluster.kill("pool-3")
            await trio.sleep(150)
            status = (await client.status()).status
            assert status.repair.left > 0
            assert status.repair.stuck > 0
            await cluster.start_pool("pool-3")
            await rest(client)
            await check_whole(client, contents)

    simulate(story, seed=4)


def test_an_empty_folder_in_the_place_of_a_pools_is_refused_until_that_is_replaced(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=7, replace_after_s=600)
        async with cluster.client() as client:
            contents = await put_some(client)
            with pytest.raises(Conflict, match="is up"):
                await client.replace_pool("pool-3")
            await cluster.kill("pool-3")
            await trio.sleep(15)
            cluster.disks["pool-3"] = SimulatedDisk()
            assert "Is its disk mounted" in await cluster.refused_pool("pool-3")
            replaced = await client.replace_pool("pool-3")
            assert replaced.shards > 0
            await cluster.start_pool("pool-3")
            await rest(client)
            await check_whole(client, contents)
            status = (await client.status()).status
            assert len(status.pools) == 7

    simulate(story, seed=5)


def test_a_removed_pool_is_dead_for_ever(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=7, replace_after_s=600)
        async with cluster.client() as client:
            contents = await put_some(client)
            await cluster.kill("pool-3")
            await trio.sleep(15)
            await client.remove("docs/large-1")
            del contents["docs/large-1"]
            replaced = await client.replace_pool("pool-3")
            again = await client.replace_pool(str(replaced.number))  # As when an answer was lost.
            assert (again.number, again.shards) == (replaced.number, 0)
            assert "was removed" in await cluster.refused_pool("pool-3")
            await trio.sleep(60)
            await rest(client)
            await check_whole(client, contents)
            assert (await client.status()).status.garbage == 0

    simulate(story, seed=6)


@pytest.mark.parametrize("restarted", [True, False], ids=["of an earlier start", "of the last start"])
def test_a_pool_of_an_old_image_loses_first_what_it_has_not_and_then_drops_what_is_dead(simulate, restarted):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/old", CONTENT)
            await client.put_bytes("docs/dead", b"dead soon")
            image = copy.deepcopy(cluster.disks["pool-2"])
            await client.remove("docs/dead")
            contents = {"docs/old": CONTENT} | await put_some(client)
            await trio.sleep(30)
            await cluster.kill("pool-2")
            if restarted:
                await cluster.start_pool("pool-2")
                await cluster.kill("pool-2")
            await trio.sleep(5)
            image.in_use = False
            cluster.disks["pool-2"] = image
            await cluster.start_pool("pool-2")
            status = (await client.status()).status
            state = next(pool.state for pool in status.pools if pool.name == "pool-2")
            assert state == ("checking" if restarted else "up")
            await trio.sleep(10)
            await rest(client)
            await check_whole(client, contents)
            assert {pool.state for pool in (await client.status()).status.pools} == {"up"}
            assert shards_of(cluster, "pool-2") <= len(contents)

    simulate(story, seed=7)


@pytest.mark.parametrize("damage", ["flip_piece", "flip_checksum", "damage_header", "vanish"])
def test_a_read_that_meets_a_lost_shard_has_it_rebuilt(simulate, damage):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            contents = await put_some(client)
            lost = []
            for name in contents:
                extent = (await client.describe(name)).extents[0]
                place = extent.shards[0]
                disk = cluster.disks[place.name]
                lost.append((disk, (extent.id, 0)))
                if damage == "vanish":
                    disk.remove((extent.id, 0))
                elif damage == "damage_header":
                    disk.damage_header(extent.id, 0)
                else:
                    getattr(disk, damage)(extent.id, 0, 0)
            for name, content in contents.items():
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(read_right, client, name, content)
            await trio.sleep(10)
            await rest(client)
            await check_whole(client, contents)
            assert (await client.status()).status.repair.left == 0
            assert all(key in disk.shards for disk, key in lost)

    simulate(story, seed=8)


async def read_right(client, name: str, content: bytes) -> None:
    assert await client.get_bytes(name) == content


def test_the_shards_of_a_failed_disk_move_away_while_it_can_be_read(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=7)
        async with cluster.client() as client:
            contents = await put_some(client)
            cluster.disks["pool-2"].fail_flush()
            await client.put_bytes("docs/one-more", CONTENT)
            contents["docs/one-more"] = CONTENT
            await trio.sleep(10)
            await rest(client)
            await trio.sleep(10)
            await check_whole(client, contents)
            described = [await client.describe(name) for name in contents]
            places = [place for one in described for extent in one.extents for place in extent.shards]
            assert all(place.name != "pool-2" for place in places)
            assert any("disk failed" in warning for warning in (await client.status()).status.warnings)

    simulate(story, seed=9)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("name", ["docs/large-0", "docs/small-0"])
def test_a_disk_that_keeps_nothing_gets_no_more_and_its_shards_move_away(simulate, name, gone):
    async def story(cluster) -> None:
        await cluster.start(pools=7)
        async with cluster.client() as client:
            contents = await put_some(client)
            extent = (await client.describe(name)).extents[0]
            worn = extent.shards[0].name
            disk = cluster.disks[worn]
            if gone:
                disk.remove((extent.id, 0))
                disk.forgotten.add((extent.id, 0))
            else:
                disk.worn.add((extent.id, 0))
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(read_right, client, name, contents[name])
            await trio.sleep(10)
            # An order that its disk fails is planned for another pool at once: it does not wait for a lease.
            await rest(client, most_s=30.0)
            await check_whole(client, contents)
            described = [await client.describe(name) for name in contents]
            places = [place for one in described for extent in one.extents for place in extent.shards]
            assert all(place.name != worn for place in places)
            (warning,) = (await client.status()).status.warnings[-1:]
            assert warning.startswith(f"pool {worn} ")
            assert "its disk failed: reading back what was flushed failed" in warning

    simulate(story, seed=11)


def test_repair_goes_on_after_the_master_and_the_pools_were_killed(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=8, replace_after_s=60)
        async with cluster.client() as client:
            contents = await put_some(client, files=20)
            await cluster.kill("pool-3")
            await trio.sleep(73)
        for name in [name for name in cluster.members if name != "pool-3"]:
            await cluster.kill(name)
        await cluster.start_controller(replace_after_s=60)
        for number in (1, 2, 4, 5, 6, 7, 8):
            await cluster.start_pool(f"pool-{number}")
        await cluster.start_app()
        async with cluster.client() as client:
            await trio.sleep(80)
            await rest(client)
            await check_whole(client, contents)

    simulate(story, seed=10)
