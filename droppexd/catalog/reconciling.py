"""What the records say of what a pool holds, both ways: a stretch of shards against a stretch of records."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from droppexd.catalog.engine import Engine
from droppexd.catalog.keys import EXTENTS, end_of, extent_key, garbage_key, parse_id
from droppexd.catalog.records import unpack_extent, unpack_garbage
from droppexd.model import MISSING, Extent, ExtentId, Holding

MOST_RECORDS = 1000
"""Records that one stretch covers: as many absent shards as one answer takes."""

Expected = tuple[ExtentId, int, int]
"""An extent, the index of a shard, and the edition of the record."""


class Stretch(NamedTuple):
    """The verdicts on a stretch. `upto` is the extent it ends with; None: there is nothing behind it."""

    absent: list[Expected]
    wanted: list[Expected]
    drop: list[Holding]
    unknown: list[Holding]
    upto: ExtentId | None


class Judge(NamedTuple):
    """What a master knows of extents without a record. Read before the records are: see `is_dead`."""

    ripe: int
    """The newest epoch of garbage that may be dropped."""
    over: Callable[[ExtentId], bool]
    """Whether no commit can name an extent any more."""
    known: Callable[[ExtentId], bool]
    """Whether the extent's session is one of this catalogue's."""


async def reconcile(
    engine: Engine,
    judge: Judge,
    pool: int,
    after: ExtentId | None,
    holdings: Sequence[Holding],
    *,
    last: bool,
) -> Stretch:
    """Compare what a pool holds behind `after` with the records, as far as one answer goes.

    `holdings` are ordered and have all shards of each of their extents; with `last` there are no more.
    What is absent may have been stored since the pool looked: it looks again before it says that it is lost.
    """
    over = {holding.extent for holding in holdings if judge.over(holding.extent)}
    start = EXTENTS if after is None else extent_key(after) + b"\0"
    end = end_of(EXTENTS) if last or not holdings else extent_key(holdings[-1].extent) + b"\0"
    found = await engine.range(start, end, MOST_RECORDS)
    records = {}
    for entry in found:
        extent_id = ExtentId(*parse_id(entry.key))
        records[extent_id] = unpack_extent(extent_id, entry.value).extent
    upto: ExtentId | None
    if len(found) == MOST_RECORDS:
        upto = next(reversed(records))
        holdings = [holding for holding in holdings if holding.extent <= upto]
    else:
        upto = None if last else holdings[-1].extent if holdings else after
    stretch = Stretch([], [], [], [], upto)
    held = {(holding.extent, holding.shard) for holding in holdings}
    for extent in records.values():
        if pool in extent.pools:
            shard = extent.pools.index(pool)
            if (extent.id, shard) not in held:
                stretch.absent.append((extent.id, shard, extent.edition))
    unnamed = [holding for holding in holdings if holding.extent not in records]
    garbage = await engine.get([garbage_key(holding.extent) for holding in unnamed]) if unnamed else []
    for holding, entry_or_none in zip(unnamed, garbage, strict=True):
        if entry_or_none is not None:
            if unpack_garbage(entry_or_none.value).epoch <= judge.ripe:
                stretch.drop.append(holding)
        elif holding.extent in over:
            stretch.drop.append(holding)
        elif not judge.known(holding.extent):
            stretch.unknown.append(holding)
    for holding in holdings:
        extent_or_none = records.get(holding.extent)
        if extent_or_none is not None:
            _judge_named(stretch, pool, holding, extent_or_none)
    return stretch


def _judge_named(stretch: Stretch, pool: int, holding: Holding, extent: Extent) -> None:
    if holding.shard >= len(extent.pools):
        return
    holder = extent.pools[holding.shard]
    if holder == MISSING:
        if pool not in extent.pools:
            stretch.wanted.append((extent.id, holding.shard, extent.edition))
    elif holder != pool:
        stretch.drop.append(holding)
