"""What the master does about pools that lose shards: for good, for a while, or some of them.

Handlers for what pools report, and three tasks: one walks the extents of pools that are out or removed and
records their shards as missing, one (`controller_repair`) plans what is rebuilt where, and one tells pools
that there is work for them.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.errors import CatalogFull, Conflict
from droppexd.held import unpack_held
from droppexd.model import ExtentId, Membership, PoolRecord
from droppexd.placement import choose_layout
from droppexd.roles.controller_pools import PoolTable
from droppexd.roles.controller_repair import Repair
from droppexd.runtime import Clock
from droppexd.wire.messages import (
    Done,
    ExpectedShard,
    PoolReplaced,
    Reconcile,
    Reconciled,
    Recorded,
    ReplacePool,
    ReportLost,
    Request,
    ShardsStored,
    TakeWork,
    Work,
)
from droppexd.wire.pool_messages import DrainPool, PoolDrained, PoolRemoved, RemovePool, WorkWaits
from droppexd.wire.rpc import Answer, Call, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.controller")

PAGE = 1000
"""Extents that are looked at, and changed, together."""
LOOK_S = 5.0
"""Between two looks for pools that are out and still named by records."""
FRESH_S = 5.0
"""While a long walk goes on, repair begins anew with the most endangered extents so often."""

Body = Sequence[Frame]


class Care:
    """Losses, and how they are made good. Made by the controller, which runs its tasks."""

    def __init__(
        self,
        catalogue: Catalogue,
        pools: PoolTable,
        pool_records: trio.Lock,
        clock: Clock,
        check_term: Callable[[], None],
        tell: Callable[[Request[Any], Sequence[str]], Awaitable[object]],
    ) -> None:
        self._tell = tell
        self.repair = Repair(catalogue, pools, clock)
        self._catalogue = catalogue
        self._pools = pools
        self._pool_records = pool_records
        self._clock = clock
        self._check_term = check_term
        self._news = trio.Event()
        self._released: set[int] = set()

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {
            Reconcile: self.reconcile,
            ReportLost: self.report_lost,
            TakeWork: self.take_work,
            ShardsStored: self.shards_stored,
            ReplacePool: self.replace_pool,
            DrainPool: self.drain_pool,
            RemovePool: self.remove_pool,
        }

    # -- what pools report ---------------------------------------------------------------------

    async def reconcile(self, _call: Call, request: Reconcile, body: Body) -> Answer:
        """Compare what a pool holds with the records."""
        self._check_term()
        self._pools.running(request.number, request.boot_id)
        held = unpack_held(b"".join(body), request.after)
        stretch = await self._catalogue.reconcile(
            request.number,
            request.after,
            held,
            last=request.last,
            compared=self._pools.compared(self._catalogue.start),
        )
        return Reconciled(
            absent=tuple(ExpectedShard(*place) for place in stretch.absent),
            wanted=tuple(ExpectedShard(*place) for place in stretch.wanted),
            drop=tuple(stretch.drop),
            unknown=tuple(stretch.unknown),
            term=self._catalogue.term,
            upto=stretch.upto,
        )

    async def report_lost(self, _call: Call, request: ReportLost, _body: Body) -> Answer:
        """Record as missing what a pool has lost, or has damaged."""
        self._check_term()
        record = self._pools.running(request.number, request.boot_id)
        lost = await self._catalogue.lose_shards(request.number, request.shards)
        if lost:
            log.warning("shards lost pool=%d name=%s shards=%d", record.number, record.name, lost)
            self.repair.look_afresh()
        return Done()

    async def take_work(self, _call: Call, request: TakeWork, _body: Body) -> Answer:
        """Hand out orders to rebuild shards."""
        self._check_term()
        self._pools.running(request.number, request.boot_id)
        orders, pools = self.repair.take(request)
        return Work(orders=orders, pools=pools, term=self._catalogue.term)

    async def shards_stored(self, _call: Call, request: ShardsStored, _body: Body) -> Answer:
        """Record shards that a pool has rebuilt, or has still."""
        self._check_term()
        self._pools.running(request.number, request.boot_id)
        refused = await self._catalogue.place_shards(request.number, request.boot_id, request.shards)
        places = tuple(ExpectedShard(*place) for place in refused)
        self.repair.recorded(request.number, request.shards, places)
        return Recorded(refused=places)

    async def tell_of_work(self) -> None:
        """Tell pools that idle when there are orders for them, for ever.

        Whom this does not reach hears of them in the answer to its next heartbeat.
        """
        while True:
            await self._tell(WorkWaits(), await self.repair.idle_with_work())

    # -- pools that are lost -------------------------------------------------------------------

    async def replace_pool(self, _call: Call, request: ReplacePool, _body: Body) -> Answer:
        """Remove a pool for good, whose shards are then rebuilt on others."""
        self._check_term()
        record = self._pools.named(request.pool)
        if record.membership == Membership.REMOVED:
            return PoolReplaced(number=record.number, name=record.name, shards=0)
        if not request.force:
            await self._check_replaceable(record)
        shards = self._catalogue.places(record.number)
        async with self._pool_records:
            record = self._pools.known(record.number)
            removed = await self._catalogue.save_pool(
                replace(record, membership=Membership.REMOVED.value, checking=False)
            )
            self._pools.remove(removed)
        log.warning("pool removed number=%d name=%s shards=%d", record.number, record.name, shards)
        self.pools_changed()
        self.repair.pool_is_gone(record.number)
        return PoolReplaced(number=record.number, name=record.name, shards=shards)

    async def _check_replaceable(self, record: PoolRecord) -> None:
        if not self._pools.is_down(record.number):
            raise Conflict(
                f"pool {record.name!r} is up: stop it first if it is to be replaced; its id never comes back"
            )
        gone = self._pools.removed()
        before = await self._catalogue.survival(gone)
        after = await self._catalogue.survival(gone | {record.number})
        lost = _unreadable(after) - _unreadable(before)
        if lost > 0:
            raise Conflict(
                f"without pool {record.name!r} {lost} files cannot be read ever again: bring its disk back, "
                "or say --force"
            )

    # -- pools that are to go ------------------------------------------------------------------

    async def drain_pool(self, _call: Call, request: DrainPool, _body: Body) -> Answer:
        """Have a pool emptied, or not any more; tell how far that is."""
        self._check_term()
        record = self._pools.named(request.pool)
        if record.membership == Membership.REMOVED:
            raise Conflict(f"pool {record.name!r} was removed")
        wanted = Membership.MEMBER if request.undo else Membership.DRAINING
        if record.membership != wanted and not request.ask:
            if not request.undo and not request.force:
                self._check_drainable(record)
            async with self._pool_records:
                record = self._pools.known(record.number)
                if record.membership == Membership.REMOVED:  # Meanwhile, and for ever.
                    raise Conflict(f"pool {record.name!r} was removed")
                record = await self._catalogue.save_pool(replace(record, membership=wanted.value))
                self._pools.decide(record)
            log.warning("pool number=%d name=%s is now %s", record.number, record.name, record.membership)
            self.repair.look_afresh()
        return PoolDrained(
            number=record.number,
            name=record.name,
            membership=record.membership,
            shards=self._catalogue.places(record.number),
            stuck=self.repair.status().moving_stuck,
        )

    def _check_drainable(self, record: PoolRecord) -> None:
        """Raise Conflict when the other members are too few for what has a shard on this pool."""
        widest = self._catalogue.widest(record.number)
        others = sum(
            pool.membership == Membership.MEMBER and pool.number != record.number
            for pool in self._pools.infos()
        )
        if widest is not None and others < widest.total:
            raise Conflict(
                f"files in {widest} need {widest.total} pools, and without {record.name!r} there are "
                f"{others}: add a pool first, or say --force to move what can be moved"
            )

    async def remove_pool(self, _call: Call, request: RemovePool, _body: Body) -> Answer:
        """Remove a pool for good that nothing is recorded on."""
        self._check_term()
        record = self._pools.named(request.pool)
        if record.membership != Membership.REMOVED:
            if record.membership != Membership.DRAINING:
                raise Conflict(
                    f"pool {record.name!r} is in use: `droppex pools drain {record.name}` empties it first"
                )
            async with self._pool_records:
                # A change that was judged before the pool was drained may name it.
                await self._catalogue.settle()
                left = self._catalogue.places(record.number)
                if left:
                    raise Conflict(
                        f"pool {record.name!r} still has {left} shards: `droppex pools drain {record.name}` "
                        "shows how far it is"
                    )
                record = await self._catalogue.save_pool(
                    replace(
                        self._pools.known(record.number), membership=Membership.REMOVED.value, checking=False
                    )
                )
                self._pools.remove(record)
            log.warning("pool removed number=%d name=%s", record.number, record.name)
            self.pools_changed()
        return PoolRemoved(number=record.number, name=record.name)

    # -- pools that are lost, after a while ----------------------------------------------------

    def pools_changed(self) -> None:
        """Take note that pools went out, came back or were removed."""
        self._catalogue.set_out(self._pools.out())
        self._news.set()

    def give_up_pools(self) -> None:
        """Count pools as lost that were down for too long, never more at once than a file survives."""
        pools = self._pools.infos()
        out = self._pools.out() - self._pools.removed()
        mended = not self._catalogue.missing and not any(map(self._catalogue.places, out))
        most = max(1, choose_layout(pools, None).m) + (len(out) if mended else 0)
        given_up = self._pools.give_up(self._clock.now(), most)
        for record in given_up:
            log.warning("pool out number=%d name=%s: its shards count as missing", record.number, record.name)
        if given_up:
            self.pools_changed()

    async def record_losses(self) -> None:
        """Record as missing what is on pools that are out or removed, for ever."""
        while True:
            with suppress(CatalogFull):  # What could not be recorded now is with the next look.
                await self._record_losses()
            self._news = trio.Event()
            with trio.move_on_after(LOOK_S):
                await self._news.wait()

    async def _record_losses(self) -> None:
        for pool in sorted(self._pools.out()):
            if self._catalogue.places(pool):
                await self._walk(pool)
        for pool in sorted(self._pools.removed() - self._released):
            await self._catalogue.settle()
            await self._catalogue.release_garbage(pool)
            self._released.add(pool)

    async def _walk(self, pool: int) -> None:
        """Look at every extent once, unless the pool comes back meanwhile."""
        # What was judged before the pool was out may name it, and is to be seen.
        await self._catalogue.settle()
        after: ExtentId | None = None
        lost, fresh_at = 0, self._clock.now()
        while pool in self._pools.out():
            extents = await self._catalogue.extents(after, PAGE)
            named = [extent.id for extent in extents if pool in extent.pools]
            if named:
                lost += await self._catalogue.lose_pool(pool, named)
            if lost and self._clock.now() >= fresh_at:
                self.repair.look_afresh()
                fresh_at = self._clock.now() + FRESH_S
            if len(extents) < PAGE:
                break
            after = extents[-1].id
        if lost:
            log.warning("shards missing pool=%d shards=%d", pool, lost)
            self.repair.look_afresh()


def _unreadable(survival: Sequence[Any]) -> int:
    return sum(count.files for count in survival if count.survives < 0)
