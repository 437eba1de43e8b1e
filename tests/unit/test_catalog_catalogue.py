"""The catalogue's promises, one by one."""

import copy
import random
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.reconciling import MOST_AT_ONCE
from droppexd.catalog.simulated import SimulatedDisk, SimulatedEngine
from droppexd.errors import (
    CatalogError,
    CatalogFull,
    Conflict,
    IdentityError,
    InvalidRequest,
    NotEnoughShards,
    NotFound,
    NotMaster,
    SessionClosed,
    StaleRead,
)
from droppexd.held import pack_held, unpack_held
from droppexd.model import (
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

ANYTHING = Expected()
ABSENT = Expected(absent=True)
GRACE_S = 60.0


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


class App:
    """Six pools and a session, and uploads with fresh ids."""

    def __init__(self, catalogue, session):
        self.catalogue = catalogue
        self.session = session
        self.counter = 0

    def next(self):
        self.counter += 1
        return self.counter

    def operation(self):
        return OperationId(self.session, self.next())

    def version(self, extents=1, layout="4+2", pools=(1, 2, 3, 4, 5, 6), size=1000):
        version = VersionId(self.session, self.next())
        made = tuple(
            Extent(
                id=ExtentId(self.session, self.next()),
                layout=Layout.parse(layout),
                size=size,
                chunk_size=4096,
                pools=pools,
            )
            for _ in range(extents)
        )
        return (
            Version(
                id=version,
                size=size * extents,
                blake3=bytes(32),
                extents=tuple(extent.id for extent in made),
                metadata=(("k", "v"),),
            ),
            made,
        )

    async def put(self, name, expected=ANYTHING, **upload):
        version, extents = self.version(**upload)
        return await self.catalogue.commit(self.operation(), name, expected, version, extents)


@asynccontextmanager
async def open_app(engine=None):
    engine = engine or SimulatedEngine(RUNTIME)
    async with open_catalogue(engine, RUNTIME, delete_grace_s=GRACE_S) as catalogue:
        while len(catalogue.pools) < 6:
            await catalogue.save_pool(pool_record(len(catalogue.pools) + 1))
        session = await catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
        yield App(catalogue, session)


def pool_record(number, **fields):
    return PoolRecord(
        number=0,
        pool_id=bytes([number]) * 16,
        name=f"pool{number}",
        machine=f"machine{(number + 1) // 2}",
        zone="",
        address=f"tcp://127.0.0.1:{number}",
        **fields,
    )


def story(function):
    """Run an async test about an app on the mock clock."""

    def test():
        async def main():
            async with open_app() as app:
                await function(app)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    test.__name__ = function.__name__
    return test


# -- put, look up, conditions ----------------------------------------------------------------------


@story
async def test_what_was_committed_is_found_by_name_and_by_version(app):
    version, extents = app.version(extents=3)
    receipt = await app.catalogue.commit(app.operation(), "f/a", ABSENT, version, extents, "note")
    found = await app.catalogue.lookup("f/a")
    assert found.extents == extents
    assert found.version == Version(
        id=version.id,
        size=3000,
        blake3=bytes(32),
        extents=version.extents,
        names=1,
        created_ms=1_700_000_000_000,
        metadata=(("k", "v"),),
    )
    assert await app.catalogue.lookup_version(version.id) == found
    assert (receipt.version, receipt.size, receipt.layout, receipt.note) == (version.id, 3000, "4+2", "note")
    assert (receipt.survives_pools, receipt.survives_machines, receipt.replaced) == (2, 1, False)
    with pytest.raises(NotFound):
        await app.catalogue.lookup("f/b")


@story
async def test_an_empty_file_has_no_extents(app):
    receipt = await app.put("f/empty", extents=0)
    assert (await app.catalogue.lookup("f/empty")).extents == ()
    assert (receipt.size, receipt.layout) == (0, "")
    assert (receipt.survives_pools, receipt.survives_machines) == (None, None)
    assert app.catalogue.totals == (1, 0, 0, 0, 1)
    assert await app.catalogue.survival([1, 2, 3]) == ()


@story
async def test_a_repeated_put_of_an_empty_file_gets_the_same_receipt(app):
    version, extents = app.version(extents=0)
    commit = (app.operation(), "f/empty", ANYTHING, version, extents)
    assert await app.catalogue.commit(*commit) == await app.catalogue.commit(*commit)


@story
async def test_conditions_are_judged_against_what_is_there(app):
    first = await app.put("f/a", ABSENT)
    with pytest.raises(Conflict, match="exists already"):
        await app.put("f/a", ABSENT)
    with pytest.raises(Conflict, match="is gone"):
        await app.put("f/b", Expected(version=first.version))
    second = await app.put("f/a", Expected(version=first.version))
    assert second.replaced
    with pytest.raises(Conflict, match="by now"):
        await app.put("f/a", Expected(version=first.version))
    assert (await app.put("f/a")).replaced
    with pytest.raises(StaleRead):
        await app.catalogue.lookup_version(first.version)


@story
async def test_of_many_puts_if_absent_at_the_same_time_one_wins(app):
    outcomes = []

    async def put():
        try:
            outcomes.append((await app.put("f/a", ABSENT)).version)
        except Conflict:
            outcomes.append(None)

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(put)
    (winner,) = [version for version in outcomes if version]
    assert (await app.catalogue.lookup("f/a")).version.id == winner
    assert app.catalogue.totals.extents == 1


@story
async def test_a_chain_of_conditional_replacements_in_one_batch_holds(app):
    first = await app.put("f/a")
    outcomes = []

    async def replace_first(_i):
        try:
            outcomes.append((await app.put("f/a", Expected(version=first.version))).version)
        except Conflict:
            outcomes.append(None)

    async with trio.open_nursery() as nursery:
        for i in range(10):
            nursery.start_soon(replace_first, i)
    assert sum(outcome is not None for outcome in outcomes) == 1


# -- idempotency and sessions ----------------------------------------------------------------------


@story
async def test_a_repeated_commit_gets_the_same_answer(app):
    version, extents = app.version()
    operation = app.operation()

    async def commit():
        return await app.catalogue.commit(operation, "f/a", ABSENT, version, extents)

    receipts = []

    async def collect():
        receipts.append(await commit())

    async with trio.open_nursery() as nursery:  # Both in one batch.
        nursery.start_soon(collect)
        nursery.start_soon(collect)
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    assert receipts == [await commit()] * 2
    with pytest.raises(NotFound):
        await app.catalogue.lookup("f/a")


@story
async def test_a_remembered_refusal_stays_one(app):
    await app.put("f/a")
    version, extents = app.version()
    operation = app.operation()
    with pytest.raises(Conflict) as first:
        await app.catalogue.commit(operation, "f/a", ABSENT, version, extents)
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    with pytest.raises(Conflict) as second:
        await app.catalogue.commit(operation, "f/a", ABSENT, version, extents)
    assert str(first.value) == str(second.value)


@story
async def test_an_operation_id_stands_for_one_change(app):
    version, extents = app.version()
    operation = app.operation()
    await app.catalogue.commit(operation, "f/a", ABSENT, version, extents)
    other, other_extents = app.version()
    with pytest.raises(InvalidRequest):
        await app.catalogue.commit(operation, "f/b", ABSENT, other, other_extents)
    with pytest.raises(InvalidRequest):
        await app.catalogue.remove(operation, "f/a", ANYTHING)


@story
async def test_remove_and_rename_are_idempotent(app):
    put = await app.put("f/a")
    move, remove = app.operation(), app.operation()
    for _ in range(2):
        assert await app.catalogue.rename(move, "f/a", "f/b", ABSENT, keep=False) == put.version
    for _ in range(2):
        assert await app.catalogue.remove(remove, "f/b", ANYTHING) == put.version
    assert app.catalogue.totals.files == 0


@story
async def test_a_closed_session_commits_nothing(app):
    late, extents = app.version()
    await app.catalogue.close_session(app.session)
    with pytest.raises(SessionClosed):
        await app.catalogue.commit(app.operation(), "f/a", ANYTHING, late, extents)
    with pytest.raises(SessionClosed):
        await app.catalogue.raise_floor(app.session, 10)
    with pytest.raises(SessionClosed):
        await app.catalogue.remove(OperationId(77, 1), "f/a", ANYTHING)
    await app.catalogue.close_session(app.session)


@story
async def test_a_commit_behind_a_close_in_the_same_batch_is_refused(app):
    version, extents = app.version()
    refused = []

    async def commit():
        try:
            await app.catalogue.commit(app.operation(), "f/a", ANYTHING, version, extents)
        except SessionClosed:
            refused.append(True)

    async def hold():
        await trio.sleep(1)

    app.catalogue._engine._flush = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.catalogue.open_session, "tcp://127.0.0.1:2", bytes(16))
        await trio.sleep(0.1)  # The next two gather behind this one.
        nursery.start_soon(app.catalogue.close_session, app.session)
        await trio.sleep(0.1)
        nursery.start_soon(commit)
    assert refused


@story
async def test_outcomes_below_the_floor_are_forgotten_and_not_done_again(app):
    version, extents = app.version()
    operation = app.operation()
    await app.catalogue.commit(operation, "f/a", ANYTHING, version, extents)
    await app.catalogue.raise_floor(app.session, app.counter + 1)
    await app.catalogue.raise_floor(app.session, 1)  # It only goes up.
    await app.catalogue.forget_outcomes()
    assert await app.catalogue._engine.range(b"o/", b"o0", 10) == []
    with pytest.raises(InvalidRequest, match="floor"):
        await app.catalogue.commit(operation, "f/a", ANYTHING, version, extents)


def test_a_forgotten_outcome_stays_forgotten_for_the_next_master():
    async def main():
        disk = SimulatedDisk()
        async with open_app(SimulatedEngine(RUNTIME, disk)) as app:
            version, extents = app.version()
            operation = app.operation()
            await app.catalogue.commit(operation, "f/a", ANYTHING, version, extents)
            await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
            await app.catalogue.raise_floor(app.session, app.counter + 1)
            await app.catalogue.forget_outcomes()
        async with open_catalogue(SimulatedEngine(RUNTIME, disk), RUNTIME) as catalogue:
            with pytest.raises(InvalidRequest, match="floor"):
                await catalogue.commit(operation, "f/a", ANYTHING, version, extents)

    trio.run(main)


@story
async def test_outcomes_of_a_closed_session_are_forgotten(app):
    for i in range(5):
        await app.put(f"f/{i}")
    await app.catalogue.close_session(app.session)
    await app.catalogue.forget_outcomes()
    assert await app.catalogue._engine.range(b"o/", b"o0", 10) == []


# -- what is no commit -----------------------------------------------------------------------------


@story
async def test_commits_that_no_app_should_send_are_refused(app):
    def check(match, version, extents):
        async def refused():
            with pytest.raises(InvalidRequest, match=match):
                await app.catalogue.commit(app.operation(), "f/a", ANYTHING, version, extents)

        return refused()

    version, extents = app.version(extents=2)
    await check("other extents", version, extents[:1])
    await check("other extents", version, extents[::-1])
    size_wrong, same = app.version()
    await check(
        "bytes", Version(id=size_wrong.id, size=5, blake3=bytes(32), extents=size_wrong.extents), same
    )
    await check("names 5 shards", *app.version(pools=(1, 2, 3, 4, 5)))
    await check("two shards on one pool", *app.version(pools=(1, 2, 3, 4, 5, 5)))
    await check("not known", *app.version(pools=(1, 2, 3, 4, 5, 9)))
    foreign = ExtentId(99, 1)
    alien = Extent(id=foreign, layout=Layout(1, 1), size=5, chunk_size=5, pools=(1, 2))
    other = Version(id=VersionId(app.session, app.next()), size=5, blake3=bytes(32), extents=(foreign,))
    await check("not made in session", other, [alien])
    await app.catalogue.commit(app.operation(), "f/b", ANYTHING, version, extents)
    await check("used before", version, extents)
    await app.catalogue.remove(app.operation(), "f/b", ANYTHING)
    reused = Version(
        id=VersionId(app.session, app.next()), size=2000, blake3=bytes(32), extents=version.extents
    )
    await check("used before", reused, extents)
    old, old_extents = app.version()
    await app.catalogue.raise_floor(app.session, app.next())
    await check("floor", old, old_extents)
    assert app.catalogue.totals.files == 0


@story
async def test_one_more_than_k_shards_must_be_on_pools_that_count(app):
    receipt = await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    assert receipt.survives_pools == 1
    with pytest.raises(NotEnoughShards) as refusal:
        await app.put("f/b", pools=(1, 2, 3, 4, MISSING, MISSING))
    assert len(refusal.value.missing) == 2
    app.catalogue.set_out([6])
    await app.put("f/c")
    assert (await app.catalogue.lookup("f/c")).extents[0].pools == (1, 2, 3, 4, 5, MISSING)
    app.catalogue.set_out([5, 6])
    with pytest.raises(NotEnoughShards):
        await app.put("f/d")
    await app.put("f/single", layout="1+0", pools=(1,))
    degraded = await app.catalogue.degraded(None, 10)
    assert [survives for survives, _ in degraded] == [1, 1]
    assert await app.catalogue.degraded(degraded[0], 10) == degraded[1:]


@story
async def test_shards_on_a_removed_pool_count_as_missing(app):
    record = app.catalogue.pools[6]
    await app.catalogue.save_pool(
        PoolRecord(
            number=6,
            pool_id=record.pool_id,
            name="x",
            machine="y",
            zone="",
            address=record.address,
            membership="removed",
        )
    )
    await app.put("f/a")
    assert (await app.catalogue.lookup("f/a")).extents[0].pools == (1, 2, 3, 4, 5, MISSING)


# -- names -----------------------------------------------------------------------------------------


@story
async def test_a_version_lives_as_long_as_one_of_its_names(app):
    put = await app.put("f/a", extents=2)
    await app.catalogue.rename(app.operation(), "f/a", "f/b", ABSENT, keep=True)
    assert (await app.catalogue.lookup("f/b")).version.names == 2
    assert app.catalogue.totals == (2, 2000, 2, 0, 0)
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    await app.catalogue.rename(app.operation(), "f/b", "g/c", ABSENT, keep=False)
    assert (await app.catalogue.lookup("g/c")).version.names == 1
    await app.put("g/c")
    with pytest.raises(StaleRead):
        await app.catalogue.lookup_version(put.version)
    assert app.catalogue.totals == (1, 1000, 1, 2, 0)


@story
async def test_moving_and_copying_onto_names_of_the_same_version(app):
    await app.put("f/a")
    await app.catalogue.rename(app.operation(), "f/a", "f/b", ABSENT, keep=True)
    await app.catalogue.rename(app.operation(), "f/a", "f/b", ANYTHING, keep=True)
    assert (await app.catalogue.lookup("f/a")).version.names == 2
    await app.catalogue.rename(app.operation(), "f/a", "f/b", ANYTHING, keep=False)
    assert (await app.catalogue.lookup("f/b")).version.names == 1
    await app.catalogue.rename(app.operation(), "f/b", "f/b", ANYTHING, keep=False)
    assert (await app.catalogue.lookup("f/b")).version.names == 1
    with pytest.raises(Conflict):
        await app.catalogue.rename(app.operation(), "f/b", "f/b", ABSENT, keep=False)
    with pytest.raises(NotFound):
        await app.catalogue.rename(app.operation(), "f/a", "f/c", ABSENT, keep=False)


@story
async def test_a_rename_is_refused_when_the_target_is_another(app):
    await app.put("f/a")
    target = await app.put("f/b")
    with pytest.raises(Conflict):
        await app.catalogue.rename(app.operation(), "f/a", "f/b", ABSENT, keep=False)
    await app.catalogue.rename(app.operation(), "f/a", "f/b", Expected(version=target.version), keep=False)
    assert app.catalogue.totals == (1, 1000, 1, 1, 0)


@story
async def test_very_large_versions_come_and_go(app):
    await app.put("f/large", extents=2500)
    assert len((await app.catalogue.lookup("f/large")).extents) == 2500
    assert [(c.survives, c.files, c.extents) for c in await app.catalogue.survival([])] == [(2, 1, 2500)]
    await app.catalogue.remove(app.operation(), "f/large", ANYTHING)
    assert app.catalogue.totals == (0, 0, 0, 2500, 0)


# -- extents ---------------------------------------------------------------------------------------


# -- shards ----------------------------------------------------------------------------------------


async def extent_of(app, name="f/a"):
    (extent,) = (await app.catalogue.lookup(name)).extents
    return extent


async def survives(app):
    return [(count.survives, count.files, count.extents) for count in await app.catalogue.survival([])]


async def place_on(app, pool, places):
    return await app.catalogue.place_shards(pool, app.catalogue.pools[pool].boot_id, places)


@story
async def test_a_lost_shard_is_missing_and_degraded_until_it_is_placed_again(app):
    await app.put("f/a")
    extent = await extent_of(app)
    assert await app.catalogue.lose_shards(3, [(extent.id, 2, True)]) == 1
    assert await app.catalogue.lose_shards(3, [(extent.id, 2, True)]) == 0
    assert (await extent_of(app)).pools == (1, 2, MISSING, 4, 5, 6)
    assert await app.catalogue.degraded(None, 10) == [(1, extent.id)]
    assert app.catalogue.missing == 1
    assert await survives(app) == [(1, 1, 1)]
    assert await place_on(app, 3, [(extent.id, 2, 1)]) == []
    assert (await extent_of(app)).edition == 2
    assert await app.catalogue.degraded(None, 10) == []
    assert app.catalogue.missing == 0


@story
async def test_a_shard_is_placed_only_from_the_edition_that_was_read(app):
    await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    extent = await extent_of(app)
    late = (extent.id, 5, extent.edition + 1)
    twice = (extent.id, 5, extent.edition)
    gone = (ExtentId(9, 9), 0, 0)
    outside = (extent.id, 6, extent.edition)
    assert await place_on(app, 6, [late, gone, outside]) == [late, gone, outside]
    assert await place_on(app, 5, [twice]) == [twice]  # It has another shard already.
    assert await place_on(app, 6, [twice, twice]) == [twice]
    assert (await extent_of(app)).pools == (1, 2, 3, 4, 5, 6)


@story
async def test_what_a_start_of_a_pool_stored_is_not_placed_once_the_pool_started_again(app):
    await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    extent = await extent_of(app)
    stored = (extent.id, 5, extent.edition)
    before = app.catalogue.pools[6]
    again = replace(before, boot_id=b"the next start..")
    await app.catalogue.save_pool(again)
    assert await app.catalogue.place_shards(6, before.boot_id, [stored]) == [stored]
    assert (await extent_of(app)).pools == extent.pools
    assert await app.catalogue.place_shards(6, again.boot_id, [stored]) == []


@story
async def test_a_shard_is_lost_only_where_the_record_names_the_pool(app):
    await app.put("f/a")
    extent = await extent_of(app)
    others = [(extent.id, 0, False), (extent.id, 17, False), (ExtentId(9, 9), 1, False)]
    assert await app.catalogue.lose_shards(2, others) == 0
    assert (await extent_of(app)).edition == 0


@story
async def test_damaged_shards_stay_on_record_where_nothing_else_is_left_but_absent_ones_do_not(app):
    await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    extent = await extent_of(app)
    assert await app.catalogue.lose_shards(5, [(extent.id, 4, True)]) == 1
    assert await app.catalogue.lose_shards(1, [(extent.id, 0, True)]) == 0
    assert await survives(app) == [(0, 1, 1)]
    assert await app.catalogue.lose_shards(1, [(extent.id, 0, False)]) == 1
    assert await survives(app) == [(-1, 1, 1)]
    assert await app.catalogue.degraded(None, 10) == [(-1, extent.id)]


@story
async def test_what_is_on_a_pool_that_is_out_is_missing_whatever_is_left(app):
    await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    await app.catalogue.lose_shards(5, [((await extent_of(app)).id, 4, True)])
    await app.put("f/b")
    ids = [(await extent_of(app, name)).id for name in ("f/a", "f/b")]
    assert await app.catalogue.lose_pool(1, ids) == 0  # It is not out.
    assert app.catalogue.places(1) == 2
    app.catalogue.set_out([1])
    assert await app.catalogue.lose_pool(1, ids) == 2
    assert app.catalogue.places(1) == 0
    assert app.catalogue.missing == 4
    assert await app.catalogue.degraded(None, 10) == sorted([(-1, ids[0]), (1, ids[1])])
    place = (ids[1], 0, 1)
    assert await place_on(app, 1, [place]) == [place]
    app.catalogue.set_out([])
    assert await place_on(app, 1, [place]) == []


@story
async def test_nobody_waits_for_a_removed_pool_to_drop_what_is_dead(app):
    for number in range(600):
        await app.put(f"f/{number}", layout="1+1", pools=(1, 2))
        await app.catalogue.remove(app.operation(), f"f/{number}", ANYTHING)
    record = app.catalogue.pools[1]
    await app.catalogue.save_pool(replace(record, membership=Membership.REMOVED.value))
    assert app.catalogue.pools[1].membership == Membership.REMOVED
    await app.catalogue.release_garbage(1)
    assert app.catalogue.totals.garbage == 600
    await trio.sleep(200)
    while page := await app.catalogue.garbage(2, None, 1000):
        await app.catalogue.confirm_dropped(2, page)
    assert app.catalogue.totals.garbage == 0


def recoded(app, old, layout="2+1", pools=(1, 2, 3), **fields):
    """Return an extent as another layout makes it of the same content."""
    return replace(
        old, id=ExtentId(app.session, app.next()), layout=Layout.parse(layout), pools=pools, **fields
    )


@pytest.mark.parametrize(("extents", "place"), [(1, 0), (3, 1)])
def test_an_extent_takes_the_place_of_another_and_all_counts_follow(extents, place):
    @story
    async def test(app):
        receipt = await app.put("f/a", extents=extents)
        await app.catalogue.rename(app.operation(), "f/a", "f/b", ANYTHING, keep=True)
        before = await app.catalogue.lookup("f/a")
        old = before.extents[place]
        new = recoded(app, old)
        operation = app.operation()
        for _ in range(2):  # Asked again it is the same answer, and nothing is done twice.
            await app.catalogue.swap_extent(operation, receipt.version, place, old.id, new)
        found = await app.catalogue.lookup("f/b")
        assert found.extents == (*before.extents[:place], new, *before.extents[place + 1 :])
        assert found.version == replace(before.version, extents=tuple(one.id for one in found.extents))
        assert app.catalogue.totals.extents == extents
        assert app.catalogue.totals.garbage == 1
        survival = await app.catalogue.survival(())
        assert [(one.survives, one.files, one.extents) for one in survival if one.extents] == (
            [(1, 2, 1)] if extents == 1 else [(1, 2, 1), (2, 0, 2)]
        )
        await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
        await app.catalogue.remove(app.operation(), "f/b", ANYTHING)
        assert app.catalogue.totals[:3] == (0, 0, 0)
        assert app.catalogue.totals.garbage == 1 + extents
        assert not any(one.extents or one.files for one in await app.catalogue.survival(()))

    test()


@story
async def test_an_extent_is_swapped_only_for_the_one_that_is_there_and_for_a_whole_one(app):
    receipt = await app.put("f/a", extents=2)
    one, other = (await app.catalogue.lookup("f/a")).extents

    async def swap(new, *, place=0, old=one.id, version=receipt.version, operation=None):
        await app.catalogue.swap_extent(operation or app.operation(), version, place, old, new)

    with pytest.raises(Conflict, match="another extent"):
        await swap(recoded(app, one), place=1)
    with pytest.raises(Conflict, match="another extent"):
        await swap(recoded(app, one), place=2)
    with pytest.raises(Conflict, match="another extent"):
        await swap(recoded(app, one), old=other.id)
    with pytest.raises(Conflict, match="was removed"):
        await swap(recoded(app, one), version=VersionId(app.session, 900))
    with pytest.raises(Conflict, match="lacks shards"):
        await swap(recoded(app, one, "2+2", (1, 2, 3, MISSING)))
    with pytest.raises(NotEnoughShards):
        await swap(recoded(app, one, "2+1", (1, 2, MISSING)))
    with pytest.raises(InvalidRequest, match="not cut"):
        await swap(recoded(app, one, size=one.size + 1))
    with pytest.raises(InvalidRequest, match="not known"):
        await swap(recoded(app, one, "2+1", (1, 2, 9)))
    with pytest.raises(InvalidRequest, match="used before"):
        await swap(replace(one, layout=Layout(2, 1), pools=(1, 2, 3)))
    with pytest.raises(InvalidRequest, match="not made in session"):
        await swap(replace(recoded(app, one), id=ExtentId(app.session + 1, 5)))
    assert (await app.catalogue.lookup("f/a")).extents == (one, other)

    operation, new = app.operation(), recoded(app, one)
    await swap(new, operation=operation)
    with pytest.raises(InvalidRequest, match="another change"):
        await swap(new, operation=operation, version=VersionId(app.session, 900))
    with pytest.raises(Conflict, match="another extent"):
        await swap(recoded(app, one))
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    with pytest.raises(Conflict, match="was removed"):
        await swap(recoded(app, new), old=new.id)


@story
async def test_a_degraded_extent_that_is_swapped_leaves_the_degraded_index(app):
    receipt = await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    (old,) = (await app.catalogue.lookup("f/a")).extents
    assert len(await app.catalogue.degraded(None, 10)) == 1
    await app.catalogue.swap_extent(app.operation(), receipt.version, 0, old.id, recoded(app, old))
    assert await app.catalogue.degraded(None, 10) == []
    assert app.catalogue.missing == 0


def held(extent, shard, generation=7):
    return Holding(extent.id, shard, generation)


def packed(holdings):
    return unpack_held(pack_held(holdings), None)


@story
async def test_a_stretch_tells_what_is_absent_wanted_dead_and_unknown(app):
    await app.put("f/fine")
    await app.put("f/absent")
    await app.put("f/wanted", pools=(1, MISSING, 3, 4, 5, 6))
    await app.put("f/elsewhere", pools=(2, 1, 3, 4, 5, 6))
    await app.put("f/not mine", pools=(1, 3, 4, 5, 6, MISSING))
    fine, absent, wanted, elsewhere = [
        await extent_of(app, f"f/{name}") for name in ("fine", "absent", "wanted", "elsewhere")
    ]
    dead = Extent(id=ExtentId(app.session, 40), layout=fine.layout, size=1, chunk_size=1, pools=fine.pools)
    young = Extent(id=ExtentId(app.session, 60), layout=fine.layout, size=1, chunk_size=1, pools=fine.pools)
    unknown = Extent(id=ExtentId(2**47, 1), layout=fine.layout, size=1, chunk_size=1, pools=fine.pools)
    await app.catalogue.raise_floor(app.session, 50)
    await app.catalogue.save_floors()
    holdings = sorted(
        [
            held(fine, 1),
            held(wanted, 1),
            held(elsewhere, 1),
            held(dead, 1),
            held(young, 1),
            held(unknown, 1),
        ]
    )
    stretch = await app.catalogue.reconcile(2, None, packed(holdings), last=True)
    assert stretch.absent == sorted([(absent.id, 1, 0), (elsewhere.id, 0, 0)])
    assert stretch.wanted == [(wanted.id, 1, 0)]
    assert sorted(stretch.drop) == sorted([held(elsewhere, 1), held(dead, 1)])
    assert stretch.unknown == [held(unknown, 1)]
    assert stretch.upto is None


@story
async def test_garbage_is_dropped_after_its_grace_only(app):
    await app.put("f/a")
    extent = await extent_of(app)
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    assert (await app.catalogue.reconcile(1, None, packed([held(extent, 0)]), last=True)).drop == []
    await trio.sleep(200)
    assert (await app.catalogue.reconcile(1, None, packed([held(extent, 0)]), last=True)).drop == [
        held(extent, 0)
    ]


@story
async def test_stretches_cover_everything_once_however_they_are_cut(app):
    names = [f"f/{number:04}" for number in range(MOST_AT_ONCE + 300)]
    version_session = app.session
    for start in range(0, len(names), 100):
        async with trio.open_nursery() as nursery:
            for name in names[start : start + 100]:
                nursery.start_soon(put_one, app, name)
    extents = sorted([await extent_of(app, name) for name in names], key=lambda one: one.id)
    mine = [held(extent, 0) for extent in extents if extent.id.counter % 3]
    absent, after, page = [], None, 150
    while True:
        behind = [one for one in mine if after is None or one.extent > after]
        last = len(behind) <= page
        stretch = await app.catalogue.reconcile(1, after, packed(behind[:page]), last=last)
        absent += stretch.absent
        assert stretch.drop == stretch.wanted == stretch.unknown == []
        if stretch.upto is None:
            break
        assert after is None or stretch.upto > after
        after = stretch.upto
    assert [one[0] for one in absent] == [one.id for one in extents if one.id.counter % 3 == 0]
    assert all(one[0].session == version_session for one in absent)
    # An emptied pool: no holdings at all, and more records than one answer takes.
    stretch = await app.catalogue.reconcile(1, None, {}, last=True)
    assert len(stretch.absent) == MOST_AT_ONCE
    rest = await app.catalogue.reconcile(1, stretch.upto, {}, last=True)
    assert len(rest.absent) == 300
    assert rest.upto is None


async def put_one(app, name):
    await app.put(name, layout="1+1", pools=(1, 2))


@story
async def test_versions_are_counted_by_the_machines_they_survive(app):
    await app.put("f/a")
    told = await app.catalogue.machine_survival([])
    assert [(one.survives, one.files, one.extents) for one in told] == [(1, 1, 1)]
    told = await app.catalogue.machine_survival([1, 2, 3])
    assert [(one.survives, one.files, one.extents) for one in told] == [(-1, 1, 1)]


# -- garbage ---------------------------------------------------------------------------------------


def holdings(extent):
    return [Holding(extent.id, index, 7) for index in range(len(extent.pools))]


@story
async def test_garbage_waits_out_its_grace_and_goes_when_all_have_confirmed(app):
    await app.put("f/a")
    (extent,) = (await app.catalogue.lookup("f/a")).extents
    shard = [holdings(extent)[0]]
    assert await app.catalogue.review(1, shard) == []
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    await trio.sleep(GRACE_S - 1)
    assert await app.catalogue.review(1, shard) == []
    assert not await app.catalogue.has_garbage(1)
    await trio.sleep(GRACE_S)
    assert await app.catalogue.review(1, shard) == shard
    for pool in range(1, 7):
        assert await app.catalogue.garbage(pool, None, 10) == [extent.id]
        assert app.catalogue.totals.garbage == 1
        await app.catalogue.confirm_dropped(pool, [extent.id])
        await app.catalogue.confirm_dropped(pool, [extent.id])
        assert not await app.catalogue.has_garbage(pool)
    assert app.catalogue.totals.garbage == 0
    assert await app.catalogue._engine.range(b"g/", b"g0", 10) == []
    assert await app.catalogue._engine.range(b"w/", b"w0", 10) == []


@story
async def test_garbage_comes_in_pages_oldest_first(app):
    gone = []
    for i in range(10):
        await app.put(f"f/{i}")
        gone.append((await app.catalogue.lookup(f"f/{i}")).extents[0].id)
        await app.catalogue.remove(app.operation(), f"f/{i}", ANYTHING)
        await trio.sleep(10)
    await trio.sleep(2 * GRACE_S)
    pages, after = [], None
    while page := await app.catalogue.garbage(3, after, 4):
        pages.append(page)
        after = page[-1]
    assert [len(page) for page in pages] == [4, 4, 2]
    assert [extent for page in pages for extent in page] == gone


def test_a_new_master_waits_a_whole_grace_again():
    async def main():
        disk = SimulatedDisk()
        async with open_app(SimulatedEngine(RUNTIME, disk)) as app:
            await app.put("f/a")
            (extent,) = (await app.catalogue.lookup("f/a")).extents
            await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
            await trio.sleep(GRACE_S - 5)
        async with open_app(SimulatedEngine(RUNTIME, disk)) as app:
            await trio.sleep(10)
            assert not await app.catalogue.has_garbage(1)
            await trio.sleep(GRACE_S)
            assert await app.catalogue.garbage(1, None, 10) == [extent.id]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@story
async def test_grace_counts_from_the_commit_and_not_from_the_judging(app):
    await app.put("f/a")
    engine = app.catalogue._engine

    async def slow():
        await trio.sleep(GRACE_S * 2)

    engine._flush = slow
    await app.catalogue.remove(app.operation(), "f/a", ANYTHING)
    assert not await app.catalogue.has_garbage(1)
    await trio.sleep(GRACE_S * 0.9)
    assert not await app.catalogue.has_garbage(1)
    await trio.sleep(GRACE_S * 0.2)
    assert await app.catalogue.has_garbage(1)


@story
async def test_a_shard_that_the_record_places_elsewhere_is_dead_and_a_missing_one_is_kept(app):
    await app.put("f/a", pools=(1, 2, 3, 4, 5, MISSING))
    (extent,) = (await app.catalogue.lookup("f/a")).extents
    shards = holdings(extent)
    assert await app.catalogue.review(2, shards) == [shards[i] for i in (0, 2, 3, 4)]
    assert await app.catalogue.review(6, shards) == shards[:5]


@story
async def test_orphans_die_with_their_session_or_below_its_durable_floor(app):
    orphan = Holding(ExtentId(app.session, 5), 0, 1)
    stranger = Holding(ExtentId(12345, 1), 0, 1)
    review = app.catalogue.review
    assert await review(1, [orphan, stranger]) == []
    await app.catalogue.raise_floor(app.session, 10)
    assert await review(1, [orphan, stranger]) == []  # A crash would take this floor back.
    await app.catalogue.save_floors()
    assert await review(1, [orphan, stranger]) == [orphan]
    high = Holding(ExtentId(app.session, 50), 0, 1)
    assert await review(1, [high]) == []
    await app.catalogue.close_session(app.session)
    assert await review(1, [high, stranger]) == [high]


def test_a_copy_of_the_catalogue_leaves_the_shards_of_later_sessions_alone():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        async with open_app(engine) as app:
            before = copy.deepcopy(engine.disk)
            later = await app.catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
            shards = [Holding(ExtentId(later, counter), 0, 1) for counter in (1, 10**6)]
        async with open_app(SimulatedEngine(RUNTIME, before)) as app:
            for _ in range(10):
                session = await app.catalogue.open_session("tcp://127.0.0.1:1", bytes(16))
                await app.catalogue.close_session(session)
            assert later not in app.catalogue.sessions
            assert await app.catalogue.review(1, shards) == []

    trio.run(main)


def test_a_session_never_gets_a_number_that_another_has():
    class Dice:
        """Throws each token twice, and zeros at first."""

        def __init__(self):
            self.throws = [bytes(6), *(bytes([n]) * 6 for n in (200, 100, 3) for _ in range(2))]

        def token(self, size_bytes):
            return self.throws.pop(0) if size_bytes == 6 else bytes(size_bytes)

    async def main():
        runtime = Runtime(clock=MockedClock(), entropy=Dice(), run_blocking=None)
        numbers = []

        async def open_session(catalogue):
            numbers.append(await catalogue.open_session("tcp://127.0.0.1:1", bytes(16)))

        disk = SimulatedDisk()
        async with (
            open_catalogue(SimulatedEngine(runtime, disk), runtime) as catalogue,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(open_session, catalogue)  # Both in one batch.
            nursery.start_soon(open_session, catalogue)
        async with open_catalogue(SimulatedEngine(runtime, disk), runtime) as catalogue:
            await open_session(catalogue)
            assert set(numbers) == set(catalogue.sessions)
        assert set(numbers) == {int.from_bytes(bytes([n]) * 6) >> 1 for n in (200, 100, 3)}
        assert max(numbers) < 2**47

    trio.run(main)


@story
async def test_a_floor_that_rose_by_much_is_made_durable_at_once(app):
    await app.catalogue.raise_floor(app.session, 999)
    assert app.catalogue.sessions[app.session].safe_floor == 0
    await app.catalogue.raise_floor(app.session, 1000)
    assert app.catalogue.sessions[app.session].safe_floor == 1000


@story
async def test_a_shard_is_not_dead_while_its_commit_is_being_flushed(app):
    version, extents = app.version()
    engine = app.catalogue._engine

    async def slow():
        await trio.sleep(10)

    engine._flush = slow
    verdicts = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.catalogue.commit, app.operation(), "f/a", ANYTHING, version, extents)
        await trio.sleep(1)
        nursery.start_soon(app.catalogue.close_session, app.session)
        for _ in range(25):
            verdicts += await app.catalogue.review(1, [holdings(extents[0])[0]])
            await trio.sleep(1)
    assert verdicts == []
    assert (await app.catalogue.lookup("f/a")).extents == extents


# -- masters ---------------------------------------------------------------------------------------


def test_a_master_of_a_lower_term_changes_nothing_more():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        async with open_app(engine) as old, open_app(engine) as new:
            assert new.catalogue.term == old.catalogue.term + 1
            assert new.catalogue.cluster_id == old.catalogue.cluster_id
            assert new.session != old.session
            with pytest.raises(NotMaster):
                await old.put("f/a")
            with pytest.raises(NotMaster):
                await old.catalogue.lookup("f/a")
            await new.put("f/a")
            assert new.catalogue.totals.files == 1

    trio.run(main)


def test_when_the_engine_fails_nothing_is_acknowledged_any_more():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        async with open_app(engine) as app:
            await app.put("f/a")
            disk = engine.crash()
            with pytest.raises(CatalogError):
                await app.put("f/b")
            with pytest.raises(CatalogError):
                await app.catalogue.lookup("f/a")
        async with open_app(SimulatedEngine(RUNTIME, disk)) as app:
            assert (await app.catalogue.lookup("f/a")).version.size == 1000
            assert app.catalogue.totals.files == 1

    trio.run(main)


def test_a_caller_whose_catalogue_closes_is_not_told_that_all_went_well():
    async def main():
        async def never():
            await trio.sleep(1000)

        failures = []

        async def put(app):
            try:
                await app.put("f/a")
            except CatalogError as error:
                failures.append(error)

        engine = SimulatedEngine(RUNTIME)
        async with trio.open_nursery() as nursery, open_app(engine) as app:
            engine._flush = never
            nursery.start_soon(put, app)
            await trio.sleep(1)
        assert len(failures) == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_catalogue_of_another_cluster_is_not_taken_for_ones_own():
    async def main():
        engine = SimulatedEngine(RUNTIME)
        with pytest.raises(IdentityError, match="is empty"):
            async with open_catalogue(engine, RUNTIME, cluster_id=bytes(16)):
                pass
        assert engine.revision == 0
        async with open_catalogue(engine, RUNTIME) as catalogue:
            own = catalogue.cluster_id
        revision = engine.revision
        with pytest.raises(IdentityError, match="of the cluster 0000"):
            async with open_catalogue(engine, RUNTIME, cluster_id=bytes(16)):
                pass
        assert engine.revision == revision
        async with open_catalogue(engine, RUNTIME, cluster_id=own) as catalogue:
            assert catalogue.term == 2

    trio.run(main)


# -- a full disk -------------------------------------------------------------------------------------


@story
async def test_a_change_that_finds_no_room_changes_nothing_and_can_be_repeated(app):
    catalogue, engine = app.catalogue, app.catalogue._engine
    await app.put("f/a")
    version, extents = app.version()
    operations = [app.operation() for _ in range(2)]

    async def change():
        await catalogue.commit(operations[0], "f/b", ABSENT, version, extents)
        await catalogue.remove(operations[1], "f/a", ANYTHING)

    before = copy.deepcopy(catalogue.totals)
    engine.full = True
    with pytest.raises(CatalogFull):
        await change()
    with pytest.raises(CatalogFull):
        await catalogue.remove(operations[1], "f/a", ANYTHING)
    with pytest.raises(CatalogFull):
        await catalogue.save_pool(pool_record(7))
    with pytest.raises(CatalogFull):
        await catalogue.close_session(app.session)
    assert not catalogue.failed()
    assert (catalogue.totals, len(catalogue.pools)) == (before, 6)
    assert (await catalogue.lookup("f/a")).extents
    engine.full = False
    await change()
    assert (await catalogue.lookup("f/b")).version.id == version.id
    with pytest.raises(NotFound):
        await catalogue.lookup("f/a")
    await trio.sleep(GRACE_S + 10)
    assert len(await catalogue.garbage(1, None, 10)) == 1
    await catalogue.close_session(app.session)
    assert catalogue.sessions[app.session].closed


@story
async def test_while_room_is_short_nothing_is_added_and_names_still_go(app):
    catalogue, engine = app.catalogue, app.catalogue._engine
    version, extents = app.version()
    done = (app.operation(), "f/a", ABSENT, version, extents)
    receipt = await catalogue.commit(*done)
    await app.put("f/b")
    engine.shortage = "the disk is full"
    for refused in (
        app.put("f/c"),
        catalogue.rename(app.operation(), "f/a", "f/copy", ABSENT, keep=True),
    ):
        with pytest.raises(CatalogFull, match="the disk is full"):
            await refused
    assert await catalogue.commit(*done) == receipt
    await catalogue.rename(app.operation(), "f/a", "f/moved", ABSENT, keep=False)
    await catalogue.remove(app.operation(), "f/b", ANYTHING)
    entries, _ = await catalogue.list_names("", "", 10, recursive=True)
    assert [entry.name for entry in entries] == ["f/moved"]
    assert catalogue.shortage == "the disk is full"
