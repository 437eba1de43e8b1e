"""What a pool holds of sessions that the catalogue does not know, page by page, with what its headers say."""

from bisect import bisect_left
from collections.abc import Sequence

import trio

from droppexd.errors import IntegrityError, NoSuchShard
from droppexd.model import MAX_K, MAX_M, ExtentId, Holding
from droppexd.roles.pool_reconcile import Reconciler, before_session
from droppexd.runtime import Runtime
from droppexd.store.interface import ShardStore
from droppexd.wire.messages import FindOrphans, OrphanHeader, OrphansFound, OrphanShard
from droppexd.wire.rpc import Answer, Call
from droppexd.wire.transport import Frame

_AT_ONCE = 2
"""Pages at the same time: each is some hundred headers to be read."""
_LEAST_PAGE = 2 * (MAX_K + MAX_M)
"""A page of the index is cut where an extent ends, and must hold more than one."""


class OrphanFinder:
    """Answers `FindOrphans`.

    Which sessions are unknown is remembered from the last comparison with the records; which of their
    shards have a record by now is asked anew for each page.
    """

    def __init__(self, store: ShardStore, runtime: Runtime, reconciler: Reconciler) -> None:
        self._store = store
        self._run_blocking = runtime.run_blocking
        self._reconciler = reconciler
        self._room = trio.CapacityLimiter(_AT_ONCE)

    async def find_orphans(self, _call: Call, request: FindOrphans, _body: Sequence[Frame]) -> Answer:
        """Return a page, which may be empty and not the last."""
        reconciler = self._reconciler
        complete = reconciler.reconciled and reconciler.all_strangers
        held: Sequence[Holding]
        upto: ExtentId | None = None
        async with self._room:
            if request.extents:
                held = await self._run_blocking(self._store.find, request.extents)
            else:
                held, upto = await self._page(request.after, request.limit)
            shards = await self._run_blocking(self._described, held)
        return OrphansFound(shards=shards, complete=complete, upto=upto)

    async def _page(self, after: ExtentId | None, limit: int) -> tuple[Sequence[Holding], ExtentId | None]:
        """Return unknown shards behind an extent, and the extent that they reach to; None: to the end."""
        strangers = self._reconciler.strangers
        first = 0 if after is None else bisect_left(strangers, after.session)
        for session in strangers[first:]:
            start = after if after is not None and after.session == session else before_session(session)
            held = await self._reconciler.page_of(session, start, max(limit, _LEAST_PAGE))
            if not held:
                continue
            reply = await self._reconciler.ask(start, held, last=False)
            unknown = reply.unknown
            if len(unknown) <= limit:
                return unknown, reply.upto or held[-1].extent
            end = unknown[limit - 1].extent
            return [holding for holding in unknown if holding.extent <= end], end
        return (), None

    def _described(self, held: Sequence[Holding]) -> tuple[OrphanShard, ...]:
        """Read the headers. Blocking. What was dropped meanwhile is left out."""
        shards: list[OrphanShard] = []
        for holding in held:
            try:
                header = self._store.header(holding.extent, holding.shard)
            except NoSuchShard:
                continue
            except IntegrityError:
                shards.append(OrphanShard(holding, None))
                continue
            told = OrphanHeader(
                incarnation=header.incarnation,
                layout=header.layout,
                size=header.size,
                chunk_size=header.chunk_size,
                version=header.version,
                name=header.name,
                place=header.place,
            )
            shards.append(OrphanShard(holding, told))
        return tuple(shards)
