"""Verification on request: the scrubs of all pools, watched together, and the shards of one file.

The pools read and verify; only words go through the app. It keeps nothing between two requests, so that a
file of any size takes the memory of a page.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import trio

from droppexd.errors import DroppexError, InvalidRequest, PeerError
from droppexd.model import (
    MISSING,
    Extent,
    ExtentId,
    Membership,
    PoolInfo,
    PoolState,
    normal_name,
    shard_size,
)
from droppexd.placement import survives
from droppexd.roles.app_session import Registration
from droppexd.roles.master import FAILOVER_S, MasterLink
from droppexd.wire.messages import (
    CHECK_LIMIT,
    CHECKED_EXTENTS,
    CheckFile,
    CheckShards,
    FileChecked,
    Found,
    GetScrub,
    GetScrubFindings,
    ListFindings,
    Lookup,
    PoolScrub,
    Scrubs,
    ShardFault,
    ShardName,
    StartScrub,
    WatchScrubs,
)
from droppexd.wire.rpc import Answer, Call, Connections
from droppexd.wire.transport import Frame

_ASK_S = 4.0
"""A pool says within this time where its scrub is, or it could not be asked."""

_PAGE_BYTES = 4 * 1024**3
_CHECK_BYTES = 512 * 1024**2
"""Shards that one pool reads for one request, together; a single one may be larger."""
_CHECK_S = 30.0
_SLOWEST_BYTES_S = 5_000_000
"""A pool gets so long, and so much longer by what it is to read: others may use it meanwhile."""

_SOUND = "sound"
_MISSING = "missing"
_UNREACHABLE = "unreachable"


@dataclass(slots=True)
class _Shard:
    """One shard of the extents of a page, and what became of it."""

    place: int
    """Of its extent in the file."""
    extent: ExtentId
    index: int
    size: int
    pool: int
    state: str = _UNREACHABLE
    reason: str = ""

    @property
    def name(self) -> ShardName:
        return ShardName(self.extent, self.index)


class Verifier:
    """The handlers of an app that have pools verify what they hold."""

    def __init__(self, connections: Connections, registration: Registration, master: MasterLink) -> None:
        self._connections = connections
        self._registration = registration
        self._master = master

    # -- everything ----------------------------------------------------------------------------

    async def watch_scrubs(self, _call: Call, request: WatchScrubs, _body: Sequence[Frame]) -> Answer:
        """Ask every pool that counts where its scrub is, or to begin."""
        scrubs: dict[int, PoolScrub] = {}
        question = StartScrub() if request.start else GetScrub()

        async def ask(pool: PoolInfo) -> None:
            scrub = PoolScrub(pool=pool.number, name=pool.name, machine=pool.machine)
            try:
                _require_reachable(pool)
                reply, _ = await self._connections.call(pool.address, question, timeout_s=_ASK_S)
                scrubs[pool.number] = replace(scrub, progress=reply.progress)
            except DroppexError as error:
                scrubs[pool.number] = replace(scrub, error=str(error)[:512])

        async with trio.open_nursery() as nursery:
            for pool in self._registration.view.map.pools:
                # Shards of a pool that is out count as missing: there is nothing to be verified there.
                if pool.membership != Membership.REMOVED and pool.state != PoolState.OUT:
                    nursery.start_soon(ask, pool)
        return Scrubs(pools=tuple(scrubs[number] for number in sorted(scrubs)))

    async def list_findings(self, _call: Call, request: ListFindings, _body: Sequence[Frame]) -> Answer:
        """Ask a pool what a pass found."""
        pool = self._registration.view.pool(request.pool)
        if pool is None:
            raise InvalidRequest(f"there is no pool {request.pool}")
        reply, _ = await self._connections.call(
            pool.address, GetScrubFindings(number=request.number), timeout_s=_ASK_S
        )
        return reply

    # -- one file ------------------------------------------------------------------------------

    async def check_file(self, _call: Call, request: CheckFile, _body: Sequence[Frame]) -> Answer:
        """Have the pools read every shard of the next extents of a file."""
        lookup = Lookup(name=normal_name(request.name), version=request.version)
        found = await self._master.call(lookup, timeout_s=FAILOVER_S)
        if request.first and request.first >= len(found.extents):
            raise InvalidRequest(f"the file has {len(found.extents)} extents, no extent {request.first}")
        page = _page(found.extents, request.first)
        shards = _shards_of(page, request.first)
        await self._check(shards)
        if any(shard.state not in (_SOUND, _MISSING) for shard in shards):
            await self._check_moved(shards, replace(lookup, version=found.version.id))
        return self._told(found, request.first, page, shards)

    async def _check(self, shards: Iterable[_Shard]) -> None:
        """Ask the pools side by side; each reads one list after another."""
        by_pool: dict[int, list[_Shard]] = {}
        for shard in shards:
            if shard.pool != MISSING:
                by_pool.setdefault(shard.pool, []).append(shard)
        async with trio.open_nursery() as nursery:
            for number, held in by_pool.items():
                nursery.start_soon(self._check_on, number, held)

    async def _check_on(self, number: int, shards: Sequence[_Shard]) -> None:
        for some in _portions(shards):
            size = sum(shard.size for shard in some)
            try:
                pool = self._registration.view.pool(number)
                if pool is None:
                    raise PeerError("the app does not know this pool yet")
                _require_reachable(pool)
                reply, _ = await self._connections.call(
                    pool.address,
                    CheckShards(shards=tuple(shard.name for shard in some)),
                    timeout_s=_CHECK_S + size / _SLOWEST_BYTES_S,
                )
            except DroppexError as error:
                for shard in some:
                    shard.state, shard.reason = _UNREACHABLE, str(error)[:512]
                continue
            states = {check.shard: check.state for check in reply.checks}
            for shard in some:
                shard.state, shard.reason = states.get(shard.name, _UNREACHABLE), ""

    async def _check_moved(self, shards: Sequence[_Shard], lookup: Lookup) -> None:
        """Look again at shards that another pool has by now: they were put back while we asked."""
        found = await self._master.call(lookup, timeout_s=FAILOVER_S)
        moved: list[_Shard] = []
        for shard in shards:
            pool = found.extents[shard.place].pools[shard.index]
            if shard.state != _SOUND and pool not in (MISSING, shard.pool):
                shard.pool = pool
                moved.append(shard)
        await self._check(moved)

    def _told(
        self, found: Found, first: int, page: Sequence[Extent], shards: Sequence[_Shard]
    ) -> FileChecked:
        view = self._registration.view

        def fault(shard: _Shard) -> ShardFault:
            pool = view.pool(shard.pool)
            name, machine = ("", "") if pool is None else (pool.name, pool.machine)
            return ShardFault(shard.place, shard.index, shard.state, shard.pool, name, machine, shard.reason)

        def machine_of(number: int) -> str:
            pool = view.pool(number)
            return "" if pool is None else pool.machine

        sound: dict[ExtentId, dict[int, int]] = {}
        for shard in shards:
            if shard.state == _SOUND:
                sound.setdefault(shard.extent, {})[shard.index] = shard.pool
        losses = [
            survives(_with_only(extent, sound.get(extent.id, {})), lambda _: True, machine_of)
            for extent in page
        ]
        after = first + len(page)
        return FileChecked(
            name=found.name,
            version=found.version.id,
            size=found.version.size,
            extents=len(found.extents),
            next=after if after < len(found.extents) else 0,
            checked_size=sum(extent.size for extent in page),
            shards=len(shards),
            verified_size=sum(shard.size for shard in shards if shard.state == _SOUND),
            faults=tuple(fault(shard) for shard in shards if shard.state != _SOUND),
            survives_pools=min((pools for pools, _ in losses), default=None),
            survives_machines=min((machines for _, machines in losses), default=None),
        )


def _require_reachable(pool: PoolInfo) -> None:
    if not pool.readable:
        raise PeerError(f"the pool is {pool.state}")


def _page(extents: Sequence[Extent], first: int) -> Sequence[Extent]:
    """Return the extents that are checked together: at least one, if there is any."""
    size, end = 0, first
    while end < min(len(extents), first + CHECKED_EXTENTS) and size < _PAGE_BYTES:
        size += extents[end].size
        end += 1
    return extents[first:end]


def _shards_of(page: Sequence[Extent], first: int) -> list[_Shard]:
    return [
        _Shard(
            place,
            extent.id,
            index,
            shard_size(extent.size, extent.chunk_size, extent.layout.k),
            pool,
            _MISSING if pool == MISSING else _UNREACHABLE,
        )
        for place, extent in enumerate(page, start=first)
        for index, pool in enumerate(extent.pools)
    ]


def _portions(shards: Sequence[_Shard]) -> Iterable[Sequence[_Shard]]:
    """Yield the shards of one pool in lists that it can read in one request."""
    some: list[_Shard] = []
    size = 0
    for shard in shards:
        if some and (len(some) == CHECK_LIMIT or size + shard.size > _CHECK_BYTES):
            yield some
            some, size = [], 0
        some.append(shard)
        size += shard.size
    if some:
        yield some


def _with_only(extent: Extent, pools: dict[int, int]) -> Extent:
    """Return the extent as if it had only these shards, by index."""
    return replace(extent, pools=tuple(pools.get(index, MISSING) for index in range(extent.layout.total)))
