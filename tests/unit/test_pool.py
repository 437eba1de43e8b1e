"""The pool and its master: announced until it is heard, alive while it is busy, and what it drops."""

from contextlib import contextmanager
from functools import partial
from itertools import groupby, pairwise

import pytest
import trio

from droppexd.coding import piece_checksum
from droppexd.errors import CatalogError, IdentityError, NotFound, StoreError
from droppexd.held import holding_of, unpack_held
from droppexd.model import MAX_TROUBLE, ExtentId, Holding, Layout, Role, ShardHeader, VersionId
from droppexd.roles import pool_reconcile
from droppexd.roles.pool import PoolSettings, serve_pool
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.messages import (
    AbortShard,
    Announce,
    ConfirmDropped,
    Done,
    ExpectedShard,
    GarbagePage,
    Heard,
    Heartbeat,
    ListGarbage,
    LostShard,
    Ping,
    ReadPiece,
    Reconcile,
    Reconciled,
    Recorded,
    ReportLost,
    Review,
    ShardsStored,
    Verdicts,
    Welcomed,
)

HEARTBEAT_S = 1.0


class Master:
    """Hears pools, and knows what is dead."""

    def __init__(self):
        self.announced = []
        self.refuse = []
        self.refuse_heartbeats = []
        self.heard_at = []
        self.dead = []
        self.confirmed = []
        self.reviewed = []
        self.moved = []
        """What is dead and no garbage: another pool has it on record."""
        self.left_over = []
        """What the pool is told once to ask about."""
        self.compared = []
        self.refuse_comparisons = []
        self.fail_comparison_after = None
        self.most_in_time = 1000
        self.verdicts = []
        self.lost = []
        self.stored = []
        self.reconciled = []
        self.states = []
        self.review_s = 0.0
        self.term = 1

    def handlers(self):
        return {
            Announce: self.announce,
            Heartbeat: self.heartbeat,
            ListGarbage: self.list_garbage,
            Review: self.review,
            ConfirmDropped: self.confirm,
            Reconcile: self.reconcile,
            ReportLost: self.report_lost,
            ShardsStored: self.shards_stored,
        }

    async def reconcile(self, _call, request, body):
        held = [holding_of(*one) for one in unpack_held(b"".join(body), request.after).items()]
        self.compared.append((held, request))
        if len(self.compared) - 1 == self.fail_comparison_after:
            raise CatalogError("not now")
        if len(held) > self.most_in_time:
            await trio.sleep_forever()
        if self.refuse_comparisons:
            raise self.refuse_comparisons.pop(0)
        answer = self.verdicts.pop(0) if self.verdicts else {}
        nothing = {"absent": (), "wanted": (), "drop": (), "unknown": (), "term": self.term}
        upto = None if request.last else held[-1].extent
        return Reconciled(**(nothing | {"upto": upto} | answer))

    async def report_lost(self, _call, request, _body):
        self.lost += request.shards
        return Done()

    async def shards_stored(self, _call, request, _body):
        self.stored += request.shards
        return Recorded(refused=())

    async def announce(self, _call, request, _body):
        self.announced.append(request)
        if self.refuse:
            raise self.refuse.pop(0)
        return Welcomed(
            number=3,
            cluster_id=bytes(range(16)),
            incarnation=bytes(16),
            term=self.term,
            heartbeat_ms=int(HEARTBEAT_S * 1000),
        )

    async def heartbeat(self, _call, request, _body):
        self.states.append((request.read_only, request.trouble))
        self.reconciled.append((request.reconciled, request.quarantined))
        self.heard_at.append(trio.current_time())
        if self.refuse_heartbeats:
            raise self.refuse_heartbeats.pop(0)
        return Heard(review=bool(self.dead or self.left_over), term=self.term)

    async def list_garbage(self, _call, request, _body):
        if request.after is None and self.left_over:
            page, self.left_over = tuple(self.left_over), []
            return GarbagePage(extents=page)
        later = [extent for extent in self.dead if request.after is None or extent > request.after]
        return GarbagePage(extents=tuple(sorted(later)[:2]))

    async def review(self, _call, request, _body):
        await trio.sleep(self.review_s)
        self.reviewed += request.holdings
        dead = (*self.dead, *self.moved)
        drop = tuple(holding for holding in request.holdings if holding.extent in dead)
        stranger = Holding(ExtentId(9, 9), 0, 1)
        return Verdicts(drop=(*drop, stranger), term=self.term)

    async def confirm(self, _call, request, _body):
        self.confirmed += request.extents
        self.dead = [extent for extent in self.dead if extent not in request.extents]
        return Done()


class Scene:
    def __init__(self, stage):
        self.stage = stage
        self.master = Master()
        self.disk = SimulatedDisk()
        self.store = SimulatedStore(self.disk, entropy=stage.runtime.entropy)
        self.address = ""

    async def open(self):
        controller = await self.stage.serve("controller", self.master.handlers(), role=Role.CONTROLLER)
        transport = await self.stage.transport("pool", Role.POOL)
        self.address = await self.stage.nursery.start(
            partial(
                serve_pool,
                transport=transport,
                address="tcp://127.0.0.1:0",
                store=self.store,
                controllers=[controller],
                runtime=self.stage.runtime,
                settings=PoolSettings(name="pool", machine="m", review_s=600.0),
            )
        )
        return self

    def hold(self, counter, index=0):
        extent, layout, piece = ExtentId(1, counter), Layout(1, 7 if index else 1), b"content"
        header = ShardHeader(
            incarnation=bytes(16),
            extent=extent,
            index=index,
            layout=layout,
            size=len(piece),
            chunk_size=1000,
            checksums=(piece_checksum(extent, layout, index, 0, piece),),
            version=VersionId(1, 1),
        )
        assert self.store.put_small([(header, piece)])
        return extent


@pytest.fixture
def scene(play):
    def run(body, prepare=lambda one: None):
        async def story(stage):
            one = Scene(stage)
            prepare(one)
            await body(await one.open())

        play(story)

    return run


def test_a_pool_says_who_it_is_until_a_master_takes_it(scene):
    def prepare(one):
        one.master.refuse = [CatalogError("the disk is full")] * 3

    async def body(one):
        assert len(one.master.announced) == 4
        assert len({request.boot_id for request in one.master.announced}) == 1
        assert one.store.identity.cluster_id == bytes(range(16))
        connections = await one.stage.connections("app")
        pong, _ = await connections.call(one.address, Ping(), timeout_s=5)
        assert (pong.role, pong.name) == ("pool", "pool")

    scene(body, prepare)


@contextmanager
def catch_leaf(caught):
    """Note the one error that a group holds, or that comes as it is."""
    try:
        yield
    except* IdentityError as group:
        leaf = group
        while isinstance(leaf, BaseExceptionGroup):
            (leaf,) = leaf.exceptions
        caught.append(leaf)


def test_a_pool_of_another_cluster_does_not_start(play):
    async def story(stage):
        one = Scene(stage)
        one.master.refuse = [IdentityError("another cluster")]
        refused = []
        with catch_leaf(refused):
            await one.open()
        assert [type(error) for error in refused] == [IdentityError]

    play(story)


@pytest.mark.parametrize("error", [NotFound("who?"), IdentityError("not this boot"), CatalogError("full")])
def test_a_pool_outlives_what_the_master_says_to_a_heartbeat(scene, error):
    async def body(one):
        one.master.refuse_heartbeats = [error]
        await trio.sleep(10)
        assert len(one.master.announced) == (1 if isinstance(error, CatalogError) else 2)
        assert len(one.master.heard_at) >= 8

    scene(body)


def test_a_disk_that_cannot_tell_its_room_does_not_end_the_pool(scene):
    async def body(one):
        usage = one.store.usage
        failed = []

        def fail():
            failed.append(1)
            raise StoreError("cannot tell how full the disk is")

        one.store.usage = fail
        await trio.sleep(5)
        assert failed
        one.store.usage = usage
        heard = len(one.master.heard_at)
        await trio.sleep(5)
        assert len(one.master.heard_at) > heard

    scene(body)


def test_why_the_store_takes_no_more_writes_is_told_to_the_master_and_logged_once(scene, caplog):
    async def body(one):
        await trio.sleep(2)
        one.store.distrust("reading back failed " + "x" * 1000)
        await trio.sleep(5)
        assert one.master.states[0] == (False, "")
        assert one.master.states[-1] == (True, one.store.read_only[:MAX_TROUBLE])
        said = [line for line in caplog.messages if "takes no more writes" in line]
        assert said == [f"this pool takes no more writes: {one.store.read_only}"]

    scene(body)


def test_dead_shards_are_dropped_page_by_page_and_confirmed(scene):
    async def body(one):
        held = [one.hold(counter) for counter in range(1, 8)]
        one.master.dead = [*held[:5], ExtentId(2, 1)]
        await trio.sleep(5)
        assert sorted(one.master.confirmed) == sorted([*held[:5], ExtentId(2, 1)])
        assert [holding.extent for holding in one.store.page(None, 100)] == held[5:]

    scene(body)


def test_a_long_look_through_the_garbage_does_not_silence_the_pool(scene):
    async def body(one):
        one.master.dead = [one.hold(counter) for counter in range(1, 21)]
        one.master.review_s = 4.0
        await trio.sleep(80)
        assert len(one.master.confirmed) == 20
        gaps = [after - before for before, after in pairwise(one.master.heard_at)]
        assert max(gaps) < 2 * HEARTBEAT_S

    scene(body)


def test_a_shard_in_doubt_is_asked_about_less_and_less_until_it_is_dead(scene):
    async def body(one):
        extent = one.hold(1)
        connections = await one.stage.connections("app")
        await connections.call(one.address, AbortShard(extent=extent, index=0), timeout_s=5)
        await trio.sleep(10)
        assert 3 <= len(one.master.reviewed) <= 10
        await trio.sleep(190)
        assert len(one.master.reviewed) < 30
        one.master.moved = [extent]
        await trio.sleep(60)
        assert not one.store.page(None, 100)
        asked = len(one.master.reviewed)
        await trio.sleep(100)
        assert len(one.master.reviewed) == asked

    scene(body)


def test_a_shard_that_was_moved_and_is_not_dead_yet_is_asked_about_until_it_is(scene):
    """Its extent was deleted after the move: only this pool knows that it has something left."""

    async def body(one):
        extent = one.hold(1)
        one.master.left_over = [extent]
        await trio.sleep(10)
        assert 2 <= len(one.master.reviewed) <= 10
        one.master.moved = [extent]
        await trio.sleep(10)
        assert not one.store.page(None, 100)

    scene(body)


def test_everything_held_is_reviewed_now_and_then(scene):
    async def body(one):
        held = [one.hold(counter) for counter in range(1, 4)]
        await trio.sleep(590)
        assert not one.master.reviewed
        await trio.sleep(20)
        assert [holding.extent for holding in one.master.reviewed] == held

    scene(body)


def test_orders_of_a_master_of_the_past_are_refused(scene):
    async def body(one):
        connections = await one.stage.connections("app")
        extent = one.hold(1)
        one.master.dead = [extent]
        await trio.sleep(0.5)
        connections.observe(7)  # What one peer knows of terms, the others learn from it.
        await connections.call(one.address, Ping(), timeout_s=5)
        await trio.sleep(10)
        assert one.store.find([extent])
        assert not one.master.confirmed
        one.master.term = 7
        await trio.sleep(10)
        assert not one.store.find([extent])

    scene(body)


def test_what_is_held_is_compared_after_each_announcement_until_that_succeeds(scene):
    def prepare(one):
        one.master.refuse_comparisons = [CatalogError("not now")] * 2
        for counter in range(1, 4):
            one.hold(counter)

    async def body(one):
        await trio.sleep(30)
        *refused, (held, first), (held_last, last) = one.master.compared
        assert len(refused) == 2
        assert ([holding.extent.counter for holding in held], first.after, first.last) == (
            [1, 2, 3],
            None,
            False,
        )
        assert (held_last, last.after, last.last) == ([], ExtentId(1, 3), True)
        assert (one.master.reconciled[0][0], one.master.reconciled[-1][0]) == (False, True)
        one.master.refuse_heartbeats = [NotFound("who?")]
        await trio.sleep(30)
        assert len(one.master.compared) == 6

    scene(body, prepare)


def test_a_page_is_as_long_as_an_answer_goes_and_grows_again(scene, monkeypatch):
    monkeypatch.setattr(pool_reconcile, "MOST_HELD", 12)
    monkeypatch.setattr(pool_reconcile, "PAGE_LIMIT", 2)

    def prepare(one):
        for counter in range(1, 41):
            one.hold(counter)
        one.master.verdicts = [{"upto": ExtentId(1, 3)}]

    async def body(one):
        await trio.sleep(30)
        # Of a page whose end may be within an extent, the last extent waits for the next.
        assert [[holding.extent.counter for holding in held] for held, _ in one.master.compared] == [
            list(range(1, 12)),
            [4, 5],
            list(range(6, 11)),
            list(range(11, 22)),
            list(range(22, 33)),
            list(range(33, 41)),
            [],
        ]
        assert [request.after and request.after.counter for _, request in one.master.compared] == [
            None,
            3,
            5,
            10,
            21,
            32,
            40,
        ]
        assert one.master.reconciled[-1][0]

    scene(body, prepare)


def counters(compared):
    return [[holding.extent.counter for holding in held] for held, _ in compared]


def test_a_comparison_that_failed_half_way_goes_on_there_and_counts_nothing_twice(scene, monkeypatch):
    monkeypatch.setattr(pool_reconcile, "MOST_HELD", 5)
    monkeypatch.setattr(pool_reconcile, "PAGE_LIMIT", 2)

    def prepare(one):
        for counter in range(1, 10):
            one.hold(counter)
        found = one.store.page(None, 10)
        one.master.verdicts = [{"unknown": tuple(found[:2])}, {"unknown": tuple(found[4:5])}]

    async def body(one):
        one.master.fail_comparison_after = 1
        await trio.sleep(1)
        assert counters(one.master.compared) == [[1, 2, 3, 4], [5, 6, 7, 8]]
        await trio.sleep(30)
        assert counters(one.master.compared)[2:] == [[5, 6, 7, 8], [9], []]
        assert one.master.reconciled[-1] == (True, 3)

    scene(body, prepare)


def test_an_announcement_begins_a_comparison_that_failed_from_nothing(scene, monkeypatch):
    monkeypatch.setattr(pool_reconcile, "MOST_HELD", 5)
    monkeypatch.setattr(pool_reconcile, "PAGE_LIMIT", 2)

    def prepare(one):
        for counter in range(1, 10):
            one.hold(counter)
        one.master.verdicts = [{"unknown": tuple(one.store.page(None, 2))}]
        one.master.fail_comparison_after = 1

    async def body(one):
        one.master.refuse_heartbeats = [NotFound("who?")]
        await trio.sleep(30)
        assert counters(one.master.compared) == [
            [1, 2, 3, 4],
            [5, 6, 7, 8],
            [1, 2, 3, 4],
            [5, 6, 7, 8],
            [9],
            [],
        ]
        assert one.master.reconciled[-1] == (True, 0)

    scene(body, prepare)


def test_of_what_was_not_answered_in_time_half_is_asked_and_never_less_than_an_answer_takes(
    scene, monkeypatch
):
    monkeypatch.setattr(pool_reconcile, "MOST_HELD", 13)
    monkeypatch.setattr(pool_reconcile, "PAGE_LIMIT", 4)

    def prepare(one):
        for counter in range(1, 17):
            one.hold(counter)
        one.master.most_in_time = 4

    async def body(one):
        await trio.sleep(300)
        asked = [held for held, _ in groupby(counters(one.master.compared))]
        assert asked[:3] == [list(range(1, 13)), list(range(1, 6)), list(range(1, 4))]
        assert one.master.reconciled[-1] == (True, 0)

    scene(body, prepare)


def test_a_page_that_one_extent_fills_is_read_larger(scene, monkeypatch):
    monkeypatch.setattr(pool_reconcile, "MOST_HELD", 2)
    monkeypatch.setattr(pool_reconcile, "PAGE_LIMIT", 2)

    def prepare(one):
        for counter in (1, 2):
            for index in range(7):
                one.hold(counter, index)

    async def body(one):
        await trio.sleep(30)
        asked = [
            [(holding.extent.counter, holding.shard) for holding in held] for held, _ in one.master.compared
        ]
        assert asked == [[(1, index) for index in range(7)], [(2, index) for index in range(7)], []]
        assert one.master.reconciled[-1] == (True, 0)

    scene(body, prepare)


def test_the_verdicts_of_a_comparison_are_carried_out(scene):
    def prepare(one):
        held = [one.hold(counter) for counter in range(1, 6)]
        damaged = held[4]
        one.disk.flip_piece(damaged, 0, 0)
        dead = one.store.find([held[0]])[0]
        after = {
            "absent": (ExpectedShard(held[1], 0, 3),),
            "wanted": (ExpectedShard(held[2], 0, 5), ExpectedShard(damaged, 0, 6)),
            "drop": (dead, dead._replace(extent=held[3], generation=dead.generation)),
            "unknown": tuple(one.store.find([held[3]])),
        }
        # What is lost changes the records: the pool asks again before it does anything else.
        before = after | {
            "absent": (*after["absent"], ExpectedShard(ExtentId(1, 9), 0, 4)),
            "wanted": (ExpectedShard(held[2], 0, 4),),
        }
        one.master.verdicts = [before, after]

    async def body(one):
        await trio.sleep(5)
        # What is there after all is not reported, and what is wanted only when it is whole.
        assert one.master.lost == [LostShard(ExtentId(1, 9), 0, False)]
        assert one.master.stored == [ExpectedShard(ExtentId(1, 3), 0, 5)]
        assert [holding.extent.counter for holding in one.store.page(None, 10)] == [2, 3, 4, 5]
        assert one.master.reconciled[-1] == (True, 1)

    scene(body, prepare)


def test_a_stored_piece_is_served_with_its_checksum(scene):
    async def body(one):
        extent = one.hold(1)
        connections = await one.stage.connections("app")
        request = ReadPiece(extent=extent, index=0, chunk=0)
        reply, (piece,) = await connections.call(one.address, request, timeout_s=5)
        assert bytes(piece) == b"content"
        assert reply.checksum == piece_checksum(extent, Layout(1, 1), 0, 0, b"content")

    scene(body)
