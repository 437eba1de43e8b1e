"""The controller as its peers meet it, over the simulated network."""

import random
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from droppexd.catalog.group import SoleGroup, Undivided
from droppexd.catalog.simulated import SimulatedDisk, SimulatedEngine
from droppexd.errors import (
    CatalogError,
    Conflict,
    IdentityError,
    InvalidName,
    InvalidRequest,
    NotAuthorised,
    NotFound,
    NotMaster,
    SessionClosed,
    StaleRead,
)
from droppexd.held import pack_held
from droppexd.model import (
    CHUNK_SIZE,
    Extent,
    ExtentId,
    Holding,
    Layout,
    OperationId,
    Role,
    Version,
    VersionId,
)
from droppexd.roles.controller import ControllerSettings, serve_controller, why_it_ended
from droppexd.roles.controller_front import Front, Mastership
from droppexd.runtime import Runtime
from droppexd.wire.group_messages import (
    DescribeGroup,
    JoinController,
    ListControllers,
    RemoveController,
    TellMaster,
)
from droppexd.wire.memory import MemoryNetwork
from droppexd.wire.messages import (
    ABSENT,
    ANYTHING,
    Announce,
    CloseSession,
    Commit,
    ConfirmDropped,
    Describe,
    Find,
    GetStatus,
    Heartbeat,
    KeepSession,
    List,
    ListGarbage,
    Lookup,
    OpenSession,
    Ping,
    Reconcile,
    Remove,
    Rename,
    Review,
)
from droppexd.wire.rpc import Terms, open_connections


class MockedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1_700_000_000_000


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)

    def uniform(self, low, high):
        return self.random.uniform(low, high)


async def run_inline(function, *args):
    await trio.lowlevel.checkpoint()
    return function(*args)


class World:
    """A controller and whoever calls it."""

    def __init__(self, connections, terms, address):
        self._connections = connections
        self.terms = terms
        self.address = address
        self.pools = {}

    async def call(self, request, body=()):
        reply, _ = await self._connections.call(self.address, request, body, timeout_s=30)
        return reply

    async def announce(self, index, boot=1, **fields):
        given = {
            "pool_id": bytes([index]) * 16,
            "cluster_id": b"",
            "boot_id": bytes([boot]) * 16,
            "previous_boot_id": b"",
            "name": f"pool{index}",
            "machine": f"machine{index}",
            "zone": "",
            "address": f"tcp://127.0.0.1:{index}",
            "capacity": 1000,
            "free": 900,
            "shards": 0,
            "read_only": False,
        }
        welcomed = await self.call(Announce(**(given | fields)))
        self.pools[welcomed.number] = bytes([boot]) * 16
        return welcomed

    async def beat(self, number, **fields):
        given = {
            "number": number,
            "boot_id": self.pools[number],
            "capacity": 1000,
            "free": 900,
            "shards": 0,
            "read_only": False,
        }
        return await self.call(Heartbeat(**(given | fields)))

    async def open(self, address="tcp://127.0.0.1:99"):
        opened = await self.call(OpenSession(address=address, boot_id=bytes(16)))
        self.session = opened.session
        self.counter = 0
        return opened

    def next(self):
        self.counter += 1
        return self.counter

    def operation(self):
        return OperationId(self.session, self.next())

    def commit(self, name, condition=ANYTHING):
        extent = Extent(
            id=ExtentId(self.session, self.next()),
            layout=Layout(1, 2),
            size=10,
            chunk_size=CHUNK_SIZE,
            pools=(1, 2, 3),
        )
        version = Version(
            id=VersionId(self.session, self.next()), size=10, blake3=bytes(32), extents=(extent.id,)
        )
        return Commit(
            operation=self.operation(), name=name, condition=condition, version=version, extents=(extent,)
        )

    async def put(self, name, condition=ANYTHING):
        return (await self.call(self.commit(name, condition))).receipt

    async def remove(self, name):
        return await self.call(Remove(name=name, operation=self.operation()))


SETTINGS = ControllerSettings(name="master")


@asynccontextmanager
async def controller(disk=None, settings=SETTINGS):
    runtime = Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=run_inline)
    network = MemoryNetwork(runtime.entropy)
    engine = SimulatedEngine(runtime, disk)
    terms = Terms()
    async with (
        network.transport("controller", Role.CONTROLLER) as own,
        network.transport("peer", None) as theirs,
        open_connections(theirs, terms=terms) as connections,
        trio.open_nursery() as nursery,
    ):
        serve = partial(
            serve_controller,
            transport=own,
            address="tcp://127.0.0.1:0",
            group=SoleGroup(engine),
            runtime=runtime,
            settings=settings,
        )
        address = await nursery.start(serve)
        world = World(connections, terms, address)
        world.engine = engine
        world.network = network
        yield world
        nursery.cancel_scope.cancel()


def story(function):
    """Run an async test about a controller with three pools and one app."""

    def test():
        async def main():
            async with controller() as world:
                for index in (1, 2, 3):
                    await world.announce(index)
                await world.open()
                await function(world)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    test.__name__ = function.__name__
    return test


@story
async def test_a_file_comes_and_goes(world):
    assert (await world.call(Ping())).role == Role.CONTROLLER
    receipt = await world.put("a b", ABSENT)
    assert (receipt.name, receipt.survives_pools, receipt.survives_machines) == ("files/a b", 2, 2)
    found = await world.call(Lookup(name="a b"))
    assert found.name == "files/a b"
    assert found.extents[0].pools == (1, 2, 3)
    assert (await world.call(Lookup(name="x", version=found.version.id))).version == found.version
    with pytest.raises(Conflict):
        await world.put("a b", ABSENT)
    with pytest.raises(InvalidName):
        await world.put("a//b")
    await world.call(Rename(source="a b", target="b/c", operation=world.operation()))
    await world.call(Rename(source="b/c", target="b/d", keep=True, operation=world.operation()))
    entries = (await world.call(List(recursive=True))).entries
    assert [entry.name for entry in entries] == ["b/c", "b/d"]
    assert [entry.name for entry in (await world.call(List())).entries] == ["b/"]
    assert [entry.name for entry in (await world.call(Find(pattern="d"))).entries] == ["b/d"]
    described = await world.call(Describe(name="b/d"))
    assert described.names == 2
    assert [(place.name, place.state) for place in described.extents[0].shards] == [
        ("pool1", "up"),
        ("pool2", "up"),
        ("pool3", "up"),
    ]
    await world.remove("b/c")
    await world.remove("b/d")
    with pytest.raises(NotFound):
        await world.call(Lookup(name="b/d"))
    with pytest.raises(StaleRead):
        await world.call(Lookup(name="b/d", version=found.version.id))
    with pytest.raises(InvalidRequest):
        await world.call(Remove(name="b/d"))


@story
async def test_a_repeated_commit_gets_the_same_receipt(world):
    commit = world.commit("f/a", ABSENT)
    assert await world.call(commit) == await world.call(commit)


@story
async def test_silent_pools_are_down_and_status_tells_what_that_means(world):
    await world.put("f/a")
    status = (await world.call(GetStatus())).status
    assert [(c.survives, c.files, c.extents) for c in status.survival] == [(2, 1, 1)]
    assert (status.files, status.size, status.extents, status.sessions) == (1, 10, 1, 1)
    assert status.warnings == ()
    for _ in range(6):
        await trio.sleep(2)
        await world.beat(1)
    status = (await world.call(GetStatus())).status
    assert [pool.state for pool in status.pools] == ["up", "down", "down"]
    assert [(c.survives, c.files, c.extents) for c in status.survival] == [(0, 1, 1)]
    assert len(status.warnings) == 3
    described = await world.call(Describe(name="f/a"))
    assert (described.survives_pools, described.survives_machines) == (0, 0)


@story
async def test_a_file_that_cannot_be_read_is_described_as_such(world):
    await world.put("f/a")
    await trio.sleep(12)
    described = await world.call(Describe(name="f/a"))
    assert (described.survives_pools, described.survives_machines) == (-1, -1)


@story
async def test_an_empty_file_survives_nothing_and_everything(world):
    version = Version(id=VersionId(world.session, world.next()), size=0, blake3=bytes(32), extents=())
    commit = Commit(
        operation=world.operation(), name="f/empty", condition=ABSENT, version=version, extents=()
    )
    receipt = (await world.call(commit)).receipt
    described = await world.call(Describe(name="f/empty"))
    assert (receipt.layout, described.extents) == ("", ())
    for told in (receipt, described):
        assert (told.survives_pools, told.survives_machines) == (None, None)
    status = (await world.call(GetStatus())).status
    assert (status.files, status.empty_files, status.survival) == (1, 1, ())
    assert status.warnings == ()


@story
async def test_a_full_pool_takes_no_writes_and_still_drops(world):
    await world.put("f/a")
    await world.remove("f/a")
    await trio.sleep(130)
    await world.beat(1, free=0)
    await world.beat(2, read_only=True, trouble="a flush failed")
    assert (await world.beat(1, free=0)).review
    status = (await world.call(GetStatus())).status
    assert [pool.state for pool in status.pools] == ["read-only", "read-only", "down"]
    assert status.warnings[-2:] == (
        "pool pool1 (machine1) takes no writes: its disk is full",
        "pool pool2 (machine2) takes no writes: its disk failed: a flush failed",
    )


@story
async def test_status_names_the_apps_with_an_open_session(world):
    first = world.session
    await world.open("tcp://127.0.0.1:98")
    await world.open("tcp://127.0.0.1:98")
    reply = await world.call(GetStatus())
    assert reply.apps == ("tcp://127.0.0.1:98", "tcp://127.0.0.1:99")
    assert reply.status.sessions == 3
    await world.call(CloseSession(session=first))
    assert (await world.call(GetStatus())).apps == ("tcp://127.0.0.1:98",)


@story
async def test_a_clients_key_gets_nothing_from_a_controller(world):
    await world.put("f/a")
    operation = world.operation()
    requests = (
        Ping(),
        List(),
        Find(pattern="*"),
        Describe(name="f/a"),
        Remove(name="f/a", operation=operation),
        Rename(source="f/a", target="f/b", operation=operation),
        GetStatus(),
    )
    async with (
        world.network.transport("client", Role.CLIENT) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        for request in requests:
            with pytest.raises(NotAuthorised):
                await connections.call(world.address, request, timeout_s=30)
    async with (
        world.network.transport("app", Role.APP) as transport,
        open_connections(transport, terms=Terms()) as connections,
    ):
        for request in requests:
            if type(request) is not Rename:
                await connections.call(world.address, request, timeout_s=30)


@story
async def test_the_map_comes_only_when_it_changed(world):
    opened = await world.open()
    kept = KeepSession(session=world.session, floor=1, map_version=opened.map.version)
    assert (await world.call(kept)).map is None
    await world.announce(4)
    fresh = (await world.call(kept)).map
    assert len(fresh.pools) == 4
    assert fresh.version > opened.map.version


@story
async def test_a_session_lives_by_its_lease(world):
    keep = KeepSession(session=world.session, floor=1, map_version=0)
    for _ in range(5):
        await trio.sleep(40)
        await world.call(keep)
    late = world.commit("f/a")
    await trio.sleep(70)
    with pytest.raises(SessionClosed):
        await world.call(keep)
    with pytest.raises(SessionClosed):
        await world.call(late)


@story
async def test_a_session_that_is_closed_is_over_at_once(world):
    late = world.commit("f/a")
    await world.call(CloseSession(session=world.session))
    with pytest.raises(SessionClosed):
        await world.call(late)


@story
async def test_what_a_pool_holds_is_compared_with_the_records_both_ways(world):
    await world.put("f/a")
    await world.put("f/b")
    (first,), (second,) = [(await world.call(Lookup(name=name))).extents for name in ("f/a", "f/b")]
    compare = Reconcile(number=2, boot_id=world.pools[2])
    held = [Holding(first.id, 1, 3), Holding(first.id, 2, 4)]
    page = await world.call(compare, [pack_held(held)])
    assert (page.absent, page.drop, page.upto) == ((), (held[1],), first.id)
    rest = await world.call(replace(compare, after=first.id, last=True))
    assert [(shard.extent, shard.shard) for shard in rest.absent] == [(second.id, 1)]
    assert rest.upto is None


@story
async def test_holdings_that_are_not_in_order_are_refused(world):
    compare = Reconcile(number=1, boot_id=world.pools[1])
    held = [Holding(ExtentId(world.session, counter), 0, 3) for counter in (1, 2)]
    with pytest.raises(InvalidRequest, match="order"):
        await world.call(compare, [pack_held(reversed(held))])
    with pytest.raises(InvalidRequest, match="41 bytes"):
        await world.call(compare, [pack_held(held)[:-1]])
    with pytest.raises(InvalidRequest, match="behind"):
        await world.call(replace(compare, after=held[0].extent), [pack_held(held)])


@story
async def test_pools_are_nudged_to_drop_garbage_and_confirm_it(world):
    await world.put("f/a")
    (extent,) = (await world.call(Lookup(name="f/a"))).extents
    shard = Holding(extent.id, 0, 3)
    await world.remove("f/a")
    assert not (await world.beat(1)).review
    assert (await world.call(Review(number=1, holdings=(shard,)))).drop == ()
    await trio.sleep(130)
    assert (await world.beat(1)).review
    assert (await world.call(ListGarbage(number=1))).extents == (extent.id,)
    verdicts = await world.call(Review(number=1, holdings=(shard,)))
    assert verdicts.drop == (shard,)
    assert verdicts.term == 1
    await world.call(ConfirmDropped(number=1, extents=(extent.id,)))
    assert not (await world.beat(1)).review
    assert (await world.beat(2)).review
    with pytest.raises(NotFound):
        await world.call(ListGarbage(number=77))


@story
async def test_outcomes_are_forgotten_below_the_floor(world):
    for i in range(5):
        await world.put(f"f/{i}")
    await world.call(KeepSession(session=world.session, floor=world.counter + 1, map_version=0))
    await trio.sleep(10)
    assert await world.engine.range(b"o/", b"o0", 10) == []


@story
async def test_a_heartbeat_after_a_restart_asks_for_an_announcement(world):
    world.pools[1] = b"x" * 16
    with pytest.raises(NotFound):
        await world.beat(1)


@story
async def test_a_controller_that_hears_of_a_later_term_is_no_master_any_more(world):
    world.terms.observe(7)
    with pytest.raises(NotMaster):
        await world.call(Lookup(name="f/a"))
    assert (await world.call(Ping())).term == 1


def test_the_role_ends_when_a_later_term_is_seen():
    async def main():
        runtime = Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=run_inline)
        network = MemoryNetwork(runtime.entropy)

        async def serve(task_status):
            async with network.transport("controller", Role.CONTROLLER) as transport:
                with pytest.raises(NotMaster, match="master of term 1; there is a later one"):
                    await serve_controller(
                        transport=transport,
                        address="tcp://127.0.0.1:0",
                        group=SoleGroup(SimulatedEngine(runtime)),
                        runtime=runtime,
                        settings=SETTINGS,
                        task_status=task_status,
                    )

        async with (
            network.transport("pool", Role.POOL) as transport,
            open_connections(transport, terms=Terms(7)) as connections,
        ):
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    address = await nursery.start(serve)
                    await connections.call(address, Ping(), timeout_s=30)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_new_master_keeps_pools_and_sessions_and_begins_a_term():
    async def main():
        disk = SimulatedDisk()
        async with controller(disk) as world:
            for index in (1, 2, 3):
                welcomed = await world.announce(index)
            await world.open()
            await world.put("f/a")
            pools, session, counter = world.pools, world.session, world.counter
        async with controller(disk) as world:
            world.pools, world.session, world.counter = pools, session, counter
            status = (await world.call(GetStatus())).status
            assert status.term == 2
            assert [pool.state for pool in status.pools] == ["down"] * 3
            assert "started" in status.warnings[0]
            await world.beat(2)  # The start that announced itself last needs no new announcement.
            again = await world.announce(3, boot=2, previous_boot_id=bytes([1]) * 16)
            assert (again.number, again.cluster_id) == (3, welcomed.cluster_id)
            status = (await world.call(GetStatus())).status
            assert [pool.state for pool in status.pools] == ["down", "up", "up"]
            await trio.sleep(50)  # A whole lease again.
            await world.put("f/b")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_announcements_of_one_new_pool_at_the_same_time_make_one_record():
    async def main():
        async with controller() as world, trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(world.announce, 1)
        assert list(world.pools) == [1]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_role_ends_when_another_master_takes_the_catalogue_over():
    async def main():
        async with controller() as world:
            await world.open()
            rival = world.engine
            (term,) = await rival.get([b"m/term"])
            await rival.txn([], [(b"m/term", term.value)])
            with pytest.raises(NotMaster):
                await world.open()
            await trio.sleep(20)

    with pytest.raises(BaseExceptionGroup) as ended:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert ended.group_contains(NotMaster)


def test_apps_keep_their_map_until_a_new_master_has_heard_of_the_pools():
    async def main():
        disk = SimulatedDisk()
        async with controller(disk) as world:
            for index in (1, 2, 3):
                await world.announce(index)
            opened = await world.open()
            pools, session = world.pools, world.session
        async with controller(disk) as world:
            world.pools = pools
            keep = KeepSession(session=session, floor=1, map_version=opened.map.version)
            assert (await world.call(keep)).map is None
            for number in (1, 2):
                await world.beat(number)
            assert (await world.call(keep)).map is None
            await world.beat(3)
            told = (await world.call(keep)).map
            assert [pool.state for pool in told.pools] == ["up"] * 3
        async with controller(disk) as world:
            world.pools = pools
            await world.beat(2)
            assert (await world.call(keep)).map is None
            await trio.sleep(11)
            await world.beat(2)
            told = (await world.call(keep)).map
            assert [pool.state for pool in told.pools] == ["down", "up", "down"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# -- other controllers -----------------------------------------------------------------------------


def join(**fields):
    given = {
        "name": "second",
        "address": "tcp://127.0.0.1:7799",
        "boot_id": bytes(16),
        "cluster_id": b"",
    }
    return JoinController(**(given | fields))


@story
async def test_a_controller_that_joins_learns_what_a_standby_needs(world):
    joined = await world.call(join())
    status = (await world.call(GetStatus())).status
    assert joined.cluster_id == status.cluster_id
    assert joined.term == status.term
    group = await world.call(DescribeGroup())
    assert (group.engine, group.endpoints, group.prefix) == ("sqlite", (), "")
    assert (group.cluster_id, group.master) == (joined.cluster_id, world.address)
    assert joined.pools == len(status.pools)
    assert joined.controllers == (world.address, "tcp://127.0.0.1:7799")
    assert status.controllers == joined.controllers
    again = await world.call(join(address="tcp://127.0.0.1:7798"))  # It came back elsewhere.
    assert again.controllers == (world.address, "tcp://127.0.0.1:7798")


@story
async def test_a_controller_of_another_cluster_or_with_the_masters_address_is_refused(world):
    with pytest.raises(IdentityError, match="another cluster"):
        await world.call(join(cluster_id=b"\x07" * 16))
    with pytest.raises(IdentityError, match="this master itself"):
        await world.call(join(address=world.address))
    with pytest.raises(Conflict, match="another name"):
        await world.call(join(name="master"))
    assert (await world.call(GetStatus())).status.controllers == (world.address,)


@story
async def test_a_controller_that_does_not_answer_is_told_of_and_can_be_forgotten(world):
    await world.call(join())
    listed = await world.call(ListControllers())
    assert listed.master == world.address
    assert [(one.name, one.role) for one in listed.controllers] == [
        ("master", "master"),
        ("second", "unreachable"),
    ]
    assert listed.controllers[0].revision == world.engine.revision
    with pytest.raises(NotFound, match="master, second"):
        await world.call(RemoveController(name="third"))
    with pytest.raises(Conflict, match="stop it"):
        await world.call(RemoveController(name="master"))
    await world.call(RemoveController(name="second"))
    assert [one.name for one in (await world.call(ListControllers())).controllers] == ["master"]


@story
async def test_a_master_of_another_cluster_is_not_listened_to(world):
    word = TellMaster(cluster_id=b"\x07" * 16, address="tcp://127.0.0.1:1", controllers=())
    with pytest.raises(IdentityError):
        await world.call(word)


# -- the end of a mastership -----------------------------------------------------------------------


def test_several_tasks_that_meet_a_failed_engine_at_once_are_one_reason_to_stand_by():
    failed, deposed = CatalogError("gone"), NotMaster("another")
    assert why_it_ended(failed) is failed
    assert why_it_ended(ExceptionGroup("", [failed, ExceptionGroup("", [deposed])])) is failed
    assert why_it_ended(ExceptionGroup("", [deposed, failed])) is deposed
    assert why_it_ended(ExceptionGroup("", [failed, ValueError("a bug")])) is None
    assert why_it_ended(ValueError("a bug")) is None


@pytest.mark.parametrize(("alone", "error"), [(True, CatalogError), (False, NotMaster)])
def test_a_look_up_at_a_catalogue_that_failed_leads_to_another_controller_if_there_is_one(alone, error):
    def look_up(_call, _request, _body, _respond):
        raise CatalogError("gone")

    group = SoleGroup(
        SimulatedEngine(Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=None))
    )
    group.alone = alone
    front = Front(
        group=group,
        name="c",
        boot_id=bytes(16),
        kinds=(),
        quick=(Lookup,),
        terms=Terms(),
        clock=MockedClock(),
    )
    front.leads(
        Mastership(
            cluster_id=bytes(16),
            term=1,
            handlers={},
            quick={Lookup: look_up},
            failed=lambda: True,
            mandate=Undivided(),
        )
    )
    with pytest.raises(error, match="gone"):
        front.pass_on_now(None, Lookup(name="f/a"), (), None)
