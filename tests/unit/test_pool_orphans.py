"""What a pool remembers and tells of shards whose sessions its master does not know."""

from functools import partial

import pytest
import trio

from droppexd.coding import piece_checksum
from droppexd.errors import CatalogError
from droppexd.held import holding_of, unpack_held
from droppexd.model import ExtentId, Layout, Role, ShardHeader, VersionId
from droppexd.roles import pool_reconcile
from droppexd.roles.pool import PoolSettings, serve_pool
from droppexd.store.simulated import SimulatedDisk, SimulatedStore
from droppexd.wire.messages import (
    ORPHANS_AT_ONCE,
    Announce,
    FindOrphans,
    Heard,
    Heartbeat,
    Reconcile,
    Reconciled,
    Welcomed,
)

HEARTBEAT_S = 2.0
STRANGE = 7
START = 1 << 32
"""The first ruling of a start of a master."""


class Master:
    """A master that knows some sessions, and has records of some extents of others."""

    def __init__(self):
        self.known = {1}
        self.recorded = set()
        self.dead = set()
        self.ruling = START
        self.compared = []
        self.quarantined = []
        self.refuse = []

    def handlers(self):
        return {Announce: self.announce, Heartbeat: self.heartbeat, Reconcile: self.reconcile}

    async def announce(self, _call, _request, _body):
        return Welcomed(
            number=3,
            cluster_id=bytes(range(16)),
            incarnation=bytes(16),
            term=1,
            heartbeat_ms=int(HEARTBEAT_S * 1000),
            ruling=self.ruling,
        )

    async def heartbeat(self, _call, request, _body):
        self.quarantined.append(request.quarantined)
        return Heard(review=False, term=1, ruling=self.ruling)

    async def reconcile(self, _call, request, body):
        held = [holding_of(*one) for one in unpack_held(b"".join(body), request.after).items()]
        self.compared.append((held, request))
        if self.refuse:
            raise self.refuse.pop()
        unnamed = [one for one in held if one.extent not in self.recorded]
        return Reconciled(
            absent=(),
            wanted=(),
            drop=tuple(one for one in unnamed if one.extent in self.dead),
            unknown=tuple(
                one for one in unnamed if one.extent.session not in self.known and one.extent not in self.dead
            ),
            term=1,
            upto=None if request.last else held[-1].extent,
        )


class Scene:
    def __init__(self, stage):
        self.master = Master()
        self.disk = SimulatedDisk()
        self.stage = stage
        self.store = SimulatedStore(self.disk, entropy=stage.runtime.entropy)

    def hold(self, session, counter, index=0):
        extent, layout, piece = ExtentId(session, counter), Layout(1, 1), b"content"
        header = ShardHeader(
            incarnation=bytes(16),
            extent=extent,
            index=index,
            layout=layout,
            size=len(piece),
            chunk_size=1000,
            checksums=(piece_checksum(extent, layout, index, 0, piece),),
            version=VersionId(session, counter - 1),
            name=f"docs/{counter}",
        )
        (outcome,) = self.store.put_small([(header, piece)])
        assert isinstance(outcome, int)
        return extent

    async def open(self):
        controller = await self.stage.serve("controller", self.master.handlers(), role=Role.CONTROLLER)
        transport = await self.stage.transport("pool", Role.POOL)
        address = await self.stage.nursery.start(
            partial(
                serve_pool,
                transport=transport,
                address="tcp://127.0.0.1:0",
                store=self.store,
                controllers=[controller],
                runtime=self.stage.runtime,
                settings=PoolSettings(name="pool", machine="m", review_s=1e6),
            )
        )
        self._call = partial((await self.stage.connections("app")).call, address, timeout_s=5)
        await trio.sleep(3 * HEARTBEAT_S)

    async def find(self, **fields):
        reply, _ = await self._call(FindOrphans(**fields))
        return reply

    async def pages(self, **fields):
        """Return the shards of all pages, and how many pages there were."""
        shards, pages, after = [], 0, None
        while True:
            page = await self.find(after=after, **fields)
            assert page.complete
            shards += page.shards
            pages += 1
            if page.upto is None:
                return shards, pages
            assert after is None or page.upto > after
            after = page.upto


@pytest.fixture
def scene(play):
    def run(body, prepare):
        async def story(stage):
            one = Scene(stage)
            prepare(one)
            await one.open()
            await body(one)

        play(story)

    return run


def extents(shards):
    return [(shard.holding.extent.session, shard.holding.extent.counter) for shard in shards]


def test_shards_of_unknown_sessions_are_told_with_their_headers(scene):
    def prepare(one):
        for session, counter in ((1, 2), (STRANGE, 3), (STRANGE, 5), (9, 2)):
            one.hold(session, counter)
        one.hold(STRANGE, 3, index=1)
        one.disk.damage_header(ExtentId(9, 2), 0)

    async def body(one):
        shards, _ = await one.pages()
        assert [(*shard.holding.extent, shard.holding.shard) for shard in shards] == [
            (STRANGE, 3, 0),
            (STRANGE, 3, 1),
            (STRANGE, 5, 0),
            (9, 2, 0),
        ]
        header = shards[0].header
        assert (header.version, header.name, header.size) == (VersionId(STRANGE, 2), "docs/3", 7)
        assert (header.layout, header.chunk_size) == (Layout(1, 1), 1000)
        assert shards[0].holding.generation > 0
        assert shards[3].header is None
        assert one.master.quarantined[-1] == 4

    scene(body, prepare)


def test_pages_end_where_an_extent_ends_and_miss_nothing(scene):
    held = [(session, counter) for session in (STRANGE, 8, 9) for counter in range(2, 90)]

    def prepare(one):
        for session, counter in held:
            one.hold(session, counter)
            one.hold(session, counter, index=1)

    async def body(one):
        shards, pages = await one.pages(limit=5)
        assert extents(shards) == [each for each in held for _ in range(2)]
        assert pages >= len(held) // 3
        page = await one.find(limit=5)
        assert extents(page.shards) == [each for each in held[:3] for _ in range(2)]

    scene(body, prepare)


def test_what_was_adopted_or_called_dead_is_told_no_more_at_once(scene):
    def prepare(one):
        for counter in range(2, 6):
            one.hold(STRANGE, counter)

    async def body(one):
        one.master.recorded = {ExtentId(STRANGE, 3)}
        one.master.dead = {ExtentId(STRANGE, 4)}
        shards, _ = await one.pages()
        assert extents(shards) == [(STRANGE, 2), (STRANGE, 5)]
        assert len(one.disk.shards) == 4, "to list is not to drop"

    scene(body, prepare)


def test_extents_that_are_asked_for_are_told_whatever_the_records_say(scene):
    def prepare(one):
        one.hold(1, 2)
        one.hold(STRANGE, 3)

    async def body(one):
        asked = (ExtentId(STRANGE, 3), ExtentId(1, 2), ExtentId(1, 99))
        page = await one.find(extents=asked)
        assert extents(page.shards) == [(STRANGE, 3), (1, 2)]
        assert page.upto is None
        assert len(asked) <= ORPHANS_AT_ONCE

    scene(body, prepare)


def test_a_decision_has_the_pool_compare_what_is_unknown_and_nothing_else(scene):
    def prepare(one):
        for counter in range(2, 6):
            one.hold(STRANGE, counter)
        one.hold(1, 2)
        one.hold(9, 2)

    async def body(one):
        await trio.sleep(60)
        assert one.master.quarantined[-1] == 5
        before = len(one.master.compared)
        one.master.recorded = {ExtentId(STRANGE, 3)}
        one.master.dead = {ExtentId(STRANGE, 4), ExtentId(9, 2)}
        one.master.ruling += 1
        await trio.sleep(3 * HEARTBEAT_S)
        assert one.master.quarantined[-1] == 2
        compared = one.master.compared[before:]
        assert {holding.extent.session for held, _ in compared for holding in held} == {STRANGE, 9}
        assert not any(request.last for _, request in compared)
        assert sorted(key[0] for key in one.disk.shards) == [
            ExtentId(1, 2),
            ExtentId(STRANGE, 2),
            ExtentId(STRANGE, 3),
            ExtentId(STRANGE, 5),
        ]
        await trio.sleep(60)
        assert len(one.master.compared) == before + len(compared)

    scene(body, prepare)


def test_a_comparison_after_a_decision_that_failed_is_tried_again(scene):
    def prepare(one):
        one.hold(STRANGE, 2)

    async def body(one):
        one.master.recorded = {ExtentId(STRANGE, 2)}
        one.master.refuse = [CatalogError("the disk is full")] * 3
        one.master.ruling += 1
        await trio.sleep(60)
        assert not one.master.refuse
        assert one.master.quarantined[-1] == 0

    scene(body, prepare)


def test_another_start_of_a_master_has_the_pool_compare_everything(scene):
    def prepare(one):
        one.hold(1, 2)
        one.hold(STRANGE, 2)

    async def body(one):
        await trio.sleep(60)
        assert (len(one.master.compared), one.master.quarantined[-1]) == (2, 1)
        one.master.known = set()
        one.master.ruling += START
        await trio.sleep(3 * HEARTBEAT_S)
        assert one.master.quarantined[-1] == 2
        assert one.master.compared[-1][1].last
        shards, _ = await one.pages()
        assert extents(shards) == [(1, 2), (STRANGE, 2)]

    scene(body, prepare)


def test_of_too_many_sessions_the_first_are_told_and_then_the_others(scene, monkeypatch):
    monkeypatch.setattr(pool_reconcile, "_MOST_SESSIONS", 2)

    def prepare(one):
        for session in (STRANGE, 8, 9):
            one.hold(session, 2)

    async def body(one):
        page = await one.find()
        assert (extents(page.shards), page.complete) == ([(STRANGE, 2)], False)
        assert one.master.quarantined[-1] == 3
        one.master.recorded = {ExtentId(STRANGE, 2)}
        one.master.ruling += 1
        await trio.sleep(3 * HEARTBEAT_S)
        shards, _ = await one.pages()
        assert extents(shards) == [(8, 2), (9, 2)]
        assert one.master.quarantined[-1] == 2

    scene(body, prepare)


def test_a_pool_that_has_not_compared_yet_says_so(scene):
    def prepare(one):
        one.hold(STRANGE, 2)
        one.master.refuse = [CatalogError("the disk is full")] * 5

    async def body(one):
        page = await one.find()
        assert (page.shards, page.complete) == ((), False)
        await trio.sleep(60)
        assert len((await one.pages())[0]) == 1

    scene(body, prepare)
