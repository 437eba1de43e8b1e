"""Pools keep the catalogue's log: losing the disks of all controllers loses nothing that was acknowledged."""

from types import SimpleNamespace

import pytest
import trio

from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import PeerError
from droppexd.model import DISK_FULL, PoolState, Role
from droppexd.roles.controller_journals import JournalPools
from droppexd.roles.rebuilding import Survey, collect
from droppexd.wire.messages import ANYTHING
from droppexd.wire.rpc import Terms, open_connections
from tests.simulation.conftest import Copy

CONTENT = b"".join(n.to_bytes(4) for n in range(30_000))
FIRST = "controller-1"


def story(pools: int = 4, journal: int = 1):
    """Run an async test about one controller, and pools on machines of their own."""

    def decorate(function):
        def test(simulate):
            async def run(cluster) -> None:
                cluster.machines = {f"pool-{number}": f"machine-{number}" for number in range(1, pools + 1)}
                cluster.journal = journal
                await cluster.start_followers(1, pools)
                async with cluster.client() as client:
                    await client.put_bytes("docs/first", CONTENT)
                    await trio.sleep(5)
                    await function(cluster, client)

            simulate(run, seed=1)

        test.__name__ = function.__name__
        return test

    return decorate


async def all_up(client) -> None:
    with trio.fail_after(120):
        while not all(pool.state == PoolState.UP for pool in (await client.status()).status.pools):
            await trio.sleep(1)


def keeping(cluster):
    return [name for name, journal in cluster.journals.items() if journal.disk.revision]


@story()
async def test_three_pools_keep_the_catalogue_and_have_what_is_acknowledged(cluster, client):
    assert len(keeping(cluster)) == 3
    catalogue = cluster.copies[FIRST].disk
    await client.put_bytes("docs/one", CONTENT[4:])
    there = [
        name
        for name in keeping(cluster)
        if any(b"docs/one" in key for key in cluster.journals[name].disk.entries)
    ]
    assert there
    await trio.sleep(3)
    assert all(cluster.journals[name].disk.entries == catalogue.entries for name in keeping(cluster))


@story()
async def test_another_pool_takes_the_place_of_one_that_is_gone(cluster, client):
    before = keeping(cluster)
    await cluster.kill(before[0])
    await trio.sleep(20)
    await client.put_bytes("docs/one", CONTENT)
    (other,) = set(cluster.journals) - set(before)
    await trio.sleep(5)
    assert cluster.journals[other].disk.entries == cluster.copies[FIRST].disk.entries
    await cluster.start_pool(before[0])
    await trio.sleep(5)
    await client.put_bytes("docs/two", CONTENT)


@story()
async def test_a_change_that_no_journal_has_is_not_acknowledged(cluster, client):
    for name in cluster.journals:
        cluster.network.partition(FIRST, name)
    with pytest.raises(PeerError, match="too few pools write down the journal"):
        await client.remove("docs/first")
    (only,) = (await client.controllers()).controllers
    assert "too few pools" in only.failure
    cluster.network.heal()
    await all_up(client)
    with trio.fail_after(60):
        while (await client.controllers()).controllers[0].failure:
            await trio.sleep(1)
    await client.put_bytes("docs/second", CONTENT[8:], condition=ANYTHING)
    assert await client.get_bytes("docs/second") == CONTENT[8:]


@story()
async def test_the_disk_of_the_only_controller_is_lost_and_nothing_with_it(cluster, client):
    stored = {f"docs/{number}": CONTENT[4 * number :] for number in range(5)}
    for name, data in stored.items():
        await client.put_bytes(name, data)
    await client.remove("docs/first")
    addresses = [cluster.members[name].address for name in cluster.journals]
    await cluster.kill(FIRST)
    del cluster.copies[FIRST]
    engine = SimulatedEngine(cluster.runtime)
    async with (
        cluster.network.transport("operator", Role.CONTROLLER) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        survey = Survey(connections)
        await survey.ask({addresses[0]: addresses[0]})
        await collect(engine, survey, survey.cluster_id(addresses), cluster.runtime)
        assert len(survey.found) == len(addresses)  # The journal tells of the other pools.
    copy = cluster.copies[FIRST] = Copy(begins=True)
    copy.disk = engine.disk
    await cluster.start_follower(FIRST)
    await all_up(client)
    assert sorted([entry.name async for entry in client.list("docs/")]) == sorted(stored)
    for name, data in stored.items():
        assert await client.get_bytes(name) == data
    await client.put_bytes("docs/more", CONTENT)


@story()
async def test_who_is_promoted_with_a_loss_takes_over_what_a_journal_has(cluster, client):
    await cluster.start_follower("controller-2")
    with trio.fail_after(60):
        while len((await client.controllers()).controllers) < 2:
            await trio.sleep(1)
    cluster.network.partition(FIRST, "controller-2")
    await client.remove_controller("controller-2", force=True)
    await client.put_bytes("docs/late", CONTENT)
    await cluster.kill(FIRST)
    await client.promote("tcp://127.0.0.1:7712", accept_loss=True)
    await client.remove_controller(FIRST, force=True)
    await all_up(client)
    assert await client.get_bytes("docs/late") == CONTENT


async def rebuild_without_journal(cluster) -> None:
    """Lose the only controller's disk, and begin another catalogue for the pools."""
    await cluster.kill(FIRST)
    del cluster.copies[FIRST]
    assert keeping(cluster) == []
    addresses = [cluster.members[name].address for name in cluster.stores]
    engine = SimulatedEngine(cluster.runtime)
    async with (
        cluster.network.transport("operator", Role.CONTROLLER) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        survey = Survey(connections)
        await survey.ask({address: address for address in addresses})
        await collect(engine, survey, survey.cluster_id(addresses), cluster.runtime)
        assert survey.best == ""
    copy = cluster.copies[FIRST] = Copy(begins=True)
    copy.disk = engine.disk
    await cluster.start_follower(FIRST)


async def all_names(client) -> list[str]:
    return [entry.name async for entry in client.list("", recursive=True)]


@story(journal=0)
async def test_without_any_journal_what_the_shards_tell_is_kept_below_lost_and_found(cluster, client):
    await rebuild_without_journal(cluster)
    with trio.fail_after(300):
        while "lost+found/docs/first" not in await all_names(client):
            await trio.sleep(1)
        while any("lost+found" in warning for warning in (await client.status()).status.warnings):
            await trio.sleep(1)
    assert await client.get_bytes("lost+found/docs/first") == CONTENT
    described = await client.describe("lost+found/docs/first")
    assert dict(described.metadata)["adopted"].startswith("uncertain")


@story(journal=0)
async def test_nothing_is_adopted_while_a_pool_is_away_that_may_know_of_more(cluster, client):
    await rebuild_without_journal(cluster)
    await cluster.kill("pool-1")
    await trio.sleep(120)
    assert await all_names(client) == []
    (warning, *_) = (await client.status()).status.warnings
    assert "begun anew from shards alone" in warning
    await cluster.start_pool("pool-1")
    with trio.fail_after(60):
        while await all_names(client) != ["lost+found/docs/first"]:
            await trio.sleep(1)


def test_pools_on_the_machine_of_the_master_keep_no_journal():
    def pool(number, machine, state=PoolState.UP, trouble=""):
        return SimpleNamespace(
            number=number,
            name=f"p{number}",
            machine=machine,
            state=state,
            address=f"tcp://127.0.0.1:{number}",
            trouble=trouble,
        )

    choice = JournalPools("here")
    pools = [pool(1, "here"), pool(2, "a"), pool(3, "a"), pool(4, "b"), pool(5, "c"), pool(6, "d")]
    assert set(choice.choose(pools)) == {"p2", "p4", "p5"}
    assert choice.most(pools) == 3
    pools[3] = pool(4, "b", PoolState.DOWN)
    assert set(choice.choose(pools)) == {"p2", "p5", "p6"}
    pools[3] = pool(4, "b")
    assert set(choice.choose(pools)) == {"p2", "p5", "p6"}
    assert choice.choose([pool(1, "here"), pool(2, "here")]) == {}
    assert choice.most([pool(1, "here"), pool(2, "a", PoolState.DOWN)]) == 1
    full = [pool(number, machine, PoolState.READ_ONLY, DISK_FULL) for number, machine in ((2, "a"), (5, "c"))]
    failed = pool(4, "b", PoolState.READ_ONLY, "its disk failed")
    choice.choose([pool(5, "c")])
    assert list(choice.choose([*full, failed])) == ["p5", "p2"]
    assert list(choice.choose([*full, pool(6, "d")])) == ["p6", "p2", "p5"]
