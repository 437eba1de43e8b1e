"""Shards of histories that the catalogue does not know: kept for ever, and adopted or dropped by a person."""

import copy

import pytest
import trio

from droppexd.client import OrphanState
from droppexd.errors import Conflict, NotEnoughShards, NotFound
from droppexd.model import EXTENT_CHUNKS, MISSING

CONTENT = b"".join(n.to_bytes(4) for n in range(60_000))
HOURS = 3600.0
CHUNK_SIZE = 16 * 1024
EXTENT_SIZE = CHUNK_SIZE * EXTENT_CHUNKS


async def lose_catalogue(cluster, files: dict[str, bytes]) -> None:
    """Put files after the catalogue was copied, and put the copy back: it does not know them.

    The app is started anew in between: the copy knows the sessions of its own time, and judges what they wrote.
    """
    await cluster.kill("app")
    await trio.sleep(70)
    old = copy.deepcopy(cluster.catalog_disk)
    await cluster.start_app()
    async with cluster.client() as client:
        for name, content in files.items():
            await client.put_bytes(name, content)
    await cluster.kill("app")
    await cluster.kill("controller")
    cluster.catalog_disk = old
    await cluster.start_controller()
    await cluster.start_app()
    await trio.sleep(15)


def shards(cluster) -> int:
    return sum(len(disk.shards) for disk in cluster.disks.values())


async def listed(client) -> list:
    return [orphan async for orphan in client.orphans()]


async def quarantined(client) -> int:
    return (await client.status()).status.quarantined


@pytest.mark.slow
def test_what_the_catalogue_never_knew_is_kept_and_told_of(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/known", b"known")
        known = shards(cluster)
        await lose_catalogue(cluster, {"docs/large": CONTENT, "docs/small": b"small", "docs/empty": b""})
        await trio.sleep(1.2 * HOURS)
        async with cluster.client() as client:
            lost = shards(cluster) - known
            assert lost == 6 + 3  # 4+2 and, of the small one, copies.
            status = (await client.status()).status
            assert status.quarantined == lost
            assert any("`droppex orphans`" in warning for warning in status.warnings)
            found = {orphan.name: orphan for orphan in await listed(client)}
            assert set(found) == {"docs/large", "docs/small"}
            assert found["docs/large"].size == len(CONTENT)
            assert {orphan.state for orphan in found.values()} == {OrphanState.WHOLE}
            with pytest.raises(NotFound):
                await client.get_bytes("docs/large")

    simulate(story, seed=1)


def test_what_is_adopted_is_a_file_like_any_other(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        files = {"docs/large": CONTENT, "docs/small": b"small", "docs/very/large": CONTENT * 20}
        await lose_catalogue(cluster, files)
        assert len(files["docs/very/large"]) > EXTENT_SIZE
        async with cluster.client() as client:
            for orphan in await listed(client):
                receipt = await client.adopt_orphan(orphan, folder="lost+found")
                assert receipt.version == orphan.version
                assert receipt.name == f"lost+found/{orphan.name}"
            for name, content in files.items():
                assert await client.get_bytes(f"lost+found/{name}") == content
                described = await client.describe(f"lost+found/{name}")
                assert described.survives_pools == 2
                assert "uncertain" in dict(described.metadata)["adopted"]
            await trio.sleep(30)
            assert await quarantined(client) == 0
            assert await listed(client) == []
            assert any(len(disk.shards) for disk in cluster.disks.values())
            for name in files:
                await client.remove(f"lost+found/{name}")
            await trio.sleep(60)
            assert shards(cluster) == 0
            assert (await client.status()).status.garbage == 0

    simulate(story, seed=2)


def test_a_lost_shard_of_what_is_adopted_is_rebuilt(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/large": CONTENT})
        async with cluster.client() as client:
            (orphan,) = await listed(client)
            extent = orphan.extents[0]
            gone, wrong = extent.places[:2]
            disks = {number: cluster.disks[f"pool-{number}"] for number in range(1, 7)}
            disks[gone.pool].remove((extent.id, gone.shard))
            disks[wrong.pool].flip_piece(extent.id, wrong.shard, 0)
            await client.adopt_orphan(orphan, folder="lost+found")
            with trio.fail_after(300):
                while (await client.status()).status.repair.left:
                    await trio.sleep(5)
            described = await client.describe("lost+found/docs/large")
            assert all(place.pool != MISSING for one in described.extents for place in one.shards)
            async with client.open_read("lost+found/docs/large") as download:
                assert b"".join([bytes(frame) async for frames in download for frame in frames]) == CONTENT
                assert download.rebuilt_parts == 0
            await trio.sleep(30)
            assert await quarantined(client) == 0

    simulate(story, seed=3)


def test_what_cannot_be_read_is_not_adopted_and_stays(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/large": CONTENT})
        async with cluster.client() as client:
            (orphan,) = await listed(client)
            extent = orphan.extents[0]
            for place in extent.places[:2]:
                cluster.disks[f"pool-{place.pool}"].remove((extent.id, place.shard))
            wrong = extent.places[2]
            cluster.disks[f"pool-{wrong.pool}"].flip_piece(extent.id, wrong.shard, 3)
            with pytest.raises(NotEnoughShards, match="3 of its shards"):
                await client.adopt_orphan(orphan, folder="lost+found")
            cluster.disks[f"pool-{wrong.pool}"].damage_header(extent.id, wrong.shard)
            (orphan,) = await listed(client)
            assert orphan.state == OrphanState.INCOMPLETE
            assert shards(cluster) == 4
            with pytest.raises(NotFound):
                await client.describe("lost+found/docs/large")

    simulate(story, seed=4)


def test_what_is_dropped_goes_from_every_pool_and_nothing_else_does(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/known", CONTENT)
            await client.put_bytes("docs/known-small", b"small")
        known = shards(cluster)
        await lose_catalogue(cluster, {f"docs/{number}": b"%d" % number * 3000 for number in range(40)})
        async with cluster.client() as client:
            found = await listed(client)
            assert len(found) == 40
            await cluster.kill("pool-2")
            held = len(cluster.disks["pool-2"].shards)
            assert held > 2
            extents = [extent for orphan in found for extent in orphan.extents]
            assert await client.drop_orphans(extents) == ()
            await trio.sleep(60)
            status = (await client.status()).status
            assert status.quarantined == 0
            assert status.garbage > 0
            await cluster.start_pool("pool-2")
            await trio.sleep(60)
            assert shards(cluster) == known
            status = (await client.status()).status
            assert (status.quarantined, status.garbage) == (0, 0)
            assert await client.get_bytes("docs/known") == CONTENT
            assert await client.get_bytes("docs/known-small") == b"small"

    simulate(story, seed=5)


def test_nothing_of_a_live_version_can_be_adopted_or_dropped(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/lost": CONTENT})
        async with cluster.client() as client:
            (orphan,) = await listed(client)
            await client.adopt_orphan(orphan, folder="lost+found")
            before = shards(cluster)
            assert await client.drop_orphans(orphan.extents) == (orphan.extents[0].id,)
            await trio.sleep(200)
            with pytest.raises(Conflict, match="already"):
                await client.adopt_orphan(orphan, folder="elsewhere")
            assert shards(cluster) == before
            assert await client.get_bytes("lost+found/docs/lost") == CONTENT

    simulate(story, seed=6)


def test_a_dropped_version_cannot_be_adopted_any_more(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/lost": CONTENT})
        async with cluster.client() as client:
            (orphan,) = await listed(client)
            await client.drop_orphans(orphan.extents)
            with pytest.raises(Conflict, match="was dropped"):
                await client.adopt_orphan(orphan, folder="lost+found")
            await trio.sleep(60)
            with pytest.raises(NotEnoughShards):
                await client.adopt_orphan(orphan, folder="lost+found")

    simulate(story, seed=7)


def test_pools_that_are_away_are_named_and_their_shards_are_listed_when_they_are_back(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/lost": CONTENT})
        async with cluster.client() as client:
            await cluster.kill("pool-4")
            await trio.sleep(15)
            listing = client.orphans()
            (orphan,) = [one async for one in listing]
            assert list(listing.away) == ["pool-4"]
            assert (orphan.sound, orphan.wanted, orphan.state) == (5, 6, OrphanState.WHOLE)
            await cluster.start_pool("pool-4")
            await trio.sleep(15)
            listing = client.orphans()
            (orphan,) = [one async for one in listing]
            assert not listing.away
            assert orphan.sound == 6

    simulate(story, seed=8)


def test_a_shard_that_comes_back_after_the_adoption_counts(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        await lose_catalogue(cluster, {"docs/lost": CONTENT})
        async with cluster.client() as client:
            await cluster.kill("pool-4")
            await trio.sleep(15)
            (orphan,) = await listed(client)
            receipt = await client.adopt_orphan(orphan, folder="lost+found")
            assert receipt.survives_pools == 1
            await cluster.start_pool("pool-4")
            await trio.sleep(30)
            assert (await client.describe(receipt.name)).survives_pools == 2
            assert await quarantined(client) == 0

    simulate(story, seed=9)
