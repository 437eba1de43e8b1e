"""Repair as the master sees it: which shard is rebuilt next, by which pool, and what came of it.

The degraded index of the catalogue is the truth about what is missing; everything here is memory that a new
master builds again. A bounded number of the most endangered extents is *planned*, each for the pool that
placement wants the shard on; pools ask for orders, and those that were handed out and not asked about again
are planned anew. One shard of an extent at a time: so that all extents that could not stand a loss are mended
before any gets its second shard, and so that the record's edition decides about every result.

When nothing is missing that could be rebuilt, shards are moved away from pools that are to be emptied, whose
disks failed or which an operator drains, and can still be read: planned the same way, from a walk through all
extents. When none is left there either, and there are other pools than at the last such walk, shards move to
where placement wants them by now. A shard that is moved stays recorded where it was until it was read back
where it is, so that no extent has less than it had at any moment.

Extents that were recorded elsewhere than placement wants, because a pool was down or full then, are *strays*:
a bounded number is remembered and looked at again when that pool can be used; beyond that all are walked.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.model import MISSING, Extent, ExtentId, PoolInfo, RepairStatus, shard_size
from droppexd.placement import Placement
from droppexd.roles.controller_pools import PoolTable
from droppexd.runtime import Clock
from droppexd.wire.messages import ExpectedShard, PoolAddress, RepairOrder, TakeWork

PLANNED = 4096
"""Extents that are planned at once, those in work included."""
PLAN_AGAIN = PLANNED // 2
"""With fewer than this more are read from the index."""
PAGE = 512
BYTES_AT_ONCE = 512 * 1024 * 1024
"""Bytes of shards in one answer to a pool, the first apart."""
LOOK_S = 2.0
"""Between two looks at an index from which there was nothing (more) to plan."""
BACK_OFF_S = 15.0
"""Before an order that could not be carried out is planned again."""
LEASE_S = 60.0
"""An order of a pool that has not asked for work for so long is planned anew."""
BACKED_OFF = 16_384
STRAYS = 16_384
"""Extents that are known to have shards outside of their placement set."""
STRAYS_S = 60.0
"""Between two looks at those that could not be moved, if no pool comes or goes: there may be room by now."""
LEFT_OVER = 16_384
"""Extents by pool that it is told to ask about, after a shard of them was moved away."""
BLOCK_BYTES = 4096
"""A shard takes about so much of a disk besides its own bytes."""
RATE_WINDOW_S = 10.0
PATIENCE = 3.0
"""A walk that looks for misplaced shards pauses so much longer than it takes."""

log = logging.getLogger("droppex.controller")


@dataclass(slots=True)
class _Planned:
    """A shard that is to be rebuilt."""

    extent: Extent
    shard: int
    pool: int
    balancing: bool
    handed: bool = False

    @property
    def size(self) -> int:
        return shard_size(self.extent.size, self.extent.chunk_size, self.extent.layout.k)


class _Wanted(NamedTuple):
    """A shard that is to be rebuilt, or moved."""

    extent: Extent
    shard: int
    target: int = MISSING
    """Where it is to go; MISSING: wherever there is room for it."""


@dataclass(slots=True)
class _Rate:
    """Bytes and shards of the last seconds."""

    events: deque[tuple[float, int]] = field(default_factory=deque)
    bytes: int = 0

    def add(self, now: float, size: int) -> None:
        self.events.append((now, size))
        self.bytes += size
        self.trim(now)

    def trim(self, now: float) -> None:
        while self.events and self.events[0][0] < now - RATE_WINDOW_S:
            self.bytes -= self.events.popleft()[1]


class Repair:
    """The planner of one master."""

    def __init__(self, catalogue: Catalogue, pools: PoolTable, clock: Clock) -> None:
        self._catalogue = catalogue
        self._pools = pools
        self._clock = clock
        self._planned: dict[ExtentId, _Planned] = {}
        # By pool, both in the order in which they came: what waits to be taken, and what is in work.
        self._queued: dict[int, dict[ExtentId, _Planned]] = {}
        self._handed: dict[int, dict[ExtentId, _Planned]] = {}
        self._asked_at: dict[int, float] = {}
        self._backed_off: dict[ExtentId, float] = {}
        self._news = trio.Event()
        self._idle_with_work: dict[int, None] = {}
        """Pools that got their first order, and were not told of it yet."""
        self._first_order = trio.Event()
        self._afresh = False
        self._view_version = -1
        self._infos: dict[int, PoolInfo] = {}
        self._placement = Placement(())
        self._writable: frozenset[int] = frozenset()
        self._left_over: dict[int, dict[ExtentId, None]] = {}
        """By pool: extents whose shard there was moved."""
        self._rate = _Rate()
        self._done = 0
        self._moving_stuck = 0
        """Shards on pools that are to be emptied for which the last look found no pool."""
        self._balanced: tuple[tuple[int, int, str, str], ...] | None = None
        """The pools for which everything was found in its place, as far as it could be moved."""
        self._balancing = 0
        self._misplaced_found = 0
        """By the walk that looks for them now, or the last."""
        self._strays: dict[ExtentId, None] = {}
        """Extents that were recorded outside of their placement set, where not all of that could be used."""
        self._strays_due = False
        """Whether some may be movable by now."""
        self._strays_looked_at = clock.now()
        self._too_many_strays = False
        """Whether only a walk through all extents finds them all."""
        catalogue.when_placed(self._placed)
        self._stuck = 0
        """Shards that the last look through the index found no pool for, or too few shards to read."""

    # -- what pools ask and tell ---------------------------------------------------------------

    def has_work(self, pool: int) -> bool:
        """Return whether there are orders for a pool."""
        return bool(self._queued.get(pool))

    async def idle_with_work(self) -> list[str]:
        """Wait until there are orders for pools that had none; return the addresses of those."""
        await self._first_order.wait()
        self._first_order = trio.Event()
        infos = self._view()
        pools = [infos[pool].address for pool in self._idle_with_work if pool in infos]
        self._idle_with_work.clear()
        return pools

    def take(self, request: TakeWork) -> tuple[tuple[RepairOrder, ...], tuple[PoolAddress, ...]]:
        """Return orders for a pool, and where the shards of their extents can be read."""
        now = self._clock.now()
        pool = request.number
        self._asked_at[pool] = now
        running = set(request.running)
        for extent in request.failed:
            self._back_off(extent, now)
        handed = self._handed.setdefault(pool, {})
        given_back = [one for one in handed.values() if one.extent.id not in running]
        self._release(given_back)
        if given_back and not request.room:
            self.look_afresh()  # It takes no more writes. What it had was the most endangered there was.
        orders: list[RepairOrder] = []
        queue = self._queued.get(pool, {})
        size = 0
        while queue and len(orders) < request.room and size < BYTES_AT_ONCE:
            planned = queue.pop(next(iter(queue)))
            planned.handed = True
            handed[planned.extent.id] = planned
            size += planned.size
            orders.append(RepairOrder(planned.extent, planned.shard))
        self._plan_on()
        return tuple(orders), self._addresses(orders)

    def _addresses(self, orders: Sequence[RepairOrder]) -> tuple[PoolAddress, ...]:
        numbers = {number for order in orders for number in order.extent.pools}
        infos = self._view()
        return tuple(
            PoolAddress(number, infos[number].address)
            for number in sorted(numbers)
            if number in infos and infos[number].readable
        )

    def recorded(
        self, pool: int, shards: Sequence[ExpectedShard], refused: Collection[ExpectedShard]
    ) -> None:
        """Take note of shards that a pool has reported: those that were not refused are there again."""
        now = self._clock.now()
        had_some = bool(self._planned)
        for place in shards:
            planned = self._planned.get(place.extent)
            if planned is not None and planned.pool == pool:
                self._forget(planned)
            if place not in refused:
                if planned is not None:
                    self._leave_over(planned)
                self._done += 1
                self._rate.add(now, planned.size if planned is not None else 0)
        if had_some and not self._planned:
            self._news.set()  # Was that all? Of an extent one shard at a time is planned.
        self._plan_on()

    def _leave_over(self, planned: _Planned) -> None:
        """Remember that a pool has a shard still that was moved from there."""
        before = planned.extent.pools[planned.shard]
        left = self._left_over.setdefault(before, {})
        if before not in (MISSING, planned.pool) and len(left) < LEFT_OVER:
            left[planned.extent.id] = None

    def has_left_over(self, pool: int) -> bool:
        """Return whether a pool should ask about shards that were moved away from it."""
        return bool(self._left_over.get(pool))

    def take_left_over(self, pool: int, limit: int) -> list[ExtentId]:
        """Return extents that a pool should ask about, once: it finds the rest when it asks about all."""
        left = self._left_over.get(pool, {})
        taken = sorted(left)[:limit]
        for extent in taken:
            del left[extent]
        return taken

    # -- what the master tells -----------------------------------------------------------------

    def pool_is_gone(self, pool: int) -> None:
        """Plan anew what a pool was to do that is down."""
        self._release(list(self._queued.get(pool, {}).values()))
        self._release(list(self._handed.get(pool, {}).values()))
        self.look_afresh()

    def look_afresh(self) -> None:
        """Begin again with the most endangered extents: there are new ones, or other pools."""
        self._afresh = True
        self._news.set()

    def status(self) -> RepairStatus:
        """Return how far it has come."""
        now = self._clock.now()
        self._rate.trim(now)
        missing = self._catalogue.missing
        if not missing:
            self._done = 0
        running = sum(map(len, self._handed.values()))
        shards_per_s = len(self._rate.events) / RATE_WINDOW_S
        return RepairStatus(
            done=self._done,
            left=missing,
            running=running,
            stuck=min(self._stuck, missing),
            bytes_per_s=int(self._rate.bytes / RATE_WINDOW_S),
            eta_s=int(missing / shards_per_s) if missing and shards_per_s else None,
            moving=sum(self._catalogue.places(pool) for pool in self._pools.leaving()),
            moving_stuck=self._moving_stuck if self._pools.leaving() else 0,
            balancing=self._balancing,
            balanced=self._catalogue.restored_ms is not None
            or (self._is_balanced() and not self._strays_due and not self._balancing),
        )

    # -- planning ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Plan for ever: from the degraded index, and again from its beginning when that changed."""
        while True:
            self._afresh = False
            for queue in self._queued.values():
                self._release(list(queue.values()))
            began = self._clock.now()
            stuck = await self._pass(self._degraded_pages())
            if stuck is not None:
                self._stuck = stuck
                moved = await self._empty_pools()
                if moved and all(one.balancing for one in self._planned.values()):
                    await self._balance()
            # A long look that finds nothing to do must not be all that the master does.
            await self._wait(max(LOOK_S, 10 * (self._clock.now() - began)))

    async def _empty_pools(self) -> bool:
        """Plan what is to leave its pool; return whether there was nothing more urgent."""
        if not self._pools.leaving():
            return True
        stuck = await self._pass(self._leaving_pages())
        if stuck is not None:
            self._moving_stuck = stuck
        return stuck is not None

    async def _balance(self) -> None:
        """Plan what placement wants elsewhere by now, unless all was found in its place for these pools."""
        if self._catalogue.restored_ms is not None:
            return
        again = bool(self._strays) and self._clock.now() >= self._strays_looked_at + STRAYS_S
        if (self._strays_due or again) and not await self._bring_back_strays():
            return
        if self._too_many_strays and len(self._strays) < STRAYS // 2:
            # Those that were remembered came home: so can the others.
            self._too_many_strays, self._balanced = False, None
        if self._is_balanced():
            return
        wanted = self._placement.inputs
        under_way = self._balancing = sum(one.balancing for one in self._planned.values())
        self._misplaced_found = 0
        # What cannot be moved for the moment counts, and so does what has just been moved, which may not have
        # been all of its extent: nobody would look again.
        done = await self._pass(self._misplaced_pages()) is not None
        if done and not under_way and not self._misplaced_found:
            self._balanced = wanted
            log.info("all shards are where placement wants them pools=%d", len(wanted))

    async def _bring_back_strays(self) -> bool:
        """Plan what can be moved of extents that are known to be astray; return whether all were seen."""
        self._strays_due = False
        self._strays_looked_at = self._clock.now()
        self._balancing = sum(one.balancing for one in self._planned.values())
        movable: list[ExtentId] = []
        done = await self._pass(self._stray_pages(movable)) is not None
        if not done or any(extent in self._strays and extent not in self._planned for extent in movable):
            self._strays_due = True
        return done

    def _placed(self, extent: Extent) -> None:
        """Take note of where an extent was recorded."""
        self._view()
        lacking = (
            self._placement.lacking(extent.id, extent.layout, extent.pools)
            if MISSING not in extent.pools
            else ()
        )
        if lacking:
            self._stray(extent.id)
            self._strays_due |= not self._writable.isdisjoint(lacking)
        else:
            self._strays.pop(extent.id, None)

    def _stray(self, extent: ExtentId) -> None:
        if len(self._strays) < STRAYS:
            self._strays[extent] = None
        else:
            self._too_many_strays = True

    def _is_balanced(self) -> bool:
        self._view()
        return self._balanced == self._placement.inputs

    async def _pass(self, pages: AsyncGenerator[list[_Wanted], None]) -> int | None:
        """Plan what the pages bring, as there is room; return how much of it has no pool to go to.

        None when it was not finished because there is something more urgent.
        """
        stuck = 0
        async with aclosing(pages):
            async for page in pages:
                stuck += self._plan(page)
                while len(self._planned) >= PLAN_AGAIN and not self._afresh:
                    await self._wait(LOOK_S)
                if self._afresh:
                    return None
        return stuck

    async def _wait(self, timeout_s: float) -> None:
        self._news = trio.Event()
        if not self._afresh:
            with trio.move_on_after(timeout_s):
                await self._news.wait()
        self._expire()
        self._look_at_pools()

    async def _degraded_pages(self) -> AsyncGenerator[list[_Wanted], None]:
        """Yield extents with the shard that each is to get, the most endangered first."""
        after: tuple[int, ExtentId] | None = None
        while True:
            page = await self._catalogue.degraded(after, PAGE)
            records = await self._catalogue.records([extent for _, extent in page])
            infos = self._view()
            extents = [one.extent for one in records if one is not None and MISSING in one.extent.pools]
            extents.sort(key=lambda extent: _readable(extent, infos) - extent.layout.k)
            yield [_Wanted(extent, extent.pools.index(MISSING)) for extent in extents]
            if len(page) < PAGE:
                return
            after = page[-1]

    async def _leaving_pages(self) -> AsyncGenerator[list[_Wanted], None]:
        """Yield extents that have a shard on a pool that is to be emptied, with the first such shard."""
        after: ExtentId | None = None
        while any(self._catalogue.places(pool) for pool in self._pools.leaving()):
            leaving = self._pools.leaving()
            page = await self._catalogue.extents(after, PAGE)
            yield [
                _Wanted(extent, next(at for at, pool in enumerate(extent.pools) if pool in leaving))
                for extent in page
                if not leaving.isdisjoint(extent.pools) and MISSING not in extent.pools
            ]
            if len(page) < PAGE:
                return
            after = page[-1].id

    async def _misplaced_pages(self) -> AsyncGenerator[list[_Wanted], None]:
        """Yield extents that have a shard elsewhere than placement wants, with where it goes."""
        after: ExtentId | None = None
        while True:
            began = self._clock.now()
            page = await self._catalogue.extents(after, PAGE)
            self._view()
            found = [move for extent in page if (move := self._misplaced(extent)) is not None]
            self._balancing += len(found)
            self._misplaced_found += len(found)
            took_s = self._clock.now() - began  # Without the wait until what was found can be planned.
            yield found
            if len(page) < PAGE:
                return
            after = page[-1].id
            # Nothing waits for this: clients come first.
            await trio.sleep(PATIENCE * took_s)

    async def _stray_pages(self, movable: list[ExtentId]) -> AsyncGenerator[list[_Wanted], None]:
        """Yield the extents that are known to be astray and can be moved, and gather their ids."""
        strays = list(self._strays)
        for start in range(0, len(strays), PAGE):
            began = self._clock.now()
            some = strays[start : start + PAGE]
            records = await self._catalogue.records(some)
            self._view()
            found: list[_Wanted] = []
            for stray, record in zip(some, records, strict=True):
                if record is None or MISSING in record.extent.pools:
                    self._strays.pop(stray, None)
                elif (move := self._misplaced(record.extent)) is not None:
                    found.append(move)
            movable += [wanted.extent.id for wanted in found]
            self._balancing += len(found)
            took_s = self._clock.now() - began
            yield found
            await trio.sleep(PATIENCE * took_s)

    def _misplaced(self, extent: Extent) -> _Wanted | None:
        if MISSING in extent.pools or extent.id in self._planned:
            return None
        if not self._placement.lacking(extent.id, extent.layout, extent.pools):
            self._strays.pop(extent.id, None)
            return None
        size = shard_size(extent.size, extent.chunk_size, extent.layout.k) + BLOCK_BYTES
        wanted = partial(self._placement.move, extent.id, extent.layout, extent.pools)
        move = wanted(partial(self._usable, size=size))
        if move is None and wanted(lambda _: True) is None:
            self._strays.pop(extent.id, None)  # It is safer where it is.
            return None
        self._stray(extent.id)
        return None if move is None else _Wanted(extent, *move)

    def _plan(self, wanted: Sequence[_Wanted]) -> int:
        """Plan these shards; return how many of them cannot be rebuilt now."""
        now = self._clock.now()
        infos = self._view()
        stuck = 0
        for extent, shard, target in wanted:
            if extent.id in self._planned or self._is_backed_off(extent.id, now):
                continue
            if _readable(extent, infos) < extent.layout.k:
                stuck += 1
                continue
            pool = target
            if pool == MISSING:
                others = [number for at, number in enumerate(extent.pools) if at != shard]
                size = shard_size(extent.size, extent.chunk_size, extent.layout.k) + BLOCK_BYTES
                pool = self._placement.spare(
                    extent.id, extent.layout, others, partial(self._usable, size=size)
                )
                if not self._is_balanced():
                    self._balanced = None  # Else it would hold again when the pools of then are back.
            if pool == MISSING:
                stuck += 1
                continue
            planned = _Planned(extent, shard, pool, target != MISSING)
            self._planned[extent.id] = planned
            queue = self._queued.setdefault(pool, {})
            if not queue and not self._handed.get(pool):
                self._idle_with_work[pool] = None
                self._first_order.set()
            queue[extent.id] = planned
        return stuck

    def _look_at_pools(self) -> None:
        """Plan anew when there are other pools that take writes, and what was to go to those that do not."""
        writable = frozenset(number for number, info in self._view().items() if info.writable)
        if writable == self._writable:
            return
        for pool in self._writable - writable:
            self._release(list(self._queued.get(pool, {}).values()))
        self._writable = writable
        self._strays_due = bool(self._strays)
        if self._too_many_strays:
            self._too_many_strays, self._balanced = False, None
        self.look_afresh()

    def _usable(self, pool: int, *, size: int) -> bool:
        info = self._infos.get(pool)
        return info is not None and info.writable and info.free >= size

    def _view(self) -> dict[int, PoolInfo]:
        if self._view_version != self._pools.version:
            self._view_version = self._pools.version
            pools = self._pools.map().pools
            self._infos = {pool.number: pool for pool in pools}
            self._placement = Placement(pools)
        return self._infos

    # -- what is planned no more ---------------------------------------------------------------

    def _plan_on(self) -> None:
        if len(self._planned) < PLAN_AGAIN and (self._catalogue.missing or self._balancing):
            self._news.set()

    def _back_off(self, extent: ExtentId, now: float) -> None:
        planned = self._planned.get(extent)
        if planned is not None:
            self._forget(planned)
        self._backed_off[extent] = now + BACK_OFF_S
        if len(self._backed_off) > BACKED_OFF:
            del self._backed_off[next(iter(self._backed_off))]

    def _is_backed_off(self, extent: ExtentId, now: float) -> bool:
        until = self._backed_off.get(extent)
        if until is None:
            return False
        if now < until:
            return True
        del self._backed_off[extent]
        return False

    def _expire(self) -> None:
        silent_since = self._clock.now() - LEASE_S
        for pool, handed in self._handed.items():
            if handed and self._asked_at.get(pool, 0.0) < silent_since:
                self._release(list(handed.values()))

    def _release(self, planned: Sequence[_Planned]) -> None:
        """Forget planned shards: the index still has them."""
        for one in planned:
            self._forget(one)

    def _forget(self, planned: _Planned) -> None:
        extent = planned.extent.id
        del self._planned[extent]
        self._balancing -= planned.balancing and self._balancing > 0
        self._strays_due |= extent in self._strays
        del (self._handed if planned.handed else self._queued)[planned.pool][extent]


def _readable(extent: Extent, infos: dict[int, PoolInfo]) -> int:
    """Return how many shards of an extent can be read now."""
    return sum(number in infos and infos[number].readable for number in extent.pools)
