"""Who may connect: what the master writes reaches every process, over partitions, restarts and failovers."""

from dataclasses import replace

import pytest
import trio

from droppexd.errors import Conflict, InvalidRequest, NotAuthorised
from droppexd.model import Role
from droppexd.roles.master import MasterLink
from droppexd.wire.member_messages import Enroll, MakeToken, NewKey
from droppexd.wire.rpc import Terms, open_connections

HOUR_MS = 3_600_000
TOKEN = b"t" * 40


def story(function):
    """Run an async test about three controllers with copies, three pools and an app, all with lists."""

    def test(simulate):
        async def run(cluster) -> None:
            cluster.with_keys = True
            await cluster.start_followers(3, 3)
            async with cluster.client() as client:
                with trio.fail_after(60):
                    while len((await client.controllers()).controllers) < 3:
                        await trio.sleep(1)
                await function(cluster, client)

        simulate(run, seed=1)

    test.__name__ = function.__name__
    return test


async def ask(cluster, name, role, request):
    """Ask the master, as a process of this name whose key has this role."""
    async with (
        cluster.network.transport(name, role) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        return await MasterLink(connections, cluster.controllers, cluster.runtime).call(request, timeout_s=20)


async def make_token(cluster, *roles, uses=1, ttl_ms=HOUR_MS):
    request = MakeToken(public=TOKEN, roles=roles or ("pool",), uses=uses, ttl_ms=ttl_ms)
    return await ask(cluster, "operator", Role.CONTROLLER, request)


async def enroll(cluster, name, *, public=None, role="pool"):
    """Join as a machine of this name: the network tells of a token's key by the name of the process."""
    request = Enroll(name=name, keys=(NewKey(role, public or key(name)),))
    return await ask(cluster, TOKEN.decode(), Role.JOINER, request)


def key(name):
    return name.encode().ljust(40, b".")


def who_lets_in(cluster, name):
    return {process for process, allowed in cluster.allowed.items() if allowed.get(key(name)) is not None}


async def until_all(cluster, wanted, name):
    with trio.fail_after(60):
        while who_lets_in(cluster, name) != wanted:
            await trio.sleep(0.5)


@story
async def test_who_joins_is_let_in_by_everybody_at_once(cluster, client):
    await make_token(cluster)
    enrolled = await enroll(cluster, "new")
    assert enrolled.cluster_secret == b"C" * 40
    assert set(enrolled.controllers) == set(cluster.controllers)
    assert enrolled.apps == ("tcp://127.0.0.1:7701",)
    await trio.sleep(3)
    assert who_lets_in(cluster, "new") == set(cluster.allowed)
    assert [record.name for record in await client.members()] == ["new"]
    await client.revoke_member("new")
    await trio.sleep(3)
    assert who_lets_in(cluster, "new") == set()


@story
async def test_a_token_is_let_in_by_controllers_alone_and_only_while_it_is_good(cluster, client):
    await make_token(cluster, ttl_ms=60_000)
    await trio.sleep(3)
    letting = {name for name, allowed in cluster.allowed.items() if allowed.get(TOKEN) is not None}
    assert letting == {"controller-1", "controller-2", "controller-3"}
    await trio.sleep(70)
    with pytest.raises(NotAuthorised, match="expired"):
        await enroll(cluster, "late")
    assert not [name for name, allowed in cluster.allowed.items() if allowed.get(TOKEN) is not None]


@story
async def test_two_that_join_at_once_with_a_token_for_one(cluster, client):
    await make_token(cluster)
    joined = []

    async def join(number):
        request = Enroll(name=f"new-{number}", keys=(NewKey("pool", key(f"new-{number}")),))
        try:
            await MasterLink(connections, cluster.controllers, cluster.runtime).call(request, timeout_s=20)
        except NotAuthorised:
            return
        joined.append(number)

    async with (
        cluster.network.transport(TOKEN.decode(), Role.JOINER) as transport,
        open_connections(transport, terms=Terms()) as connections,
        trio.open_nursery() as nursery,
    ):
        for number in range(10):
            nursery.start_soon(join, number)
    assert len(joined) == 1
    assert [record.name for record in await client.members()] == [f"new-{joined[0]}"]


@story
async def test_who_was_cut_off_hears_of_a_revocation_when_it_is_back(cluster, client):
    await make_token(cluster)
    await enroll(cluster, "new")
    await until_all(cluster, set(cluster.allowed), "new")
    cluster.network.partition("pool-1", "controller-1")
    await client.revoke_member("new")
    await until_all(cluster, {"pool-1"}, "new")
    cluster.network.heal()
    await until_all(cluster, set(), "new")


@story
async def test_a_failover_between_token_and_join(cluster, client):
    await make_token(cluster)
    await cluster.kill("controller-1")
    await client.promote("tcp://127.0.0.1:7712")
    await enroll(cluster, "new")
    await until_all(cluster, set(cluster.allowed) - {"controller-1"}, "new")
    await cluster.start_follower("controller-1")
    await until_all(cluster, set(cluster.allowed), "new")
    # And back: a master that takes over knows what was revoked by the one before.
    await client.revoke_member("new")
    await client.promote("tcp://127.0.0.1:7711")
    await until_all(cluster, set(), "new")


@story
async def test_a_process_that_starts_again_learns_the_list(cluster, client):
    await make_token(cluster)
    await enroll(cluster, "new")
    for name in ("pool-2", "app"):
        await cluster.kill(name)
    await cluster.start_pool("pool-2")
    await cluster.start_app()
    await until_all(cluster, set(cluster.allowed), "new")


@story
async def test_whoever_has_no_token_joins_nothing(cluster, client):
    request = Enroll(name="new", keys=(NewKey("pool", key("new")),))
    for role in (Role.POOL, Role.APP, Role.CONTROLLER):
        with pytest.raises(NotAuthorised):
            await ask(cluster, "somebody", role, request)
    with pytest.raises(NotAuthorised, match="expired"):
        await ask(cluster, "u" * 40, Role.JOINER, request)
    await make_token(cluster, "pool", uses=3)
    with pytest.raises(NotAuthorised, match="for pool, and not for controller"):
        await enroll(cluster, "new", role="controller")
    await enroll(cluster, "new")
    with pytest.raises(Conflict):
        await enroll(cluster, "new", public=b"x" * 40)
    twice = replace(request, keys=(NewKey("pool", b"1" * 40), NewKey("pool", b"2" * 40)))
    with pytest.raises(InvalidRequest, match="one key for each role"):
        await ask(cluster, TOKEN.decode(), Role.JOINER, twice)
    with pytest.raises(InvalidRequest, match="cannot be a member's name"):
        await ask(cluster, TOKEN.decode(), Role.JOINER, replace(request, name="a/b"))
