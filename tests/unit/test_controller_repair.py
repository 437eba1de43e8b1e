"""Which shard is rebuilt next, by whom, and what becomes of orders that are not carried out."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.model import (
    MISSING,
    Extent,
    ExtentId,
    Layout,
    Membership,
    OperationId,
    Version,
    VersionId,
)
from droppexd.placement import Placement
from droppexd.roles import controller_repair
from droppexd.roles.controller_pools import PoolTable
from droppexd.roles.controller_repair import BACK_OFF_S, LEASE_S, PLANNED, STRAYS_S, Repair
from droppexd.wire.messages import Announce, ExpectedShard, Heartbeat, TakeWork

POOLS = 8


class Master:
    """A catalogue, pools that are up, and the planner at work."""

    def __init__(self, catalogue, pools, repair):
        self.catalogue = catalogue
        self.pools = pools
        self.repair = repair
        self.session = 0
        self.counter = 0

    async def put(self, pools, *, layout="4+2", size=1000):
        version, extent = VersionId(self.session, self.counter + 1), ExtentId(self.session, self.counter + 2)
        operation = OperationId(self.session, self.counter + 3)
        self.counter += 3
        whole = Layout.parse(layout)
        made = Extent(id=extent, layout=whole, size=size, chunk_size=4096, pools=pools)
        await self.catalogue.commit(
            operation,
            f"f/{self.counter}",
            Expected(),
            Version(id=version, size=size, blake3=bytes(32), extents=(extent,)),
            [made],
        )
        return extent

    def take(self, pool, *, room=256, running=(), failed=()):
        request = TakeWork(
            number=pool, boot_id=bytes([pool]) * 16, room=room, running=tuple(running), failed=tuple(failed)
        )
        orders, addresses = self.repair.take(request)
        return list(orders), addresses

    def take_all(self, *, room=256):
        return {
            pool: [order.extent.id for order in self.take(pool, room=room)[0]] for pool in range(1, POOLS + 1)
        }

    async def store(self, pool, orders):
        places = [ExpectedShard(order.extent.id, order.shard, order.extent.edition) for order in orders]
        refused = await self.catalogue.place_shards(pool, bytes([pool]) * 16, places)
        self.repair.recorded(pool, places, [ExpectedShard(*place) for place in refused])
        return refused

    async def carry_out(self):
        """Have the pools do what there is to do at this moment."""
        for pool in range(1, POOLS + 1):
            orders, _ = self.take(pool)
            assert await self.store(pool, orders) == []

    async def decide(self, pool, membership):
        record = replace(self.pools.known(pool), membership=membership.value)
        self.pools.decide(await self.catalogue.save_pool(record))
        self.repair.look_afresh()

    def beat(self, pool, **fields):
        said = {"capacity": 2**40, "free": 2**40, "shards": 0, "read_only": False}
        self.pools.heartbeat(
            Heartbeat(number=pool, boot_id=bytes([pool]) * 16, **(said | fields)), trio.current_time()
        )


def announce(number):
    return Announce(
        pool_id=bytes([number]) * 16,
        cluster_id=b"",
        boot_id=bytes([number]) * 16,
        previous_boot_id=b"",
        name=f"pool-{number}",
        machine=f"machine-{number}",
        zone="",
        address=f"tcp://127.0.0.1:{number}",
        capacity=2**40,
        free=2**40,
        shards=0,
        read_only=False,
    )


def table(records):
    return PoolTable(
        records,
        cluster_id=bytes(16),
        incarnation=bytes(16),
        term=1,
        heartbeat_s=2.0,
        down_after_s=10.0,
        replace_after_s=60.0,
        began=trio.current_time(),
    )


@asynccontextmanager
async def open_master(stage):
    runtime = stage.runtime
    async with open_catalogue(SimulatedEngine(runtime), runtime) as catalogue, trio.open_nursery() as nursery:
        pools = table({})
        for number in range(1, POOLS + 1):
            said = announce(number)
            record = await catalogue.save_pool(pools.judge(said, trio.current_time(), 1))
            pools.enter(record, said, trio.current_time())
        repair = Repair(catalogue, pools, runtime.clock)
        nursery.start_soon(repair.run)
        master = Master(catalogue, pools, repair)
        master.session = await catalogue.open_session("tcp://127.0.0.1:99", bytes(16))
        yield master
        nursery.cancel_scope.cancel()


@pytest.fixture
def story(play):
    def run(body):
        async def on_stage(stage):
            async with open_master(stage) as master:
                await body(master)

        play(on_stage)

    return run


def test_a_missing_shard_goes_to_a_pool_that_has_none_of_the_extent(story):
    async def body(master):
        extent = await master.put((1, 2, 3, MISSING, 5, 6))
        await trio.sleep(5)
        taken = {pool: orders for pool, orders in master.take_all().items() if orders}
        assert list(taken.values()) == [[extent]]
        assert set(taken) <= {4, 7, 8}
        assert master.repair.status().left == 1

    story(body)


def test_the_most_endangered_come_first_and_one_shard_of_each_at_a_time(story):
    async def body(master):
        one = [await master.put((1, 2, 3, 4, 5, MISSING)) for _ in range(5)]
        two = [await master.put((1, 2, 3, 4, 5, MISSING)) for _ in range(5)]
        await master.catalogue.lose_shards(1, [(extent, 0, False) for extent in two])
        await trio.sleep(5)
        queued = [list(queue) for queue in master.repair._queued.values()]
        for queue in queued:
            at = [extent in two for extent in queue]
            assert at == sorted(at, reverse=True)
        assert sorted(extent for queue in queued for extent in queue) == sorted([*one, *two])

    story(body)


def test_what_is_stored_is_recorded_and_the_next_shard_of_the_extent_planned(story):
    async def body(master):
        extent = await master.put((1, 2, 3, 4, 5, MISSING))
        await master.catalogue.lose_shards(1, [(extent, 0, False)])
        rebuilt = []
        for _ in range(3):
            await trio.sleep(5)
            for pool in range(1, POOLS + 1):
                orders, addresses = master.take(pool)
                assert {address.number for address in addresses} <= {1, 2, 3, 4, 5, 6, 7, 8} - {pool}
                assert await master.store(pool, orders) == []
                rebuilt += [order.shard for order in orders if MISSING in order.extent.pools]
        assert sorted(rebuilt) == [0, 5]
        assert master.repair.status().left == 0
        assert await master.catalogue.degraded(None, 10) == []

    story(body)


def test_orders_that_a_pool_does_not_name_any_more_are_handed_out_anew(story):
    async def body(master):
        await master.put((1, 2, 3, 4, 5, MISSING))
        await trio.sleep(5)
        (pool,) = [pool for pool, orders in master.take_all().items() if orders]
        assert master.take(pool)[0] == []  # It has forgotten the order: the pool was restarted, say.
        await trio.sleep(5)
        (order,) = master.take(pool)[0]
        await trio.sleep(LEASE_S / 2)
        assert master.take(pool, running=[order.extent.id])[0] == []
        await trio.sleep(LEASE_S - 5)
        assert master.repair.status().running == 1
        await trio.sleep(LEASE_S)
        assert master.repair.status().running == 0
        assert master.repair.has_work(pool)

    story(body)


def test_an_order_that_failed_rests_for_a_while(story):
    async def body(master):
        extent = await master.put((1, 2, 3, 4, 5, MISSING))
        await trio.sleep(5)
        (pool,) = [pool for pool, orders in master.take_all().items() if orders]
        master.take(pool, failed=[extent])
        await trio.sleep(BACK_OFF_S - 3)
        assert not any(master.take_all().values())
        await trio.sleep(10)
        assert any(master.take_all().values())

    story(body)


def test_what_a_pool_that_went_down_was_to_do_is_for_others(story):
    async def body(master):
        extent = await master.put((1, 2, 3, 4, 5, MISSING))
        await trio.sleep(5)
        (pool,) = [pool for pool, orders in master.take_all().items() if orders]
        for _ in range(8):
            await trio.sleep(2)
            for other in range(1, POOLS + 1):
                if other != pool:
                    master.beat(other)
            for record in master.pools.expire(trio.current_time()):
                master.repair.pool_is_gone(record.number)
        taken = {other: orders for other, orders in master.take_all().items() if orders}
        assert pool not in taken
        assert list(taken.values()) == [[extent]]

    story(body)


def test_what_a_pool_was_to_do_that_takes_no_more_writes_is_for_others_at_once(story, monkeypatch):
    monkeypatch.setattr(controller_repair, "PLAN_AGAIN", 4)
    monkeypatch.setattr(controller_repair, "PAGE", 4)

    async def body(master):
        for pool in (7, 8):
            master.beat(pool, free=0)
        for _ in range(12):
            await master.put((1, 2, 3, 4, 5, MISSING))
        master.repair.look_afresh()
        await trio.sleep(5)
        taken, _ = master.take(6, room=2)
        assert len(taken) == 2
        assert master.repair.has_work(6)
        master.beat(6, read_only=True)
        master.beat(7)
        await trio.sleep(5)
        assert not master.repair.has_work(6)
        assert master.take(6, room=0)[0] == []
        await trio.sleep(5)
        first, _ = master.take(7, room=4)
        assert {order.extent.id for order in taken} <= {order.extent.id for order in first}
        while first:
            await master.store(7, first)
            await trio.sleep(5)
            first, _ = master.take(7)
        assert master.repair.status().left == 0

    story(body)


def test_without_a_pool_to_go_to_or_shards_to_read_it_is_stuck_and_says_so(story):
    async def body(master):
        await master.put((1, 2, 3, 4, 5, MISSING))
        unreadable = await master.put((1, 2, 3, 4, 5, 6))
        for pool in (1, 2, 3):
            await master.catalogue.lose_shards(pool, [(unreadable, pool - 1, False)])
        for pool in (6, 7, 8):
            master.beat(pool, free=0)
        master.repair.look_afresh()
        await trio.sleep(5)
        status = master.repair.status()
        assert (status.left, status.stuck) == (4, 2)
        assert not any(master.take_all().values())
        master.beat(7)
        master.repair.look_afresh()
        await trio.sleep(5)
        assert [pool for pool, orders in master.take_all().items() if orders] == [7]
        assert master.repair.status().stuck == 1

    story(body)


def test_shards_on_a_failed_disk_move_when_nothing_is_missing(story):
    async def body(master):
        missing = await master.put((1, 2, 3, 4, 5, MISSING))
        there = await master.put((1, 2, 3, 4, 5, 6))
        elsewhere = await master.put((2, 3, 4, 5, 6, 7))
        master.beat(1, read_only=True)
        master.repair.look_afresh()
        await trio.sleep(5)
        moved = []
        for _ in range(4):
            for pool in range(1, POOLS + 1):
                orders, _ = master.take(pool)
                assert await master.store(pool, orders) == []
                moved += [
                    (order.extent.id, order.shard)
                    for order in orders
                    if order.extent.pools[order.shard] in (MISSING, 1)  # Others come home after that.
                ]
            await trio.sleep(5)
        assert moved == [(missing, 5), (missing, 0), (there, 0)] or moved == [
            (missing, 5),
            (there, 0),
            (missing, 0),
        ]
        assert master.catalogue.places(1) == 0
        assert elsewhere
        assert master.repair.status().moving == 0

    story(body)


def test_shards_come_back_to_a_pool_that_is_taken_back_as_soon_as_it_is_empty(story):
    async def body(master):
        placement = Placement(master.pools.map().pools)
        for _ in range(20):
            extent = ExtentId(master.session, master.counter + 2)
            await master.put(placement.order(extent, Layout(4, 2))[:6])
        master.repair.look_afresh()
        await trio.sleep(5)
        assert master.repair.status().balanced
        held = master.catalogue.places(1)
        await master.decide(1, Membership.DRAINING)
        while master.catalogue.places(1):
            await trio.sleep(0.1)
            await master.carry_out()
        await master.decide(1, Membership.MEMBER)
        assert not master.repair.status().balanced
        while not master.repair.status().balanced:
            await trio.sleep(0.1)
            await master.carry_out()
        assert held
        assert master.catalogue.places(1) == held

    story(body)


def test_a_new_master_leaves_alone_what_is_on_a_pool_that_it_has_not_heard_of(story):
    """A machine died with the former master: its pool weighs what it did until it is out."""

    async def body(master):
        placement = Placement(master.pools.map().pools)
        for _ in range(40):
            extent = ExtentId(master.session, master.counter + 2)
            await master.put(placement.order(extent, Layout(4, 2))[:6])
        pools = table(dict(master.catalogue.pools))
        async with trio.open_nursery() as nursery:
            new = Master(master.catalogue, pools, Repair(master.catalogue, pools, master.repair._clock))
            nursery.start_soon(new.repair.run)
            for pool in range(2, POOLS + 1):
                new.beat(pool)
            await trio.sleep(5)
            assert not any(new.take_all().values())
            assert new.repair.status().balanced
            nursery.cancel_scope.cancel()

    story(body)


def test_a_move_that_failed_is_made_later_though_nothing_else_is_misplaced(story):
    async def body(master):
        extent = ExtentId(master.session, master.counter + 2)
        placed = Placement(master.pools.map().pools).order(extent, Layout(4, 2))
        await put_while_one_was_away(master, placed)
        await trio.sleep(1)
        assert master.repair.status().balancing == 1
        assert len(master.take(placed[5])[0]) == 1
        master.take(placed[5], failed=[extent])
        await trio.sleep(5)
        assert not master.repair.status().balanced
        await trio.sleep(BACK_OFF_S)
        await master.carry_out()
        await trio.sleep(5)
        assert master.catalogue.places(placed[5]) == 1
        assert master.repair.status().balanced

    story(body)


def test_nothing_moves_while_too_few_of_its_shards_can_be_read(story):
    async def body(master):
        extent = ExtentId(master.session, master.counter + 2)
        placed = Placement(master.pools.map().pools).order(extent, Layout(4, 2))
        silent = {placed[0], placed[1], placed[6]}
        await silence(master, silent)
        await put_while_one_was_away(master, placed)
        await trio.sleep(5)
        assert not any(master.take_all().values())
        assert not master.repair.status().balanced
        for pool in silent:
            master.pools.enter(master.pools.known(pool), announce(pool), trio.current_time())
        await trio.sleep(5)
        await master.carry_out()
        await trio.sleep(5)
        assert master.repair.status().balanced

    story(body)


@pytest.mark.parametrize("known", [0, 1, 100])
def test_shards_come_home_to_a_pool_that_was_down_when_they_were_put(story, monkeypatch, known):
    """With fewer that can be known of than there are, all extents are looked through."""
    monkeypatch.setattr(controller_repair, "STRAYS", known)

    async def body(master):
        await trio.sleep(5)
        assert master.repair.status().balanced
        placement = Placement(master.pools.map().pools)
        await silence(master, {1})
        astray = 0
        for _ in range(20):
            extent = ExtentId(master.session, master.counter + 2)
            order = placement.order(extent, Layout(4, 2))
            pools = [pool if pool != 1 else order[6] for pool in order[:6]]
            astray += 1 in order[:6]
            await master.put(tuple(pools))
        assert astray > 2
        await silence(master, {1})
        assert not any(master.take_all().values())
        assert master.repair.status().balanced  # As far as it can be, with that pool.
        master.pools.enter(master.pools.known(1), announce(1), trio.current_time())
        await trio.sleep(2.5)
        assert not master.repair.status().balanced
        while not master.repair.status().balanced:
            await trio.sleep(0.5)
            await master.carry_out()
        assert master.catalogue.places(1) == astray

    story(body)


def test_more_strays_than_can_be_remembered_come_home_though_no_pool_came_or_went(story, monkeypatch):
    monkeypatch.setattr(controller_repair, "STRAYS", 4)

    async def body(master):
        await trio.sleep(5)
        placement = Placement(master.pools.map().pools)
        for _ in range(20):  # An app found a pool slow that the master knows to be up.
            order = placement.order(ExtentId(master.session, master.counter + 2), Layout(4, 2))
            await master.put((*order[1:6], order[6]))
        for _ in range(60):
            await trio.sleep(0.5)
            await master.carry_out()
        assert master.repair.status().balanced
        for extent in await master.catalogue.extents(None, 100):
            assert placement.lacking(extent.id, extent.layout, extent.pools) == []

    story(body)


def test_shards_come_home_when_there_is_room_for_them(story):
    async def body(master):
        await trio.sleep(5)
        extent = ExtentId(master.session, master.counter + 2)
        order = Placement(master.pools.map().pools).order(extent, Layout(4, 2))
        master.beat(order[0], free=10)
        await master.put((*order[1:6], order[6]))
        await trio.sleep(10)
        assert master.repair.status().balanced
        master.beat(order[0])
        await trio.sleep(STRAYS_S + 5)
        await master.carry_out()
        assert master.catalogue.places(order[0]) == 1

    story(body)


async def put_while_one_was_away(master, placed):
    """Put an extent that has a shard on the pool behind its set, because one of the set was not there."""
    await master.decide(placed[5], Membership.DRAINING)
    await trio.sleep(1)
    assert master.repair.status().balanced
    await master.put((*placed[:5], placed[6]))
    await master.decide(placed[5], Membership.MEMBER)


async def silence(master, pools):
    """Let these pools be down, and the others live on."""
    for _ in range(6):
        await trio.sleep(2.5)
        for pool in set(range(1, POOLS + 1)) - pools:
            master.beat(pool)
        for record in master.pools.expire(trio.current_time()):
            master.repair.pool_is_gone(record.number)


def test_pools_that_idle_are_told_of_their_first_order(story):
    async def body(master):
        told = []

        async def listen():
            while True:
                told.extend(await master.repair.idle_with_work())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for _ in range(3):
                await master.put((1, 2, 3, 4, 5, MISSING))
            master.repair.look_afresh()
            await trio.sleep(0.5)
            given = {f"tcp://127.0.0.1:{pool}" for pool, orders in master.take_all(room=1).items() if orders}
            assert sorted(told) == sorted(given)
            for missing in range(6):
                await master.put(tuple(MISSING if at == missing else at + 1 for at in range(6)))
            told.clear()
            master.repair.look_afresh()
            await trio.sleep(0.5)
            assert told
            assert given.isdisjoint(told)  # Those that have something in work ask by themselves.
            nursery.cancel_scope.cancel()

    story(body)


def test_what_is_planned_is_bounded(story):
    async def body(master):
        for _ in range(PLANNED // 2 + 600):
            await master.put((1, MISSING, 2), layout="1+2", size=100)
        await trio.sleep(30)
        assert len(master.repair._planned) <= PLANNED
        rebuilt = 0
        for _ in range(100):
            for pool in range(1, POOLS + 1):
                orders, _ = master.take(pool)
                await master.store(pool, orders)
                rebuilt += sum(MISSING in order.extent.pools for order in orders)
            await trio.sleep(1)
            if not master.repair.status().left:
                break
        assert rebuilt == PLANNED // 2 + 600

    story(body)
