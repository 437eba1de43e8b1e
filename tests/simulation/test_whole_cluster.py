"""Controller, app, six pools: put, kill, get, in one process and by one seed."""

from dataclasses import replace

import pytest
import trio

from droppexd.errors import Conflict, InvalidRequest, NotEnoughShards, NotFound
from droppexd.model import MISSING, Layout

CONTENT = b"".join(n.to_bytes(4) for n in range(60_000))
"""240 000 bytes: many chunks of the simulation, and not a multiple of one."""


async def pools_with_data_shards(client, name: str) -> list[str]:
    described = await client.describe(name)
    places = [place for place in described.extents[0].shards if place.pool != MISSING]
    return [place.name for place in places if place.index < described.extents[0].layout.k]


async def lose_two_and_read(cluster) -> None:
    await cluster.start(pools=6)
    async with cluster.client() as client:
        receipt = await client.put_bytes("docs/large", CONTENT)
        assert (receipt.layout, receipt.survives_pools) == ("4+2", 2)
        await client.put_bytes("docs/small", b"a few bytes")
        for name in (await pools_with_data_shards(client, "docs/large"))[:2]:
            await cluster.kill(name)
        async with client.open_read("docs/large") as download:
            content = b"".join([bytes(frame) async for frames in download for frame in frames])
        assert content == CONTENT
        assert download.rebuilt_parts > 0
        assert await client.get_bytes("docs/large", start=100_001, length=12_345) == CONTENT[100_001:112_346]
        assert await client.get_bytes("docs/small") == b"a few bytes"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_lost_pools_lose_nothing(simulate, seed):
    simulate(lose_two_and_read, seed=seed)


def test_one_seed_gives_one_trace(simulate):
    assert simulate(lose_two_and_read, seed=7) == simulate(lose_two_and_read, seed=7)
    assert simulate(lose_two_and_read, seed=7) != simulate(lose_two_and_read, seed=8)


def test_more_lost_pools_than_parity_is_an_error_that_names_them(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/large", CONTENT)
            lost = (await pools_with_data_shards(client, "docs/large"))[:3]
            for name in lost:
                await cluster.kill(name)
            with pytest.raises(NotEnoughShards) as error:
                await client.get_bytes("docs/large")
            for name in lost:
                assert any(name in line for line in error.value.missing)

    simulate(story, seed=1)


def test_flipped_bits_are_never_served(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/large", CONTENT)
            described = await client.describe("docs/large")
            extent = described.extents[0]
            first, second = extent.shards[0], extent.shards[3]
            cluster.disks[first.name].flip_piece(extent.id, first.index, 0)
            cluster.disks[second.name].flip_checksum(extent.id, second.index, 2)
            async with client.open_read("docs/large") as download:
                content = b"".join([bytes(frame) async for frames in download for frame in frames])
            assert content == CONTENT
            assert download.rebuilt_parts == 2

    simulate(story, seed=1)


def test_a_stopped_pool_slows_a_read_and_fails_none(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/large", CONTENT)
            for name in (await pools_with_data_shards(client, "docs/large"))[:2]:
                cluster.network.pause(name)
            assert await client.get_bytes("docs/large") == CONTENT

    simulate(story, seed=1)


def test_a_pool_that_stops_during_a_put_is_given_up(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            cluster.network.pause("pool-2")
            receipt = await client.put_bytes("docs/large", CONTENT)
            assert receipt.survives_pools == 1
            described = await client.describe("docs/large")
            assert sum(place.pool == MISSING for place in described.extents[0].shards) == 1
            assert await client.get_bytes("docs/large") == CONTENT

    simulate(story, seed=1)


def test_deleted_shards_leave_the_disks_after_the_grace(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6, grace_s=5.0)
        async with cluster.client() as client:
            await client.put_bytes("docs/large", CONTENT)
            await client.put_bytes("docs/small", b"a few bytes")
            await client.rename("docs/large", "docs/copy", keep=True)
            await client.remove("docs/large")
            await client.remove("docs/small")
            await trio.sleep(30)
            assert await client.get_bytes("docs/copy") == CONTENT
            assert sum(store.usage().shards for store in cluster.stores.values()) == 6
            await client.remove("docs/copy")
            await trio.sleep(30)
            assert sum(store.usage().shards for store in cluster.stores.values()) == 0
            with pytest.raises(NotFound):
                await client.get_bytes("docs/copy")

    simulate(story, seed=1)


def test_one_of_many_conditional_puts_wins(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        outcomes = []

        async def put(client, number: int) -> None:
            try:
                await client.put_bytes("docs/one", f"writer {number}".encode())
                outcomes.append(number)
            except Conflict:
                pass

        async with cluster.client() as client:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(put, client, number)
            assert len(outcomes) == 1
            assert await client.get_bytes("docs/one") == f"writer {outcomes[0]}".encode()

    simulate(story, seed=1)


def test_everything_acknowledged_is_there_after_all_were_killed(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            await client.put_bytes("docs/large", CONTENT)
            await client.put_bytes("docs/small", b"a few bytes")
        for name in list(cluster.members):
            await cluster.kill(name)
        await cluster.start(pools=6)
        async with cluster.client() as client:
            assert await client.get_bytes("docs/large") == CONTENT
            assert await client.get_bytes("docs/small") == b"a few bytes"
            receipt = await client.put_bytes("docs/after", CONTENT)
            assert receipt.survives_pools == 2

    simulate(story, seed=1)


def test_a_client_that_vanishes_mid_put_leaves_no_file(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            with trio.move_on_after(0.01):
                await client.put_bytes("docs/large", CONTENT * 4)
        async with cluster.client() as client:
            assert [entry.name async for entry in client.list("docs/")] == []
            await client.put_bytes("docs/large", CONTENT)

    simulate(story, seed=1)


def test_shards_of_a_put_that_lost_leave_the_disks_soon(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        lost = []

        async def put(client, content: bytes) -> None:
            try:
                await client.put_bytes("docs/one", content)
            except Conflict:
                lost.append(content)

        async with cluster.client() as client:
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(put, client, CONTENT + bytes([number]))
            assert len(lost) == 2
            await trio.sleep(60)
            assert sum(store.usage().shards for store in cluster.stores.values()) == 6
            assert len(await client.get_bytes("docs/one")) == len(CONTENT) + 1

    simulate(story, seed=1)


def test_an_app_that_is_told_to_stop_finishes_the_put_that_runs(simulate):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        receipts = []

        async def put(client) -> None:
            receipts.append(await client.put_bytes("docs/large", CONTENT[: 4 * 16 * 1024]))

        async with cluster.client() as client, trio.open_nursery() as nursery:
            nursery.start_soon(put, client)
            await trio.sleep(0.02)
            cluster.members["app"].scope.cancel()
            await cluster.members["app"].ended.wait()
        assert [receipt.name for receipt in receipts] == ["docs/large"]

    simulate(story, seed=1)


class SlowPipe:
    """A source that yields some bytes now and then, as standard input may."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, length: int) -> bytes:
        length = min(length, self.left)
        self.left -= length
        return b"x" * length


def test_a_put_and_a_get_that_pause_for_long_go_on(simulate, monkeypatch):
    async def story(cluster) -> None:
        await cluster.start(pools=6)

        async def slow(function, *args):
            await trio.sleep(150)
            return function(*args)

        async with cluster.client() as client:
            monkeypatch.setattr(client, "_runtime", replace(cluster.runtime, run_blocking=slow))
            receipt = await client.put_file("docs/slow", SlowPipe(150_000))
            monkeypatch.setattr(client, "_runtime", cluster.runtime)
            size = 0
            async with client.open_read("docs/slow") as download:
                async for frames in download:
                    size += sum(map(len, frames))
                    if size < 50_000:
                        await trio.sleep(150)
            assert size == receipt.size == 150_000

    simulate(story, seed=1)


@pytest.mark.parametrize("content", [b"a few bytes", CONTENT])
def test_a_layout_that_survives_no_loss_is_refused(simulate, content):
    async def story(cluster) -> None:
        await cluster.start(pools=6)
        async with cluster.client() as client:
            with pytest.raises(InvalidRequest, match="no loss"):
                await client.put_bytes("docs/one", content, layout=Layout(4, 0))
            assert [entry.name async for entry in client.list("docs/")] == []

    simulate(story, seed=1)
