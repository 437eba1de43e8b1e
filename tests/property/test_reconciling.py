"""Comparing in stretches and slices against the obvious way: one shard, and one record, after another."""

from itertools import groupby

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from droppexd.catalog import reconciling
from droppexd.catalog.engine import Operation
from droppexd.catalog.keys import extent_key, garbage_key
from droppexd.catalog.reconciling import Judge, reconcile
from droppexd.catalog.records import Garbage, pack_extent, pack_garbage
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.held import pack_held, unpack_held
from droppexd.model import MISSING, Extent, ExtentId, Holding, Layout, VersionId
from droppexd.runtime import Runtime

POOL, OTHER = 3, 4
RIPE = 5
SPENT = {1: 2**48, 2: 6, 3: None}
"""A session that has ended, one that goes on, and one of another history."""

ids = st.builds(ExtentId, st.sampled_from(sorted(SPENT)), st.integers(0, 12))
places = st.lists(st.sampled_from([POOL, OTHER, MISSING, 9]), min_size=3, max_size=3).filter(
    lambda pools: pools.count(POOL) <= 1
)
records = st.dictionaries(ids, places, max_size=25)
garbage = st.dictionaries(ids, st.integers(RIPE - 1, RIPE + 1), max_size=10)
restored = st.none() | st.frozensets(st.sampled_from([OTHER, 9]))
"""Which pools have compared with a restored catalogue; None: it is none."""
held = st.sets(st.tuples(ids, st.integers(0, 3)), max_size=40)


class FixedClock:
    """A clock that goes on by a step whenever it is asked."""

    def __init__(self, step_s=0.0):
        self._step_s = step_s
        self._now = 0.0

    def now(self):
        self._now += self._step_s
        return self._now

    def wall_ms(self):
        return 1


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(reconciling, "MOST_AT_ONCE", 6)
    monkeypatch.setattr(reconciling, "MOST_SLICES", 3)


def record_of(extent, pools):
    return Extent(
        id=extent, layout=Layout(1, 2), size=1, chunk_size=1, pools=tuple(pools), edition=extent.counter
    )


async def engine_with(named, dead):
    engine = SimulatedEngine(Runtime(clock=FixedClock(), entropy=None, run_blocking=None))
    operations = [
        Operation(extent_key(extent), pack_extent(record_of(extent, pools), VersionId(extent.session, 0)))
        for extent, pools in named.items()
    ]
    operations += [
        Operation(garbage_key(extent), pack_garbage(Garbage(epoch, (POOL,))))
        for extent, epoch in dead.items()
        if extent not in named
    ]
    if operations:
        await engine.txn([], operations)
    return engine


def expected(named, dead, holdings, proven):
    found = {"absent": [], "wanted": [], "drop": [], "unknown": []}
    here = {(holding.extent, holding.shard) for holding in holdings}
    for extent, pools in sorted(named.items()):
        if POOL in pools and (extent, pools.index(POOL)) not in here:
            found["absent"].append((extent, pools.index(POOL), extent.counter))
    for holding in holdings:
        extent, shard, _ = holding
        spent = SPENT[extent.session]
        if extent in named:
            pools = named[extent]
            if shard >= len(pools):
                continue
            if pools[shard] == MISSING:
                if POOL not in pools:
                    found["wanted"].append((extent, shard, extent.counter))
            elif pools[shard] == POOL:
                continue
            elif proven is None:
                found["drop"].append(holding)
            elif POOL not in pools and pools[shard] not in proven:
                found["wanted"].append((extent, shard, extent.counter))
        elif extent in dead:
            if dead[extent] <= RIPE:
                found["drop"].append(holding)
        elif spent is None:
            found["unknown"].append(holding)
        elif extent.counter < spent:
            found["drop"].append(holding)
    return found


def pages(holdings, length):
    """Cut into pages of about a length, none within an extent."""
    page = []
    for _, group in groupby(holdings, key=lambda holding: holding.extent):
        page += group
        if len(page) >= length:
            yield page
            page = []
    if page:
        yield page


HALF_AND_MORE = {
    ExtentId(1, number): [POOL if number % 2 or number >= 6 else OTHER, 9, MISSING] for number in range(12)
}
"""Of the first slice three are absent, of the second six: more than one answer takes."""


def test_an_answer_has_room_for_as_many_of_each_kind():
    named = {ExtentId(1, n): [POOL if n % 2 and n < 6 else OTHER, 9, 9] for n in range(12)}
    holdings = [Holding(ExtentId(1, n), 0, 1) for n in range(6, 12)]

    async def compare():
        judge = Judge(RIPE, SPENT.__getitem__)
        packed = unpack_held(pack_held(holdings), None)
        return await reconcile(
            await engine_with(named, {}), judge, FixedClock(), POOL, None, packed, last=True
        )

    stretch = trio.run(compare)
    assert [extent.counter for extent, _, _ in stretch.absent] == [1, 3, 5]
    assert stretch.drop == holdings
    assert stretch.upto == ExtentId(1, 11)


def test_a_stretch_ends_behind_the_slice_that_takes_too_long():
    named = {ExtentId(1, n): [OTHER, 9, 9] for n in range(40)}

    async def reached(step_s):
        judge = Judge(RIPE, SPENT.__getitem__)
        engine = await engine_with(named, {})
        stretch = await reconcile(engine, judge, FixedClock(step_s), POOL, None, {}, last=True)
        return stretch.upto.counter

    assert trio.run(reached, 0.0) == 17
    assert trio.run(reached, reconciling.MOST_S * 0.6) == 11
    assert trio.run(reached, reconciling.MOST_S * 2) == 5


@settings(max_examples=200, deadline=None)
@example(HALF_AND_MORE, {}, set(), 20, False, 0.0, None)
@example(HALF_AND_MORE, {}, set(), 20, True, 0.0, None)
@example(HALF_AND_MORE, {}, set(), 20, True, 1.0, None)
@given(records, garbage, held, st.integers(1, 20), st.booleans(), st.sampled_from([0.0, 0.16, 1.0]), restored)
def test_all_stretches_together_tell_what_one_look_at_everything_would(
    named, dead, shards, length, eager, step_s, proven
):
    holdings = [Holding(extent, shard, 1 + number) for number, (extent, shard) in enumerate(sorted(shards))]

    async def compare():
        engine = await engine_with(named, dead)
        judge = Judge(RIPE, SPENT.__getitem__, proven)
        found = {"absent": [], "wanted": [], "drop": [], "unknown": []}
        after = None
        while True:
            behind = [holding for holding in holdings if after is None or holding.extent > after]
            page = next(pages(behind, length), [])
            packed = unpack_held(pack_held(page), after)
            last = not page or (eager and len(page) == len(behind))
            stretch = await reconcile(engine, judge, FixedClock(step_s), POOL, after, packed, last=last)
            for kind in found:
                assert len(getattr(stretch, kind)) <= reconciling.MOST_AT_ONCE
                found[kind] += getattr(stretch, kind)
            if stretch.upto is None:
                return found
            assert after is None or stretch.upto > after
            assert last or stretch.upto <= page[-1].extent
            after = stretch.upto

    found = trio.run(compare)
    for kind, one in expected(named, dead, holdings, proven).items():
        assert sorted(found[kind]) == sorted(one), kind
