"""The catalogue against a dictionary, and its counters against a recount of everything."""

import itertools
import random
from collections import Counter

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.catalog import keys
from droppexd.catalog.catalogue import open_catalogue
from droppexd.catalog.changes import Expected
from droppexd.catalog.placements import survives_machines, survives_pools
from droppexd.catalog.records import (
    unpack_extent,
    unpack_fields,
    unpack_garbage,
    unpack_name,
    unpack_totals,
    unpack_version,
)
from droppexd.catalog.simulated import SimulatedDisk, SimulatedEngine
from droppexd.errors import CatalogError, Conflict, NotFound
from droppexd.model import (
    MISSING,
    Extent,
    ExtentId,
    Layout,
    OperationId,
    PoolRecord,
    Version,
    VersionId,
)
from droppexd.runtime import Runtime

POOLS = 7
NAMES = ["f/a", "f/b", "f/c", "g/a", "g/h/a"]


class MockedClock:
    def now(self):
        return trio.current_time()

    def wall_ms(self):
        return 1


class SeededEntropy:
    def __init__(self):
        self.random = random.Random(1)

    def token(self, size_bytes):
        return self.random.randbytes(size_bytes)


RUNTIME = Runtime(clock=MockedClock(), entropy=SeededEntropy(), run_blocking=None)


async def add_pools(catalogue):
    for number in range(len(catalogue.pools) + 1, POOLS + 1):
        await catalogue.save_pool(
            PoolRecord(
                number=0,
                pool_id=bytes([number]) * 16,
                name=f"p{number}",
                machine=f"m{number // 2}",
                zone="",
                address=f"tcp://127.0.0.1:{number}",
            )
        )


class App:
    def __init__(self, catalogue, session, seed):
        self.catalogue = catalogue
        self.session = session
        self.random = random.Random(seed)
        self.counter = 0

    def next(self):
        self.counter += 1
        return self.counter

    def operation(self):
        return OperationId(self.session, self.next())

    def upload(self, extents):
        version = VersionId(self.session, self.next())
        made = []
        for _ in range(extents):
            layout = self.random.choice([Layout(1, 2), Layout(4, 2), Layout(2, 1)])
            pools = self.random.sample(range(1, POOLS + 1), layout.total)
            for index in self.random.sample(range(layout.total), self.random.randint(0, layout.m - 1)):
                pools[index] = MISSING
            made.append(
                Extent(
                    id=ExtentId(self.session, self.next()),
                    layout=layout,
                    size=self.random.randint(1, 9999),
                    chunk_size=4096,
                    pools=tuple(pools),
                )
            )
        size = sum(extent.size for extent in made)
        ids = tuple(extent.id for extent in made)
        return Version(id=version, size=size, blake3=bytes(32), extents=ids), made


async def everything(engine):
    return await engine.range(b"", b"\xff", 10_000)


async def recount(engine):
    """Check that all that is derived agrees with the names, versions and extents there are."""
    found = {entry.key: entry.value for entry in await everything(engine)}

    def under(prefix):
        return {key: value for key, value in found.items() if key.startswith(prefix)}

    names = {key[2:].decode(): unpack_name(value) for key, value in under(b"n/").items()}
    versions = {
        VersionId(*keys.parse_id(key)): unpack_version(VersionId(*keys.parse_id(key)), value)
        for key, value in under(b"v/").items()
    }
    stored = {
        keys.parse_id(key): unpack_extent(ExtentId(*keys.parse_id(key)), value)
        for key, value in under(b"e/").items()
    }
    assert Counter(name.version for name in names.values()) == {v.id: v.names for v in versions.values()}
    assert all(name.size == versions[name.version].size for name in names.values())
    owners = {extent: version.id for version in versions.values() for extent in version.extents}
    assert owners == {one.extent.id: one.version for one in stored.values()}
    extents = [one.extent for one in stored.values()]

    assert set(under(b"x/")) == {keys.large_key(v.id) for v in versions.values() if len(v.extents) > 1}
    assert set(under(b"d/")) == {
        keys.degraded_key(extent.survives, extent.id) for extent in extents if MISSING in extent.pools
    }
    counts: dict = {}
    for extent in extents:
        version = versions[owners[extent.id]]
        one = counts.setdefault(keys.placement_of(extent.layout, extent.pools), [0, 0])
        one[0] += 1
        one[1] += version.names if len(version.extents) == 1 else 0
    assert counts == {
        keys.parse_placement(key): unpack_fields(value, "placement") for key, value in under(b"c/").items()
    }
    garbage = {keys.parse_id(key): unpack_garbage(value) for key, value in under(b"g/").items()}
    assert not set(garbage) & set(stored)
    assert set(under(b"w/")) == {
        keys.work_key(pool, dead.epoch, ExtentId(*extent))
        for extent, dead in garbage.items()
        for pool in dead.pools
    }
    totals = unpack_totals(found[keys.TOTALS]) if keys.TOTALS in found else (0, 0, 0, 0, 0)
    empty = sum(v.names for v in versions.values() if not v.extents)
    size = sum(version.size for version in versions.values())
    assert totals == (len(names), size, len(extents), len(garbage), empty)
    return names, versions, extents


async def check_survival(catalogue, versions, extents, lost):
    """Compare with the obvious way: look at every extent of every file."""
    by_id = {extent.id: extent for extent in extents}

    def survives(extent):
        return sum(pool != MISSING and pool not in lost for pool in extent.pools) - extent.layout.k

    files, all_extents = Counter(), Counter(survives(extent) for extent in extents)
    for version in versions.values():
        if version.extents:
            files[min(survives(by_id[one]) for one in version.extents)] += version.names
    told = await catalogue.survival(lost)
    assert {count.survives: (count.files, count.extents) for count in told} == {
        level: (files[level], all_extents[level]) for level in {*files, *all_extents}
    }


name = st.sampled_from(NAMES)
expected = st.sampled_from(["anything", "absent", "match", "mismatch"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), name, expected, st.integers(0, 3)),
        st.tuples(st.just("put"), name, st.just("anything"), st.just(1)),
        st.tuples(st.just("remove"), name, expected),
        st.tuples(st.just("rename"), name, name, expected, st.booleans()),
        st.tuples(st.just("move shard"), name, st.integers(0, 5), st.integers(0, POOLS)),
        st.tuples(st.just("confirm"), st.integers(1, POOLS)),
        st.tuples(st.just("reopen")),
    ),
    max_size=30,
)


class Model:
    """Names and the versions they point at."""

    def __init__(self):
        self.names = {}

    def expected(self, kind, name):
        if kind == "absent":
            return Expected(absent=True), name not in self.names
        if kind == "match":
            return Expected(version=self.names.get(name, VersionId(9, 9))), name in self.names
        if kind == "mismatch":
            return Expected(version=VersionId(9, 9)), False
        return Expected(), True


async def carry_out(app, model, step):
    catalogue = app.catalogue
    match step:
        case "put", name, kind, extents:
            version, made = app.upload(extents)
            condition, holds = model.expected(kind, name)
            try:
                receipt = await catalogue.commit(app.operation(), name, condition, version, made)
            except Conflict:
                assert not holds
            else:
                assert holds
                assert receipt.replaced is (name in model.names)
                model.names[name] = version.id
        case "remove", name, kind:
            condition, holds = model.expected(kind, name)
            there = name in model.names
            try:
                version = await catalogue.remove(app.operation(), name, condition)
            except NotFound:
                assert not there
            except Conflict:
                assert there
                assert not holds
            else:
                assert version == model.names.pop(name)
        case "rename", source, target, kind, keep:
            condition, holds = model.expected(kind, target)
            there = source in model.names
            try:
                version = await catalogue.rename(app.operation(), source, target, condition, keep=keep)
            except NotFound:
                assert not there
            except Conflict:
                assert there
                assert not holds
            else:
                assert holds
                assert version == model.names[source]
                if not keep:
                    del model.names[source]
                model.names[target] = version
        case "move shard", name, index, pool:
            if name in model.names:
                for extent in (await catalogue.lookup(name)).extents:
                    shard = index % len(extent.pools)
                    holder = extent.pools[shard]
                    if pool == MISSING:
                        # Where nobody is on record, some pool tells of a shard that it was never named for.
                        teller = 1 if holder == MISSING else holder
                        lost = await catalogue.lose_shards(teller, [(extent.id, shard, False)])
                        assert lost == (holder != MISSING)
                    else:
                        refused = await catalogue.place_shards(
                            pool, catalogue.pools[pool].boot_id, [(extent.id, shard, extent.edition)]
                        )
                        assert bool(refused) is (pool in extent.pools and holder != pool)
        case "confirm", pool:
            await trio.sleep(200)
            page = await catalogue.garbage(pool, None, 3)
            await catalogue.confirm_dropped(pool, page)


@settings(max_examples=120, deadline=None)
@given(steps, st.sets(st.integers(1, POOLS), max_size=3), st.integers(0, 2**32))
def test_names_are_as_in_a_dictionary_and_counters_as_in_a_recount(story, lost, seed):
    async def main():
        disk, model, todo = SimulatedDisk(), Model(), list(story)
        while True:
            engine = SimulatedEngine(RUNTIME, disk)
            async with open_catalogue(engine, RUNTIME) as catalogue:
                await add_pools(catalogue)
                app = App(catalogue, await catalogue.open_session("tcp://x:1", bytes(16)), seed)
                while todo and todo[0] != ("reopen",):
                    await carry_out(app, model, todo.pop(0))
                names, versions, extents = await recount(engine)
                assert {name: record.version for name, record in names.items()} == model.names
                await check_survival(catalogue, versions, extents, lost)
                await check_survival(catalogue, versions, extents, set())
                if not todo:
                    return
                todo.pop(0)
                disk = engine.crash()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 3), st.integers(0, 2**32))
def test_a_crash_among_many_commits_keeps_all_that_was_acknowledged(count, crash_after, written, seed):
    async def main():
        async def flush():
            await trio.sleep(1)

        acknowledged = []
        engine = SimulatedEngine(RUNTIME, flush=flush)

        async def put(app, name, delay_s):
            await trio.sleep(delay_s)
            version, made = app.upload(1)
            try:
                await app.catalogue.commit(app.operation(), name, Expected(), version, made)
            except CatalogError:
                return
            acknowledged.append(name)

        async with open_catalogue(engine, RUNTIME) as catalogue:
            await add_pools(catalogue)
            app = App(catalogue, await catalogue.open_session("tcp://x:1", bytes(16)), seed)
            async with trio.open_nursery() as nursery:
                for i in range(count):
                    nursery.start_soon(put, app, f"f/{i}", app.random.uniform(0, 8))
                await trio.sleep(crash_after / 3 + 0.01)
                disk = engine.crash(written=written)
        again = SimulatedEngine(RUNTIME, disk)
        async with open_catalogue(again, RUNTIME) as catalogue:
            names, _, _ = await recount(again)
            assert set(acknowledged) <= set(names)
            for name in acknowledged:
                await catalogue.lookup(name)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.data())
def test_survival_is_what_trying_every_loss_says(k, m, data):
    pools = tuple(data.draw(st.permutations(range(1, 10)))[: k + m])
    pools = tuple(data.draw(st.sampled_from([pool, pool, MISSING])) for pool in pools)
    machines = {pool: f"m{data.draw(st.integers(0, 3))}" for pool in range(1, 10)}
    lost = data.draw(st.sets(st.integers(1, 9), max_size=3))

    def most_losses(readable_without, units):
        if not readable_without(()):
            return None
        for count in range(1, len(units) + 1):
            if not all(readable_without(gone) for gone in itertools.combinations(units, count)):
                return count - 1
        raise AssertionError("no shard is needed")

    def without_pools(gone):
        return sum(pool != MISSING and pool not in lost and pool not in gone for pool in pools) >= k

    def without_machines(gone):
        return without_pools([pool for pool in pools if pool != MISSING and machines[pool] in gone])

    placement = (k, m, pools)
    for told, true in (
        (survives_pools(placement, lost), most_losses(without_pools, sorted({*pools} - {MISSING, *lost}))),
        (
            survives_machines(placement, machines, lost),
            most_losses(
                without_machines, sorted({machines[p] for p in pools if p != MISSING and p not in lost})
            ),
        ),
    ):
        assert told < 0 if true is None else told == true
