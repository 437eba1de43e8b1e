"""Several controllers on one store: whoever is the master, nothing comes back and nothing is lost."""

import pytest
import trio

from droppexd.errors import DroppexError, NotFound, PeerError
from droppexd.model import ControllerRole, PoolState
from droppexd.wire.messages import ANYTHING
from tests.simulation.conftest import LEASE_S

CONTENT = b"".join(n.to_bytes(4) for n in range(30_000))
NAMES = ("controller-1", "controller-2", "controller-3")


async def master(client) -> str:
    """Return the name of the controller that is the master."""
    listed = await client.controllers()
    (found,) = [one.name for one in listed.controllers if one.role == ControllerRole.MASTER]
    return found


async def all_up(client) -> bool:
    pools = (await client.status()).status.pools
    return all(pool.state == PoolState.UP for pool in pools)


async def until(condition, *, most_s: float = 120.0) -> None:
    with trio.fail_after(most_s):
        while not await condition():
            await trio.sleep(1)


def story(controllers: int = 3, pools: int = 4):
    """Run an async test about a cluster of several controllers."""

    def decorate(function):
        def test(simulate):
            async def run(cluster) -> None:
                await cluster.start_shared(controllers, pools)
                async with cluster.client() as client:
                    await function(cluster, client)

            simulate(run, seed=1)

        test.__name__ = function.__name__
        test.__doc__ = function.__doc__
        return test

    return decorate


@story()
async def test_clients_see_a_pause_when_the_master_is_killed(cluster, client):
    await client.put_bytes("docs/before", CONTENT)
    first = await master(client)
    await cluster.kill(first)
    killed_at = trio.current_time()
    receipt = await client.put_bytes("docs/after", CONTENT[4:])
    assert trio.current_time() - killed_at < LEASE_S + 3
    assert receipt.size == len(CONTENT) - 4
    assert await client.get_bytes("docs/before") == CONTENT
    assert await client.get_bytes("docs/after") == CONTENT[4:]
    assert await master(client) != first


@story()
async def test_a_controller_that_was_down_during_a_delete_does_not_bring_the_file_back(cluster, client):
    await client.put_bytes("docs/secret", CONTENT)
    first = await master(client)
    absent = next(name for name in NAMES if name != first)
    await cluster.kill(absent)
    await client.remove("docs/secret")
    await cluster.start_shared_controller(absent)
    for name in NAMES:
        if name != absent:
            await cluster.kill(name)
    with pytest.raises(NotFound):
        await client.get_bytes("docs/secret")
    assert await master(client) == absent
    assert [entry async for entry in client.list("docs", recursive=True)] == []


@story(controllers=1, pools=3)
async def test_an_empty_pool_is_known_to_a_controller_that_joins_later(cluster, client):
    await cluster.start_pool("empty-pool")
    await cluster.kill("empty-pool")
    await trio.sleep(15)
    await cluster.start_shared_controller("controller-2", known=False)
    await cluster.kill("controller-1")
    pools = {pool.name: pool.state for pool in (await client.status()).status.pools}
    assert set(pools) == {"pool-1", "pool-2", "pool-3", "empty-pool"}
    await until(lambda: is_down(client, "empty-pool"))


async def is_down(client, name: str) -> bool:
    pools = {pool.name: pool.state for pool in (await client.status()).status.pools}
    return pools.pop(name) == PoolState.DOWN and set(pools.values()) == {PoolState.UP}


@story(controllers=1, pools=3)
async def test_pools_and_app_follow_a_master_that_they_were_never_told_of_at_their_start(cluster, client):
    await client.put_bytes("docs/before", CONTENT)
    await cluster.start_shared_controller("controller-2", known=False)
    await until(lambda: listed(client, 2))
    await cluster.kill("controller-1")
    await client.put_bytes("docs/after", CONTENT)
    await until(lambda: all_up(client))
    assert await client.get_bytes("docs/before") == CONTENT
    assert await master(client) == "controller-2"


async def listed(client, count: int) -> bool:
    return len((await client.controllers()).controllers) == count


@story()
async def test_a_master_that_stood_still_past_its_lease_changes_nothing_when_it_goes_on(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    first = await master(client)
    async with trio.open_nursery() as nursery:
        cluster.links[first].paused = True
        # This reaches the master, which asks the store; the store hears of it when the master goes on.
        nursery.start_soon(client.put_bytes, "docs/two", CONTENT[4:])
        await trio.sleep(0.5)
        cluster.network.pause(first)
        await trio.sleep(2 * LEASE_S)
        async with cluster.client() as other:
            await other.put_bytes("docs/three", CONTENT[8:])
            assert await master(other) != first
        cluster.network.resume(first)
        cluster.links[first].resume()
    assert await client.get_bytes("docs/two") == CONTENT[4:]
    await trio.sleep(5)
    states = {one.name: one.role for one in (await client.controllers()).controllers}
    assert states[first] == ControllerRole.STANDBY


@story()
async def test_a_master_cut_off_from_the_store_but_not_from_the_pools_serves_nothing(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    first = await master(client)
    cluster.links[first].cut = True
    await client.put_bytes("docs/one", CONTENT[4:], condition=ANYTHING)
    assert await client.get_bytes("docs/one") == CONTENT[4:]
    second = await master(client)
    assert second != first
    await trio.sleep(LEASE_S)
    states = {one.name: one for one in (await client.controllers()).controllers}
    assert states[first].role == ControllerRole.STANDBY
    assert states[first].failure
    cluster.links[first].resume()
    await trio.sleep(5)
    states = {one.name: one for one in (await client.controllers()).controllers}
    assert not states[first].failure
    assert states[first].master == states[second].address


@story()
async def test_without_the_store_there_is_no_master_and_nothing_is_told(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    for link in cluster.links.values():
        link.cut = True
    await trio.sleep(2 * LEASE_S)
    with pytest.raises(PeerError, match="no master"):
        await client.get_bytes("docs/one")
    with pytest.raises(DroppexError):
        await client.put_bytes("docs/two", CONTENT)
    listed = await client.controllers()
    assert listed.master == ""
    assert [one.role for one in listed.controllers] == [ControllerRole.STANDBY] * 3
    assert all(one.failure for one in listed.controllers)
    for link in cluster.links.values():
        link.resume()
    assert await client.get_bytes("docs/one") == CONTENT
    await client.put_bytes("docs/two", CONTENT)


@story()
async def test_a_change_whose_answer_was_lost_is_carried_out_once(cluster, client):
    first = await master(client)
    link = cluster.links[first]
    carried_out = cluster.shared.write

    async def lose_the_answer(*question):
        revision = await carried_out(*question)
        link.cut = True
        return revision

    cluster.shared.write = lose_the_answer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.put_bytes, "docs/one", CONTENT)
        await trio.sleep(0.5)
        cluster.shared.write = carried_out
    assert await client.get_bytes("docs/one") == CONTENT
    assert await master(client) != first
    versions = [key for key in cluster.catalog_disk.entries if key.startswith(b"v/")]
    assert len(versions) == 1
    assert (await client.status()).status.files == 1


@story()
async def test_a_controller_is_forgotten_only_when_it_is_gone(cluster, client):
    first = await master(client)
    gone = next(name for name in NAMES if name != first)
    with pytest.raises(DroppexError, match="stop it"):
        await client.remove_controller(gone)
    await cluster.kill(gone)
    states = {one.name: one.role for one in (await client.controllers()).controllers}
    assert states[gone] == ControllerRole.UNREACHABLE
    await client.remove_controller(gone)
    assert gone not in {one.name for one in (await client.controllers()).controllers}
    with pytest.raises(NotFound):
        await client.remove_controller(gone)
