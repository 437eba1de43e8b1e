"""Adopting and dropping what the catalogue never knew: what is refused, and what is written."""

import random
from dataclasses import replace
from functools import wraps

import pytest
import trio
import trio.testing

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.errors import Conflict, InvalidRequest, NotEnoughShards, NotFound, SessionClosed
from droppexd.held import shard_key
from droppexd.model import (
    EXTENT_CHUNKS,
    MISSING,
    Extent,
    ExtentId,
    Holding,
    Layout,
    Membership,
    OperationId,
    PoolRecord,
    Version,
    VersionId,
)
from droppexd.runtime import Runtime

GRACE_S = 60.0
STRANGE = 0xABC
"""A session that the catalogue does not know."""
CHUNK = 4096
FULL = CHUNK * EXTENT_CHUNKS
POOLS = (1, 2, 3, 4, 5, 6)


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


RUNTIME = Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=None)


class Scene:
    """A catalogue with six pools and an open session, and versions of a session that it does not know."""

    def __init__(self, catalogue, session):
        self.catalogue = catalogue
        self.session = session
        self.counter = 0

    def operation(self):
        self.counter += 1
        return OperationId(self.session, self.counter)

    def version(self, counter=1, *, sizes=(1000,), pools=POOLS, layout="4+2", session=STRANGE):
        extents = tuple(
            Extent(
                id=ExtentId(session, counter + place),
                layout=Layout.parse(layout),
                size=size,
                chunk_size=CHUNK,
                pools=pools,
            )
            for place, size in enumerate(sizes, 1)
        )
        version = Version(
            id=VersionId(session, counter),
            size=sum(sizes),
            blake3=bytes(32),
            extents=tuple(extent.id for extent in extents),
            metadata=(("adopted", "uncertain"),),
        )
        return version, extents

    async def adopt(self, version, extents, name="lost+found/docs/a"):
        return await self.catalogue.adopt(self.operation(), name, version, extents)

    async def put(self, name):
        version, extents = self.version(self.counter + 1, session=self.session)
        self.counter += 2
        return await self.catalogue.commit(self.operation(), name, Expected(), version, extents)


def story(function):
    @wraps(function)
    def test():
        async def main():
            async with open_catalogue(SimulatedEngine(RUNTIME), RUNTIME, delete_grace_s=GRACE_S) as catalogue:
                for number in POOLS:
                    record = PoolRecord(
                        number=0,
                        pool_id=bytes([number]) * 16,
                        name=f"pool{number}",
                        machine=f"machine{number}",
                        zone="",
                        address=f"tcp://127.0.0.1:{number}",
                    )
                    await catalogue.save_pool(record)
                await function(Scene(catalogue, await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))))

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    del test.__wrapped__  # pytest would take the story's argument for a fixture.
    return test


def holdings(extents):
    return [Holding(extent.id, index, 1) for extent in extents for index in range(extent.layout.total)]


async def unknown(scene, pool, extents):
    """Return which shards of these extents a comparison with a pool calls unknown."""
    held = {shard_key(extent.id, extent.pools.index(pool)): 1 for extent in extents}
    stretch = await scene.catalogue.reconcile(pool, None, held, last=False)
    return stretch.unknown


# -- adopt -----------------------------------------------------------------------------------------


@story
async def test_an_adopted_version_is_a_file_like_any_other(scene):
    version, extents = scene.version(sizes=(FULL, FULL, 10))
    assert len(await unknown(scene, 2, extents)) == 3
    receipt = await scene.adopt(version, extents)
    assert (receipt.name, receipt.version, receipt.size) == ("lost+found/docs/a", version.id, version.size)
    assert (receipt.layout, receipt.survives_pools, receipt.survives_machines) == ("4+2", 2, 2)
    found = await scene.catalogue.lookup("lost+found/docs/a")
    assert found.extents == extents
    assert found.version.metadata == version.metadata
    assert found.version.created_ms
    assert await unknown(scene, 2, extents) == []
    totals = scene.catalogue.totals
    assert (totals.files, totals.extents, totals.size) == (1, 3, version.size)
    assert await scene.catalogue.review(1, holdings(extents)[:1]) == []
    await scene.catalogue.remove(scene.operation(), "lost+found/docs/a", Expected())
    await trio.sleep(GRACE_S + 5)
    assert len(await scene.catalogue.garbage(1, None, 10)) == 3
    assert await scene.catalogue.review(1, holdings(extents)[:1]) == holdings(extents)[:1]


@story
async def test_what_is_not_there_is_recorded_as_missing(scene):
    version, extents = scene.version(pools=(1, MISSING, 3, 4, MISSING, 6))
    receipt = await scene.adopt(version, extents)
    assert receipt.survives_pools == 0
    assert await scene.catalogue.degraded(None, 10) == [(0, extents[0].id)]


@story
async def test_shards_on_pools_that_do_not_count_are_missing(scene):
    await scene.catalogue.save_pool(replace(scene.catalogue.pools[6], membership=Membership.REMOVED.value))
    scene.catalogue.set_out({5})
    version, extents = scene.version()
    await scene.adopt(version, extents)
    (found,) = (await scene.catalogue.lookup("lost+found/docs/a")).extents
    assert found.pools == (1, 2, 3, 4, MISSING, MISSING)
    scene.catalogue.set_out({4, 5})
    with pytest.raises(NotEnoughShards, match="3 shards"):
        await scene.adopt(*scene.version(10))


@story
async def test_a_name_that_exists_is_left_alone(scene):
    kept = await scene.put("lost+found/docs/a")
    names = [(await scene.adopt(*scene.version(counter))).name for counter in (10, 20)]
    assert names == ["lost+found/docs/a.abc-a", "lost+found/docs/a.abc-14"]
    assert (await scene.catalogue.lookup("lost+found/docs/a")).version.id == kept.version


@story
async def test_a_very_long_name_that_exists_is_cut_where_a_character_ends(scene):
    name = "lost+found/" + "ä" * 506
    await scene.put(name)
    receipt = await scene.adopt(*scene.version(), name=name)
    assert receipt.name.endswith("ä.abc-1")
    assert len(receipt.name.encode()) <= 1024


@story
async def test_a_repeated_adoption_gets_the_same_answer(scene):
    version, extents = scene.version()
    operation = scene.operation()
    await scene.put("lost+found/docs/a")
    receipt = await scene.catalogue.adopt(operation, "lost+found/docs/a", version, extents)
    assert await scene.catalogue.adopt(operation, "lost+found/docs/a", version, extents) == receipt
    with pytest.raises(InvalidRequest, match="another change"):
        await scene.catalogue.adopt(operation, "lost+found/docs/a", *scene.version(50))
    with pytest.raises(InvalidRequest, match="another change"):
        await scene.catalogue.remove(operation, "lost+found/docs/a", Expected())
    with pytest.raises(Conflict, match="already"):
        await scene.adopt(version, extents)


@story
async def test_what_has_a_record_is_not_adopted_a_second_time(scene):
    version, extents = scene.version(sizes=(FULL, 10))
    await scene.adopt(version, extents)
    other = replace(version, id=VersionId(STRANGE, 0))
    with pytest.raises(Conflict, match="has a record"):
        await scene.adopt(other, extents, "lost+found/b")
    with pytest.raises(NotFound):
        await scene.catalogue.lookup("lost+found/b")


@story
async def test_a_session_that_the_catalogue_knows_has_no_orphans(scene):
    known = scene.version(100, session=scene.session)
    with pytest.raises(Conflict, match="knows"):
        await scene.adopt(*known)
    await scene.catalogue.close_session(scene.session)
    scene.session = await scene.catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
    with pytest.raises(Conflict, match="knows"):
        await scene.adopt(*known)


@story
async def test_a_closed_session_adopts_nothing(scene):
    await scene.catalogue.close_session(scene.session)
    with pytest.raises(SessionClosed):
        await scene.adopt(*scene.version())


@story
async def test_extents_that_are_no_version_are_refused(scene):
    version, (first, second) = scene.version(sizes=(FULL, 10))
    wrong = [
        (replace(version, extents=(second.id, first.id)), (second, first)),
        (replace(version, extents=(first.id,), size=first.size + 1), (first,)),
        (replace(version, extents=(), size=0), ()),
        (version, (replace(first, size=FULL - 1), replace(second, size=11))),
        (version, (first, replace(second, pools=(1, 2, 3, 4, 5, 99)))),
        (version, (first, replace(second, pools=(1, 1, 3, 4, 5, 6)))),
        (replace(version, id=VersionId(STRANGE, 2)), (first, second)),
    ]
    for bad_version, bad_extents in wrong:
        with pytest.raises(InvalidRequest):
            await scene.adopt(bad_version, bad_extents)
    assert scene.catalogue.totals.extents == 0


# -- drop ------------------------------------------------------------------------------------------


@story
async def test_what_is_dropped_is_garbage_of_the_pools_that_hold_it(scene):
    _, extents = scene.version(sizes=(FULL, 10))
    assert await scene.catalogue.drop_orphans([(extent.id, (2, 3)) for extent in extents]) == []
    assert await unknown(scene, 2, extents) == []
    assert await scene.catalogue.garbage(2, None, 10) == []
    await trio.sleep(GRACE_S + 5)
    ids = [extent.id for extent in extents]
    assert await scene.catalogue.garbage(2, None, 10) == ids
    assert await scene.catalogue.garbage(1, None, 10) == []
    held = holdings(extents)
    assert await scene.catalogue.review(1, held) == held
    for pool in (2, 3):
        await scene.catalogue.confirm_dropped(pool, ids)
    assert scene.catalogue.totals.garbage == 0
    assert await scene.catalogue.review(1, held) == []


@story
async def test_dropping_may_be_repeated(scene):
    _, extents = scene.version()
    drop = [(extents[0].id, (2,))]
    assert await scene.catalogue.drop_orphans(drop) == []
    assert await scene.catalogue.drop_orphans(drop * 2) == []
    assert scene.catalogue.totals.garbage == 1


@story
async def test_nothing_of_a_live_version_and_nothing_of_a_known_session_is_dropped(scene):
    version, adopted = scene.version()
    await scene.adopt(version, adopted)
    await scene.put("docs/live")
    live = (await scene.catalogue.lookup("docs/live")).extents
    _, lost = scene.version(50)
    never_committed = ExtentId(scene.session, 10_000)
    asked = [adopted[0].id, live[0].id, lost[0].id, never_committed]
    refused = await scene.catalogue.drop_orphans([(extent, POOLS) for extent in asked])
    assert refused == [adopted[0].id, live[0].id, never_committed]
    await trio.sleep(GRACE_S + 5)
    for pool in POOLS:
        assert await scene.catalogue.garbage(pool, None, 10) == [lost[0].id]
        index = pool - 1
        named = [Holding(adopted[0].id, index, 1), Holding(live[0].id, index, 1)]
        assert await scene.catalogue.review(pool, named) == []


@story
async def test_what_was_dropped_is_not_adopted(scene):
    version, extents = scene.version()
    await scene.catalogue.drop_orphans([(extents[0].id, (1,))])
    with pytest.raises(Conflict, match="dropped"):
        await scene.adopt(version, extents)


@story
async def test_of_an_adoption_and_a_drop_at_the_same_time_the_first_counts(scene):
    version, extents = scene.version()
    refused = []

    async def drop():
        refused.extend(await scene.catalogue.drop_orphans([(extents[0].id, POOLS)]))

    async with trio.open_nursery() as nursery:
        await nursery.start(at_once(scene.adopt, version, extents))
        nursery.start_soon(drop)
    assert refused == [extents[0].id]
    assert (await scene.catalogue.lookup("lost+found/docs/a")).extents == extents


def at_once(function, *args):
    """Return a task that has begun when the next one is started."""

    async def run(task_status):
        task_status.started()
        await function(*args)

    return run


@story
async def test_a_pool_that_nobody_knows_is_refused(scene):
    with pytest.raises(InvalidRequest, match="99"):
        await scene.catalogue.drop_orphans([(ExtentId(STRANGE, 1), (99,))])
    assert scene.catalogue.totals.garbage == 0


@story
async def test_each_decision_has_a_ruling_of_its_own(scene):
    rulings = [scene.catalogue.ruling]
    version, extents = scene.version()
    await scene.adopt(version, extents)
    rulings.append(scene.catalogue.ruling)
    await scene.catalogue.drop_orphans([(ExtentId(STRANGE, 90), (1,))])
    rulings.append(scene.catalogue.ruling)
    await scene.put("docs/a")
    assert scene.catalogue.ruling == rulings[-1]
    assert len(set(rulings)) == 3
    assert len({ruling >> 32 for ruling in rulings}) == 1


def test_each_start_of_a_master_has_rulings_of_its_own():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        starts = set()
        for _ in range(3):
            async with open_catalogue(engine, RUNTIME) as catalogue:
                starts.add(catalogue.ruling >> 32)
        assert len(starts) == 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
