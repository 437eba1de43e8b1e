"""How an app merges what pools tell of orphans, and how an adoption goes on between questions."""

import dataclasses
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from droppexd.errors import Conflict, InvalidName, NotEnoughShards, NotFound, PeerBusy, PeerError
from droppexd.model import ClusterMap, ExtentId, Holding, Layout, OperationId, PoolInfo, Receipt, VersionId
from droppexd.roles import app_orphans
from droppexd.roles.app_orphans import Orphans
from droppexd.roles.budget import Budget
from droppexd.runtime import Runtime
from droppexd.wire.group_messages import AdoptAll
from droppexd.wire.messages import (
    Adopt,
    Adopted,
    AdoptOrphan,
    CheckShards,
    FindOrphans,
    ListOrphans,
    OrphanHeader,
    OrphansFound,
    OrphanShard,
    ShardCheck,
    ShardsChecked,
)

LAYOUT = Layout(2, 1)
CHUNK = 100
CONTENT = bytes(range(250))


def shard(counter, index, version=1, size=250):
    header = OrphanHeader(
        incarnation=bytes(16),
        layout=LAYOUT,
        size=size,
        chunk_size=CHUNK,
        version=VersionId(7, version),
        name="docs/a",
    )
    return OrphanShard(Holding(ExtentId(7, counter), index, 1), header)


class Pool:
    """A pool that holds some shards, and tells of a few at a time."""

    def __init__(self, shards, *, at_once=3, complete=True):
        self.shards = shards
        self.at_once = at_once
        self.complete = complete
        self.damaged = False

    async def answer(self, request):
        if isinstance(request, CheckShards):
            state = "damaged" if self.damaged else "sound"
            return ShardsChecked(checks=tuple(ShardCheck(name, state, 1) for name in request.shards))
        assert isinstance(request, FindOrphans)
        if request.extents:
            held = [one for one in self.shards if one.holding.extent in request.extents]
            return OrphansFound(shards=tuple(held), complete=self.complete)
        held = [one for one in self.shards if request.after is None or one.holding.extent > request.after]
        page = held[: self.at_once]
        upto = page[-1].holding.extent if held[len(page) :] else None
        return OrphansFound(shards=tuple(page), complete=self.complete, upto=upto)


class Stage:
    """An app's orphans, with everything around them made up."""

    def __init__(self, pools, *, down=()):
        self.pools = pools
        self.commits = []
        self.reading = trio.Event()
        self.reading.set()
        self.reads = 0
        infos = tuple(
            PoolInfo(
                number=number,
                pool_id=bytes(16),
                name=f"pool-{number}",
                machine="m",
                zone="",
                address=str(number),
                state="down" if number in down else "up",
                membership="member",
                capacity=1,
                free=1,
            )
            for number in sorted({*pools, *down})
        )
        by_number = {info.number: info for info in infos}
        self.map = ClusterMap(cluster_id=bytes(16), incarnation=bytes(16), term=1, version=1, pools=infos)
        self.master_answers = True
        self.registration = SimpleNamespace(
            view=SimpleNamespace(map=self.map, pool=by_number.get), session=self, refresh=self.refresh
        )
        self.orphans = Orphans(
            connections=self,
            registration=self.registration,
            master=SimpleNamespace(call=self.commit),
            runtime=Runtime(
                clock=SimpleNamespace(now=trio.current_time),
                entropy=None,
                run_blocking=trio.to_thread.run_sync,
            ),
            reader=SimpleNamespace(read=self.read),
            budget=Budget(4),
        )

    # -- connections, session, reader, master ------------------------------------------------------

    async def connect(self, address, *, timeout_s):
        await trio.lowlevel.checkpoint()
        if self.pools[int(address)] is None:
            raise PeerError("it is gone")

    async def call(self, address, request, *, timeout_s):
        await trio.lowlevel.checkpoint()
        return await self.pools[int(address)].answer(request), ()

    async def refresh(self):
        await trio.lowlevel.checkpoint()
        if self.master_answers:
            self.registration.view.map = self.map
        return self.master_answers

    def work(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def operation(self):
        return OperationId(1, len(self.commits) + 1)

    async def read(self, extent, chunk, start, end):
        await self.reading.wait()
        self.reads += 1
        assert (start, end) == (0, min(CHUNK, extent.size - chunk * CHUNK))
        return [CONTENT[chunk * CHUNK : chunk * CHUNK + end]], False

    async def commit(self, request, *, timeout_s):
        await trio.lowlevel.checkpoint()
        assert isinstance(request, Adopt)
        self.commits.append(request)
        version = request.version
        return Adopted(
            receipt=Receipt(
                name=request.name,
                version=version.id,
                size=version.size,
                blake3=version.blake3,
                layout="2+1",
                survives_pools=1,
                survives_machines=0,
            )
        )

    # -- what a client asks --------------------------------------------------------------------

    async def list(self, **fields):
        return await self.orphans.list_orphans(None, ListOrphans(**fields), ())

    async def all(self, **fields):
        """Return the pages to the end."""
        pages = [await self.list(**fields)]
        while pages[-1].next is not None:
            pages.append(await self.list(**fields, after=pages[-1].next))
        return pages

    async def adopt(self, *counters, version=1, folder="lost+found"):
        request = AdoptOrphan(
            version=VersionId(7, version), extents=tuple(ExtentId(7, one) for one in counters), folder=folder
        )
        return await self.orphans.adopt_orphan(None, request, ())

    async def adopt_everything(self):
        while True:
            told = await self.orphans.adopt_all(None, AdoptAll(folder="lost+found"), ())
            if told.done:
                return told.adopted, told.left


@pytest.fixture
def play():
    def run(story, pools, **options):
        async def main():
            stage = Stage(pools, **options)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage.orphans.run)
                await trio.testing.wait_all_tasks_blocked()
                await story(stage)
                nursery.cancel_scope.cancel()

        trio.run(main, clock=MockClock(autojump_threshold=0), strict_exception_groups=True)

    return run


@pytest.mark.parametrize("limit", [1, 4, 500])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_pages_of_all_pools_are_merged_and_each_extent_is_whole(play, limit, at_once):
    counters = range(2, 30)
    pools = {
        1: Pool([shard(one, 0) for one in counters if one % 3], at_once=at_once),
        2: Pool([shard(one, 1) for one in counters if one % 5], at_once=at_once + 1),
        3: Pool([shard(one, 2) for one in counters if one > 20], at_once=at_once),
        4: Pool([]),
    }

    async def story(stage):
        pages = await stage.all(limit=limit)
        extents = [extent for page in pages for extent in page.extents]
        held = [one for one in counters if one % 3 or one % 5 or one > 20]
        assert [extent.id.counter for extent in extents] == held
        for extent in extents:
            one = extent.id.counter
            expected = [one % 3 != 0, one % 5 != 0, one > 20]
            assert [place.shard for place in extent.places] == [n for n in range(3) if expected[n]]
        assert all(len(page.extents) <= limit for page in pages)
        assert not any(page.away for page in pages)

    play(story, pools)


def test_a_page_fits_into_a_message(play, monkeypatch):
    monkeypatch.setattr(app_orphans, "_PAGE_BYTES", 300)

    async def story(stage):
        pages = await stage.all()
        assert [len(page.extents) for page in pages] == [2, 2, 1]

    play(story, {1: Pool([shard(one, 0) for one in range(2, 7)], at_once=100)})


def test_pools_that_cannot_be_asked_or_have_not_compared_are_named(play):
    pools = {1: Pool([shard(2, 0)]), 2: None, 3: Pool([], complete=False)}

    async def story(stage):
        page = await stage.list()
        assert page.away == ("pool-2", "pool-3", "pool-4")
        assert len(page.extents) == 1

    play(story, pools, down=(4,))


def three(**options):
    return {number: Pool([shard(2, number - 1, **options)]) for number in (1, 2, 3)}


def test_an_adoption_reads_everything_and_names_the_pools_whose_shards_are_sound(play):
    pools = three()
    pools[2].damaged = True

    async def story(stage):
        done = await stage.adopt(2)
        (commit,) = stage.commits
        assert (done.read, done.size, done.receipt.name) == (250, 250, "lost+found/docs/a")
        assert commit.version.size == 250
        assert [extent.pools for extent in commit.extents] == [(1, 0, 3)]
        assert stage.reads == 3
        assert (await stage.adopt(2)).receipt == done.receipt
        assert len(stage.commits) == 1

    play(story, pools)


def test_too_few_sound_shards_end_an_adoption_and_it_may_be_tried_again(play):
    pools = three()
    pools[1].damaged = pools[2].damaged = True

    async def story(stage):
        with pytest.raises(NotEnoughShards, match="1 of its shards"):
            await stage.adopt(2)
        assert stage.commits == []
        pools[1].damaged = False
        assert (await stage.adopt(2)).receipt is not None

    play(story, pools)


def test_a_client_is_answered_while_an_adoption_goes_on(play):
    async def story(stage):
        stage.reading = trio.Event()
        asked_at = trio.current_time()
        first = await stage.adopt(2)
        assert (first.receipt, first.size) == (None, 250)
        assert trio.current_time() > asked_at
        with pytest.raises(Conflict, match="another way"):
            await stage.adopt(2, folder="elsewhere")
        stage.reading.set()
        assert (await stage.adopt(2)).receipt is not None

    play(story, three())


def test_an_adoption_that_nobody_waits_for_is_given_up(play):
    async def story(stage):
        stage.reading = trio.Event()
        await stage.adopt(2)
        await trio.sleep(100)
        stage.reading.set()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.reads == 1
        assert stage.commits == []
        assert (await stage.adopt(2)).receipt is not None
        assert stage.reads == 1 + 3

    play(story, three())


def test_any_number_of_versions_are_adopted_one_after_another(play):
    versions = range(1, 401, 2)
    pools = {
        number: Pool([shard(one + 1, number - 1, version=one) for one in versions]) for number in (1, 2, 3)
    }

    async def story(stage):
        for one in versions:
            assert (await stage.adopt(one + 1, version=one)).receipt is not None
        assert len(stage.commits) == len(versions)

    play(story, pools)


def test_too_many_adoptions_at_once_are_told_to_come_later(play, monkeypatch):
    monkeypatch.setattr(app_orphans, "_MOST_ADOPTIONS", 1)

    async def story(stage):
        stage.reading = trio.Event()
        await stage.adopt(2)
        with pytest.raises(PeerBusy):
            await stage.adopt(4, version=3)
        stage.reading.set()
        assert (await stage.adopt(2)).receipt is not None

    play(story, three())


def test_what_the_master_refuses_is_told_to_the_client(play):
    async def story(stage):
        async def refuse(request, *, timeout_s):
            raise NotFound("no such thing")

        stage.orphans._master = SimpleNamespace(call=refuse)
        with pytest.raises(NotFound):
            await stage.adopt(2)

    play(story, three())


def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(play):
    async def story(stage):
        with pytest.raises(InvalidName):
            await stage.adopt(2, folder="../x")
        assert stage.reads == 0

    play(story, three())


def test_everything_is_adopted_but_what_cannot_be_read(play):
    pools = {number: Pool([shard(2, number - 1), shard(4, number - 1, version=3)]) for number in (1, 2, 3)}
    pools[1].shards.append(shard(6, 0, version=5))

    async def story(stage):
        assert await stage.adopt_everything() == (2, 1)
        assert sorted(commit.version.id.counter for commit in stage.commits) == [1, 3]

    play(story, pools)


def test_everything_is_adopted_from_the_pools_that_the_master_names_now(play):
    async def story(stage):
        stage.registration.view.map = dataclasses.replace(stage.map, pools=stage.map.pools[:1])
        stage.master_answers = False
        with pytest.raises(PeerError, match="does not say which pools"):
            await stage.adopt_everything()
        stage.master_answers = True
        assert await stage.adopt_everything() == (1, 0)

    play(story, three())


@pytest.mark.parametrize("kind", [FindOrphans, CheckShards])
def test_what_a_silent_pool_has_is_not_taken_for_unreadable(play, kind):
    pools = three()
    pools[3].shards.clear()
    answer = pools[2].answer

    async def only_lists(request):
        if isinstance(request, kind) and (kind is CheckShards or request.extents):
            raise PeerError("too busy")
        return await answer(request)

    async def story(stage):
        pools[2].answer = only_lists
        with pytest.raises(PeerError, match="not all"):
            await stage.adopt_everything()
        pools[2].answer = answer
        assert await stage.adopt_everything() == (1, 0)

    play(story, pools)


def test_a_read_that_fails_where_all_was_sound_is_tried_again(play):
    async def story(stage):
        read = stage.orphans._reader.read

        async def fail(*_):
            raise NotEnoughShards("busy", [])

        stage.orphans._reader = SimpleNamespace(read=fail)
        with pytest.raises(PeerError, match="was not read"):
            await stage.adopt_everything()
        stage.orphans._reader = SimpleNamespace(read=read)
        assert await stage.adopt_everything() == (1, 0)

    play(story, three())
