"""Controllers that each have a copy of the catalogue: what is acknowledged outlasts the loss of a master."""

from contextlib import suppress
from unittest import mock

import pytest
import trio

from droppexd.catalog.engine import Operation
from droppexd.catalog.keys import CLUSTER
from droppexd.catalog.records import pack_fields
from droppexd.errors import Conflict, DroppexError, IdentityError, NotFound, PeerError
from droppexd.model import ControllerRole, PoolState
from droppexd.roles import followers
from droppexd.wire.messages import ANYTHING

CONTENT = b"".join(n.to_bytes(4) for n in range(30_000))
FIRST, SECOND, THIRD = "controller-1", "controller-2", "controller-3"


def address_of(name):
    return f"tcp://127.0.0.1:{7710 + int(name[-1])}"


async def states(client):
    return {one.name: one for one in (await client.controllers()).controllers}


async def master(client) -> str:
    """Return the name of the controller that is the master; empty when none is."""
    found = [
        one.name for one in (await client.controllers()).controllers if one.role == ControllerRole.MASTER
    ]
    return found[0] if len(found) == 1 else ""


async def until(condition, *, most_s: float = 120.0):
    with trio.fail_after(most_s):
        while not (found := await condition()):
            await trio.sleep(0.5)
    return found


async def level(client) -> bool:
    """Return whether all controllers are known, and have all that the master has."""
    found = (await client.controllers()).controllers
    return all(one.role != ControllerRole.UNREACHABLE and not one.lag for one in found)


async def all_up(client) -> bool:
    return all(pool.state == PoolState.UP for pool in (await client.status()).status.pools)


async def same(cluster) -> bool:
    """Return whether all controllers have the same on their disks."""
    first, *others = (copy.disk for copy in cluster.copies.values())
    return all(disk.entries == first.entries for disk in others)


async def all_level(client, count: int):
    async def are() -> bool:
        return len((await client.controllers()).controllers) == count and await level(client)

    await until(are)


def story(controllers: int = 3, pools: int = 4, sync: int = 1):
    """Run an async test about a cluster of controllers that follow the first."""

    def decorate(function):
        def test(simulate):
            async def run(cluster) -> None:
                cluster.journal = 0
                await cluster.start_followers(controllers, pools, sync=sync)
                async with cluster.client() as client:
                    await all_level(client, controllers)
                    await function(cluster, client)

            simulate(run, seed=1)

        test.__name__ = function.__name__
        test.__doc__ = function.__doc__
        return test

    return decorate


@story()
async def test_standbys_have_everything_within_seconds(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await trio.sleep(3)
    disks = [cluster.copies[name].disk for name in (FIRST, SECOND, THIRD)]
    assert disks[0].entries == disks[1].entries == disks[2].entries
    assert disks[0].log == disks[1].log == disks[2].log
    found = await states(client)
    assert [found[name].role for name in (FIRST, SECOND, THIRD)] == ["master", "standby", "standby"]
    assert {one.revision for one in found.values()} == {disks[0].revision}
    assert not any(one.failure or one.warnings for one in found.values())


@story()
async def test_a_standby_is_promoted_when_the_master_is_gone_and_has_all_that_was_acknowledged(
    cluster, client
):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(FIRST)
    plan = await client.promote(address_of(SECOND), trial=True)
    assert (plan.reached, plan.needed) == (2, 2)
    assert await master(client) == ""
    promoted = await client.promote(address_of(SECOND))
    assert promoted.term > 1
    assert not promoted.lost
    assert await client.get_bytes("docs/one") == CONTENT
    await client.put_bytes("docs/two", CONTENT[4:])
    assert await master(client) == SECOND
    await until(lambda: all_up(client))


@story()
async def test_a_file_that_was_removed_while_a_controller_was_down_does_not_come_back_with_it(
    cluster, client
):
    await client.put_bytes("docs/secret", CONTENT)
    await cluster.kill(THIRD)
    await client.remove("docs/secret")
    await cluster.start_follower(THIRD)
    await all_level(client, 3)
    await cluster.kill(FIRST)
    await client.promote(address_of(THIRD))
    with pytest.raises(NotFound):
        await client.get_bytes("docs/secret")
    assert await master(client) == THIRD


@story()
async def test_who_lacks_something_takes_it_over_from_who_has_it_before_it_serves(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(THIRD)
    await client.put_bytes("docs/one", CONTENT[4:], condition=ANYTHING)
    await client.put_bytes("docs/two", CONTENT)
    await cluster.kill(FIRST)
    await cluster.start_follower(THIRD)
    await client.promote(address_of(THIRD))
    assert await client.get_bytes("docs/one") == CONTENT[4:]
    assert await client.get_bytes("docs/two") == CONTENT


@story()
async def test_too_few_controllers_are_no_reason_to_lose_anything_silently(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await trio.sleep(3)
    await cluster.kill(THIRD)
    await client.put_bytes("docs/two", CONTENT)
    await cluster.kill(FIRST)
    await cluster.kill(SECOND)
    await cluster.start_follower(THIRD)
    with pytest.raises(Conflict, match="2 controllers are needed, and 1 can be reached"):
        await client.promote(address_of(THIRD))
    before = (await states(client))[THIRD]
    assert before.role == ControllerRole.STANDBY
    plan = await client.promote(address_of(THIRD), accept_loss=True, trial=True)
    assert len(plan.lost) == 2
    incarnation = cluster.copies[THIRD].disk.entries[b"m/cluster"].value
    promoted = await client.promote(address_of(THIRD), accept_loss=True)
    assert len(promoted.lost) == 2
    assert cluster.copies[THIRD].disk.entries[b"m/cluster"].value != incarnation
    assert await client.get_bytes("docs/one") == CONTENT
    with pytest.raises(NotFound):
        await client.get_bytes("docs/two")
    # The others come back: they have another history, and what they alone know of is kept for people.
    await cluster.start_follower(FIRST)
    await cluster.start_follower(SECOND)
    await all_level(client, 3)
    await client.put_bytes("docs/three", CONTENT)
    assert await master(client) == THIRD
    lost = [row for name in (FIRST, SECOND) for row in cluster.copies[name].lost]
    assert any(b"docs/two" in row.operations for _, row in lost)
    await until(lambda: same(cluster))


@story()
async def test_the_last_master_goes_on_when_it_comes_back(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(FIRST)
    await cluster.start_follower(FIRST)
    assert await client.get_bytes("docs/one") == CONTENT
    assert await master(client) == FIRST


@story()
async def test_the_last_master_does_not_go_on_without_its_standbys(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    for name in (FIRST, SECOND, THIRD):
        await cluster.kill(name)
    await cluster.start_follower(FIRST)
    with pytest.raises(PeerError, match="no master"):
        await client.get_bytes("docs/one")
    found = await states(client)
    assert "waits for 1 of its standbys" in found[FIRST].failure
    await cluster.start_follower(THIRD)
    assert await client.get_bytes("docs/one") == CONTENT
    assert await master(client) == FIRST


@story()
async def test_a_master_that_was_replaced_follows_when_it_comes_back_and_tells_what_it_had_alone(
    cluster, client
):
    await client.put_bytes("docs/one", CONTENT)
    cluster.network.partition(FIRST, SECOND)
    cluster.network.partition(FIRST, THIRD)
    with pytest.raises(DroppexError):
        await client.put_bytes("docs/alone", CONTENT[4:])
    assert any(b"docs/alone" in key for key in cluster.copies[FIRST].disk.entries)
    promoted = await client.promote(address_of(SECOND))
    assert promoted.reached == 2
    await client.put_bytes("docs/two", CONTENT)
    cluster.network.heal(FIRST, SECOND)
    cluster.network.heal(FIRST, THIRD)
    await until(lambda: same(cluster))
    assert await master(client) == SECOND
    with pytest.raises(NotFound):
        await client.get_bytes("docs/alone")
    assert any(b"docs/alone" in row.operations for _, row in cluster.copies[FIRST].lost)


@story()
async def test_a_master_without_its_standbys_tells_nothing(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(SECOND)
    await cluster.kill(THIRD)
    with pytest.raises(PeerError, match="no master"):
        await client.get_bytes("docs/one")
    found = await states(client)
    assert "does not hear from the 1 standbys" in found[FIRST].failure
    await cluster.start_follower(SECOND)
    assert await client.get_bytes("docs/one") == CONTENT
    assert not (await states(client))[FIRST].failure


@story()
async def test_without_a_master_a_list_may_be_old_and_says_how_old(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await trio.sleep(3)
    told = []

    async def listed(**options):
        return [entry.name async for entry in client.list("docs/", **options)]

    assert await listed(on_stale=lambda *page: told.append(page)) == ["docs/one"]
    assert told == []
    await cluster.kill(FIRST)
    await trio.sleep(20)
    with pytest.raises(PeerError, match="no master"):
        await listed()
    assert await listed(on_stale=lambda *page: told.append(page)) == ["docs/one"]
    ((name, age_s),) = told
    assert name in (SECOND, THIRD)
    assert 20 <= age_s < 90
    await cluster.kill(SECOND)
    await cluster.start_follower(SECOND)
    await cluster.kill(THIRD)
    assert await listed(on_stale=lambda *page: told.append(page)) == ["docs/one"]
    assert told[-1] == (SECOND, None)


@story()
async def test_two_masters_by_hand_are_one_in_the_end(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(FIRST)
    won = []

    async def promote(name):
        with suppress(Conflict):
            won.append(await client.promote(address_of(name)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(promote, SECOND)
        nursery.start_soon(promote, THIRD)
    assert len({promoted.term for promoted in won}) == len(won)
    if not won:
        await client.promote(address_of(SECOND))
    assert await master(client) in (SECOND, THIRD)
    assert await client.get_bytes("docs/one") == CONTENT
    await client.put_bytes("docs/two", CONTENT)


@story()
async def test_a_promotion_that_was_asked_for_twice_is_made_once(cluster, client):
    await cluster.kill(FIRST)
    answers = []

    async def promote():
        try:
            answers.append((await client.promote(address_of(SECOND))).term)
        except Conflict as error:
            answers.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(promote)
        nursery.start_soon(promote)
        with trio.move_on_after(0.5):  # The first is under way: it waits for the one that is gone.
            await trio.sleep_forever()
        nursery.start_soon(promote)
    (term,) = [answer for answer in answers if isinstance(answer, int)]
    assert len(answers) == 3
    assert await master(client) == SECOND
    assert (await states(client))[SECOND].term == term


@story()
async def test_a_promotion_while_the_master_works_hands_over(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.put_bytes, "docs/two", CONTENT[4:])
        await client.promote(address_of(THIRD))
    assert await client.get_bytes("docs/two") == CONTENT[4:]
    assert await master(client) == THIRD
    await all_level(client, 3)
    assert (await states(client))[FIRST].role == ControllerRole.STANDBY


@story(controllers=2)
async def test_of_two_the_master_waits_for_the_other_until_that_is_given_up_for_good(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(SECOND)
    await trio.sleep(10)
    with pytest.raises(DroppexError):
        await client.remove_controller(SECOND)
    await client.remove_controller(SECOND, force=True)
    assert await client.get_bytes("docs/one") == CONTENT
    await client.put_bytes("docs/two", CONTENT)


@story(controllers=1)
async def test_a_controller_that_joins_is_waited_for_only_when_it_has_everything(cluster, client):
    for number in range(5):
        await client.put_bytes(f"docs/{number}", CONTENT)
    cluster.copies[FIRST].engine._keep_revisions = 1
    cluster.copies[FIRST].engine._trim()
    assert cluster.copies[FIRST].disk.log[0].revision > 1
    await cluster.start_follower(SECOND)
    assert await client.get_bytes("docs/0") == CONTENT
    await all_level(client, 2)
    assert cluster.copies[SECOND].disk.entries == cluster.copies[FIRST].disk.entries
    await client.put_bytes("docs/more", CONTENT)


@story()
async def test_one_of_another_cluster_is_refused(cluster, client):
    await cluster.kill(THIRD)
    copy = cluster.copies[THIRD]
    copy.disk.apply(0, [Operation(CLUSTER, pack_fields((bytes(16), bytes(16))))])
    copy.begins = True
    with pytest.raises(IdentityError, match="another cluster"):
        await cluster.start_follower(THIRD)


@story(sync=0)
async def test_without_confirmation_the_master_needs_nobody(cluster, client):
    await client.put_bytes("docs/one", CONTENT)
    await cluster.kill(SECOND)
    await cluster.kill(THIRD)
    await client.put_bytes("docs/two", CONTENT)
    assert await client.get_bytes("docs/two") == CONTENT
    await cluster.start_follower(SECOND)
    await cluster.start_follower(THIRD)
    await cluster.kill(FIRST)
    with pytest.raises(Conflict, match="3 controllers are needed, and 2"):
        await client.promote(address_of(SECOND))


@story(controllers=1)
async def test_who_joins_does_not_take_itself_for_the_only_controller(cluster, client):
    """What it has of the log at first names nobody, and neither does what it knows by heart."""

    async def nobody_yet(replica):
        await trio.sleep(8)
        return await real(replica)

    real = followers.read_members
    with mock.patch.object(followers, "read_members", nobody_yet):
        await cluster.start_follower(SECOND)
        await trio.sleep(30)
        found = await states(client)
        assert {name: one.role for name, one in found.items()} == {
            FIRST: ControllerRole.MASTER,
            SECOND: ControllerRole.STANDBY,
        }
        assert found[FIRST].term == 1
    await client.put_bytes("docs/one", CONTENT)
    await all_level(client, 2)
    assert await client.get_bytes("docs/one") == CONTENT
