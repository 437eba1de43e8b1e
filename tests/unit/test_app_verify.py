"""Verification through an app: which pools it asks about what, and what it makes of their answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import trio

from droppexd.errors import CatalogError, InvalidRequest, NotFound, PeerBusy
from droppexd.model import (
    MISSING,
    ClusterMap,
    Extent,
    ExtentId,
    Layout,
    PoolInfo,
    Role,
    Version,
    VersionId,
    shard_size,
)
from droppexd.roles.app_session import MapView
from droppexd.roles.app_verify import Verifier
from droppexd.roles.master import MasterLink
from droppexd.wire.messages import (
    CHECK_LIMIT,
    CHECKED_EXTENTS,
    CheckFile,
    CheckShards,
    Found,
    GetScrub,
    GetScrubFindings,
    ListFindings,
    Lookup,
    ScrubFinding,
    ScrubFindings,
    ScrubProgress,
    ScrubState,
    ScrubSummary,
    ShardCheck,
    ShardName,
    ShardsChecked,
    StartScrub,
    WatchScrubs,
)

MIB = 1024 * 1024
LAYOUT = Layout(2, 1)
SIZE = 256 * MIB


class Pool:
    """Answers as it is told: every shard is sound unless `states` says otherwise."""

    def __init__(self, number):
        self.number = number
        self.asked = []
        self.states = {}
        self.error = None
        self.silent = False
        self.started = 0

    def handlers(self):
        return {
            CheckShards: self.check,
            StartScrub: self.start,
            GetScrub: self.get,
            GetScrubFindings: self.findings,
        }

    async def check(self, _call, request, _body):
        self.asked.append(request.shards)
        await self._fail()
        return ShardsChecked(
            checks=tuple(
                ShardCheck(name, self.states.get((name.extent.counter, name.shard), "sound"), 7)
                for name in request.shards
            )
        )

    async def start(self, call, request, body):
        await self._fail()
        self.started += 1
        return await self.get(call, request, body)

    async def get(self, _call, _request, _body):
        await self._fail()
        summary = ScrubSummary(
            number=self.number, requested=True, begun_ms=1, ended_ms=0, shards=2, size=3, lost=0, unreadable=0
        )
        return ScrubState(
            progress=ScrubProgress(current=summary, last=None, held=9, expected_size=12, rate=5)
        )

    async def findings(self, _call, request, _body):
        finding = ScrubFinding(ShardName(ExtentId(1, 1), 0), "damaged", 5, "a/b", VersionId(1, 1), "why")
        return ScrubFindings(findings=(finding,) if request.number == 4 else ())

    async def _fail(self):
        if self.error is not None:
            raise self.error
        if self.silent:
            await trio.sleep_forever()


class Scene:
    """Four pools, a master that knows one file, and the app's verifier."""

    def __init__(self, stage):
        self.stage = stage
        self.pools = {number: Pool(number) for number in range(1, 5)}
        self.addresses = {}
        self.found = []
        self.lookups = []
        self.verifier = self.registration = None

    async def open(self):
        for number, pool in self.pools.items():
            self.addresses[number] = await self.stage.serve(f"pool-{number}", pool.handlers())
        controller = await self.stage.serve("controller", {Lookup: self._look_up}, role=Role.CONTROLLER)
        connections = await self.stage.connections("app")
        self.registration = SimpleNamespace()
        self.set_states()
        self.verifier = Verifier(
            connections, self.registration, MasterLink(connections, [controller], self.stage.runtime)
        )
        return self

    def set_states(self, **others):
        pools = tuple(
            PoolInfo(
                number=number,
                pool_id=bytes(16),
                name=f"pool-{number}",
                machine=f"machine-{number % 2}",
                zone="",
                address=address,
                state=others.get(f"pool_{number}", "up"),
                membership="removed" if others.get(f"pool_{number}") == "removed" else "member",
                capacity=1,
                free=1,
            )
            for number, address in self.addresses.items()
        )
        self.registration.view = MapView(
            ClusterMap(cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=pools)
        )

    async def _look_up(self, _call, request, _body):
        self.lookups.append(request)
        found = self.found[0] if len(self.found) == 1 else self.found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def file(self, *places, size=SIZE, layout=LAYOUT):
        """Let the name hold extents with these pools."""
        extents = tuple(
            Extent(id=ExtentId(1, counter), layout=layout, size=size, chunk_size=4 * MIB, pools=pools)
            for counter, pools in enumerate(places, start=1)
        )
        version = Version(
            id=VersionId(1, 99),
            size=size * len(extents),
            blake3=bytes(32),
            extents=tuple(extent.id for extent in extents),
        )
        self.found = [Found(name="files/a", version=version, extents=extents)]
        return self.found[0]

    async def check(self, **fields):
        return await self.verifier.check_file(None, CheckFile(**{"name": "a", **fields}), ())


@pytest.fixture
def scene(play):
    def run(body):
        async def story(stage):
            await body(await Scene(stage).open())

        play(story)

    return run


# -- one file ------------------------------------------------------------------------------------------


def test_every_shard_of_a_file_is_asked_for_where_the_record_has_it(scene):
    async def body(one):
        one.file((1, 2, 3), (2, 3, 4))
        checked = await one.check()
        assert one.lookups == [Lookup(name="files/a")]
        asked = {
            (number, shard.extent.counter, shard.shard)
            for number, pool in one.pools.items()
            for some in pool.asked
            for shard in some
        }
        assert asked == {(1, 1, 0), (2, 1, 1), (3, 1, 2), (2, 2, 0), (3, 2, 1), (4, 2, 2)}
        assert (checked.name, checked.version, checked.size) == ("files/a", VersionId(1, 99), 2 * SIZE)
        assert (checked.extents, checked.next, checked.checked_size) == (2, 0, 2 * SIZE)
        assert (checked.shards, checked.faults) == (6, ())
        assert checked.verified_size == 6 * shard_size(SIZE, 4 * MIB, 2)
        assert (checked.survives_pools, checked.survives_machines) == (1, 0)

    scene(body)


def test_what_is_wrong_is_named_and_does_not_count(scene):
    async def body(one):
        one.file((1, 2, 3), (MISSING, 3, 4), (1, 2, 4))
        one.pools[2].states = {(1, 1): "damaged", (3, 1): "unreadable"}
        one.pools[4].error = PeerBusy("too much to do")
        checked = await one.check()
        faults = {(fault.extent, fault.shard): fault for fault in checked.faults}
        assert {place: (fault.state, fault.pool) for place, fault in faults.items()} == {
            (0, 1): ("damaged", 2),
            (1, 0): ("missing", MISSING),
            (1, 2): ("unreachable", 4),
            (2, 1): ("unreadable", 2),
            (2, 2): ("unreachable", 4),
        }
        assert (faults[0, 1].name, faults[0, 1].machine) == ("pool-2", "machine-0")
        assert faults[1, 2].reason == "too much to do"
        assert (checked.shards, checked.verified_size) == (9, 4 * shard_size(SIZE, 4 * MIB, 2))
        assert (checked.survives_pools, checked.survives_machines) == (-1, -1)

    scene(body)


def test_a_pool_that_is_down_or_not_known_is_not_asked(scene):
    async def body(one):
        one.file((1, 2, 77))
        one.set_states(pool_2="down")
        checked = await one.check()
        assert one.pools[2].asked == []
        assert [(fault.shard, fault.state, fault.reason) for fault in checked.faults] == [
            (1, "unreachable", "the pool is down"),
            (2, "unreachable", "the app does not know this pool yet"),
        ]

    scene(body)


def test_a_pool_that_does_not_answer_ends_as_unreachable(scene):
    async def body(one):
        one.file((1, 2, 3))
        one.pools[3].silent = True
        checked = await one.check()
        assert [(fault.shard, fault.state) for fault in checked.faults] == [(2, "unreachable")]

    scene(body)


def test_a_shard_that_moved_while_it_was_asked_for_is_looked_at_where_it_is_now(scene):
    async def body(one):
        before = one.file((1, 2, 3), (1, 2, 3))
        moved = replace(before.extents[0], pools=(1, 4, 3), edition=1)
        lost = replace(before.extents[1], pools=(1, MISSING, 3), edition=1)
        one.found = [before, replace(before, extents=(moved, lost))]
        one.pools[2].states = {(1, 1): "absent", (2, 1): "damaged"}
        checked = await one.check()
        assert one.lookups[1] == Lookup(name="files/a", version=VersionId(1, 99))
        assert one.pools[4].asked == [(ShardName(ExtentId(1, 1), 1),)]
        assert [(fault.extent, fault.state, fault.pool) for fault in checked.faults] == [(1, "damaged", 2)]

    scene(body)


def test_a_large_file_is_checked_page_by_page(scene):
    async def body(one):
        count = 2 * CHECKED_EXTENTS + 3
        one.file(*[(1, 2, 3)] * count)
        seen, first = 0, 0
        while True:
            checked = await one.check(first=first, version=VersionId(1, 99))
            seen += checked.shards
            if not checked.next:
                break
            assert checked.next == first + CHECKED_EXTENTS
            first = checked.next
        assert seen == 3 * count
        assert [shard.extent.counter for some in one.pools[1].asked for shard in some] == list(
            range(1, count + 1)
        )
        with pytest.raises(InvalidRequest):
            await one.check(first=count)

    scene(body)


def test_a_pool_reads_no_more_than_some_shards_for_one_request(scene):
    async def body(one):
        # Two shards of each extent on one pool: shards of 128 MiB, four to a request.
        one.file(*[(1, 1, 2)] * CHECKED_EXTENTS)
        await one.check()
        assert [len(some) for some in one.pools[1].asked] == [4] * 8
        # Small ones are bounded by their number: all on one pool.
        one.pools[1].asked.clear()
        one.file(*[(1,) * 9] * CHECKED_EXTENTS, size=100, layout=Layout(1, 8))
        await one.check()
        assert [len(some) for some in one.pools[1].asked] == [CHECK_LIMIT, CHECK_LIMIT, 16]

    scene(body)


def test_an_empty_file_has_nothing_to_be_checked(scene):
    async def body(one):
        one.file()
        checked = await one.check()
        assert (checked.extents, checked.shards, checked.next) == (0, 0, 0)
        assert checked.survives_pools is checked.survives_machines is None

    scene(body)


@pytest.mark.parametrize("error", [NotFound("no such file"), CatalogError("closed")])
def test_what_the_master_refuses_is_an_error(scene, error):
    async def body(one):
        one.found = [error]
        with pytest.raises(type(error)):
            await one.check()

    scene(body)


# -- everything ----------------------------------------------------------------------------------------


def test_scrubs_are_started_and_watched_on_every_pool_that_counts(scene):
    async def body(one):
        one.set_states(pool_2="out", pool_3="removed", pool_4="read-only")
        scrubs = (await one.verifier.watch_scrubs(None, WatchScrubs(start=True), ())).pools
        assert [(scrub.pool, scrub.progress.current.number) for scrub in scrubs] == [(1, 1), (4, 4)]
        assert [pool.started for pool in one.pools.values()] == [1, 0, 0, 1]
        scrubs = (await one.verifier.watch_scrubs(None, WatchScrubs(), ())).pools
        assert (scrubs[1].name, scrubs[1].machine, scrubs[1].error) == ("pool-4", "machine-0", "")
        assert [pool.started for pool in one.pools.values()] == [1, 0, 0, 1]

    scene(body)


def test_pools_that_cannot_be_asked_say_why_and_hold_nobody_up(scene):
    async def body(one):
        one.set_states(pool_1="down")
        one.pools[2].error = PeerBusy("too much to do")
        one.pools[3].silent = True
        scrubs = (await one.verifier.watch_scrubs(None, WatchScrubs(), ())).pools
        assert [scrub.progress is None for scrub in scrubs] == [True, True, True, False]
        assert (scrubs[0].error, scrubs[1].error) == ("the pool is down", "too much to do")
        assert scrubs[2].error

    scene(body)


def test_findings_are_those_of_the_pool_that_is_named(scene):
    async def body(one):
        reply = await one.verifier.list_findings(None, ListFindings(pool=2, number=4), ())
        assert [finding.name for finding in reply.findings] == ["a/b"]
        assert not (await one.verifier.list_findings(None, ListFindings(pool=2, number=5), ())).findings
        with pytest.raises(InvalidRequest):
            await one.verifier.list_findings(None, ListFindings(pool=9, number=4), ())

    scene(body)
