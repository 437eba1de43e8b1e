"""Shards of histories that the catalogue does not know: what all pools have of them, and their adoption.

The pools list in the order of extents, so that pages of all of them are merged with bounded memory. An
adoption reads a whole version, so it goes on between the questions of the client that waits for it. After a
catalogue was made anew from pools, the master has an app adopt everything.
"""

import logging
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import blake3
import trio

from droppexd.client.orphans import OrphanListing, OrphanState, OrphanVersion
from droppexd.errors import (
    Conflict,
    DroppexError,
    IntegrityError,
    InvalidRequest,
    NotEnoughShards,
    PeerBusy,
    PeerError,
)
from droppexd.model import (
    Extent,
    ExtentId,
    Metadata,
    PoolInfo,
    Receipt,
    Version,
    VersionId,
    chunk_count,
    chunk_length,
)
from droppexd.roles.app_download import CONNECT_S, Reader
from droppexd.roles.app_session import Registration
from droppexd.roles.budget import Budget
from droppexd.roles.master import MasterLink
from droppexd.roles.orphans import adopted_name, candidate, check_whole, describe_extent, not_enough
from droppexd.roles.pool_check import ShardState
from droppexd.runtime import Runtime
from droppexd.wire.group_messages import AdoptAll, AllAdopted
from droppexd.wire.messages import (
    ORPHANS_AT_ONCE,
    ORPHANS_LIMIT,
    Adopt,
    Adoption,
    AdoptOrphan,
    CheckShards,
    FindOrphans,
    ListOrphans,
    OrphanExtent,
    OrphanHeader,
    OrphansFound,
    OrphanShard,
    OrphansListed,
    Request,
    ShardName,
)
from droppexd.wire.rpc import Answer, Call, Connections, Handler
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.app")

_MASTER_S = 30.0
_POOL_S = 10.0
_CHECK_S = 60.0
_POLL_S = 10.0
"""A client that waits for an adoption is answered after this, done or not."""
_FORGET_S = 60.0
"""An adoption is given up, and its outcome forgotten, when nobody asked about it for so long."""
_MOST_ADOPTIONS = 64
_MOST_OUTCOMES = 64
"""Outcomes that are kept for a client whose answer was lost."""
_ADOPTIONS_AT_ONCE = 4
"""Others wait: of each all extents are in memory, up to 16 384."""
_SHARDS_AT_ONCE = 8000
"""In the pages of all pools together, of which one page for the client is made."""
_LEAST_PAGE = 16
_MOST_AWAY = 256
"""Pools that are named as away; more change nothing for who reads it."""
_INLINE_SIZE = 64 * 1024
"""Hashing this much costs less than handing it to a thread."""
_PAGE_BYTES = 600_000
"""Of a page for the client, about: a message's header holds 1 MiB."""

Body = Sequence[Frame]


@dataclass(eq=False, slots=True)
class _Adopting:
    """One adoption: what was asked for, how far it is, and what came of it."""

    request: AdoptOrphan
    asked_at: float
    all_pools: bool = False
    """Whether each pool must have answered: nobody looks at what comes of it but this app."""
    read: int = 0
    size: int = 0
    receipt: Receipt | None = None
    error: DroppexError | None = None
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _AdoptingAll:
    """The adoption of everything."""

    folder: str
    asked_at: float
    adopted: int = 0
    left: int = 0
    error: DroppexError | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Orphans:
    """The app's part in all talk about orphans. `run` is its task."""

    def __init__(
        self,
        *,
        connections: Connections,
        registration: Registration,
        master: MasterLink,
        runtime: Runtime,
        reader: Reader,
        budget: Budget,
    ) -> None:
        self._connections = connections
        self._registration = registration
        self._master = master
        self._runtime = runtime
        self._clock = runtime.clock
        self._reader = reader
        self._budget = budget
        self._adoptions: dict[VersionId, _Adopting] = {}
        self._room = trio.CapacityLimiter(_ADOPTIONS_AT_ONCE)
        self._all: _AdoptingAll | None = None
        self._nursery: trio.Nursery | None = None

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {
            ListOrphans: self.list_orphans,
            AdoptOrphan: self.adopt_orphan,
            AdoptAll: self.adopt_all,
        }

    async def run(self) -> None:
        """Carry adoptions out, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    # -- listing -------------------------------------------------------------------------------

    async def list_orphans(self, _call: Call, request: ListOrphans, _body: Body) -> Answer:
        """Return a page of extents without a record, as the shards on all pools that can be asked tell."""
        return await self._listed(request)

    async def _listed(self, request: ListOrphans) -> OrphansListed:
        pools = self._registration.view.map.pools
        asked = [pool for pool in pools if pool.readable]
        limit = min(ORPHANS_LIMIT, max(_LEAST_PAGE, _SHARDS_AT_ONCE // max(1, len(asked))))
        pages = await self._ask_pools(asked, FindOrphans(after=request.after, limit=limit))
        reached = min((page.upto for page in pages.values() if page.upto is not None), default=None)
        extents: list[OrphanExtent] = []
        room = _PAGE_BYTES
        following = reached
        for extent, shards in sorted(_by_extent(pages).items()):
            if reached is not None and extent > reached:
                break
            described = describe_extent(extent, shards)
            room -= 100 + len(described.header.name.encode() if described.header else b"")
            room -= 12 * len(described.places)
            if extents and (room < 0 or len(extents) == request.limit):
                following = extents[-1].id
                break
            extents.append(described)
        away = [pool.name for pool in pools if pool.number not in pages or not pages[pool.number].complete]
        return OrphansListed(extents=tuple(extents), away=tuple(away[:_MOST_AWAY]), next=following)

    async def _ask_pools(self, pools: Sequence[PoolInfo], request: FindOrphans) -> dict[int, OrphansFound]:
        """Return the answers by pool number, of those that answered."""
        pages: dict[int, OrphansFound] = {}

        async def ask(pool: PoolInfo) -> None:
            try:
                await self._connections.connect(pool.address, timeout_s=CONNECT_S)
                pages[pool.number], _ = await self._connections.call(pool.address, request, timeout_s=_POOL_S)
            except DroppexError as error:
                log.warning("pool %s does not tell of orphans: %s", pool.name, error)

        async with trio.open_nursery() as nursery:
            for pool in pools:
                nursery.start_soon(ask, pool)
        return pages

    # -- adopting ------------------------------------------------------------------------------

    async def adopt_orphan(self, _call: Call, request: AdoptOrphan, _body: Body) -> Answer:
        """Begin an adoption, or tell how far it is; the receipt when it is done."""
        now = self._clock.now()
        self._forget(now)
        adopting = self._adoptions.get(request.version)
        if adopting is None:
            adopting = self._start(request, now)
        elif adopting.request != request:
            raise Conflict(f"version {request.version} is being adopted in another way just now")
        adopting.asked_at = now
        with trio.move_on_after(_POLL_S):
            await adopting.done.wait()
        if adopting.error is not None:
            self._adoptions.pop(request.version, None)
            raise adopting.error
        return Adoption(read=adopting.read, size=adopting.size, receipt=adopting.receipt)

    def _forget(self, now: float) -> None:
        """Forget outcomes that nobody asked about for some time, and of too many the first ones."""
        done = [one for one in self._adoptions.values() if one.done.is_set()]
        for place, one in enumerate(done):
            if now - one.asked_at > _FORGET_S or place < len(done) - _MOST_OUTCOMES:
                del self._adoptions[one.request.version]

    def _start(self, request: AdoptOrphan, now: float) -> _Adopting:
        adopted_name(request.folder, "", request.version)
        under_way = sum(not one.done.is_set() for one in self._adoptions.values())
        if under_way >= _MOST_ADOPTIONS or self._nursery is None:
            raise PeerBusy("the app has as many adoptions under way as it takes; try again later")
        adopting = self._adoptions[request.version] = _Adopting(request, now)
        self._nursery.start_soon(self._adopt, adopting)
        return adopting

    async def _adopt(self, adopting: _Adopting) -> None:
        """Carry one adoption out; what comes of it is kept for whoever asks."""
        try:
            async with self._room:
                adopting.receipt = await self._read_and_commit(adopting)
        except DroppexError as error:
            log.warning("version not adopted version=%s: %s", adopting.request.version, error)
            adopting.error = error
        adopting.done.set()

    # -- adopting everything -------------------------------------------------------------------

    async def adopt_all(self, _call: Call, request: AdoptAll, _body: Body) -> Answer:
        """Begin to adopt everything that can be read, or tell how far that is."""
        now = self._clock.now()
        everything = self._all
        if everything is None or everything.folder != request.folder:
            if self._nursery is None or everything is not None:
                raise PeerBusy("the app adopts into another folder just now, or is about to end")
            everything = self._all = _AdoptingAll(request.folder, now)
            self._nursery.start_soon(self._adopt_all, everything)
        everything.asked_at = now
        with trio.move_on_after(_POLL_S):
            await everything.done.wait()
        if everything.done.is_set():
            self._all = None
            if everything.error is not None:
                raise everything.error
        return AllAdopted(adopted=everything.adopted, left=everything.left, done=everything.done.is_set())

    async def _adopt_all(self, everything: _AdoptingAll) -> None:
        places = trio.CapacityLimiter(_ADOPTIONS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            try:
                if not await self._registration.refresh():  # A pool that it does not name is not asked.
                    raise PeerError("the master does not say which pools there are")
                async for orphan in self._adoptable(everything):
                    await places.acquire_on_behalf_of(orphan)
                    nursery.start_soon(self._adopt_one_of_all, everything, orphan, places)
            except DroppexError as error:
                everything.error = everything.error or error
        everything.done.set()

    async def _adoptable(self, everything: _AdoptingAll) -> AsyncIterator[OrphanVersion]:
        """Yield what can be read, until something goes wrong; count what cannot."""
        listing = OrphanListing(self._listed)
        async for orphan in listing:
            if listing.away:  # Of what they alone hold a part, the rest would pass for the whole.
                raise PeerError(f"pools cannot be asked: {', '.join(listing.away)}")
            if self._clock.now() - everything.asked_at > _FORGET_S:
                raise PeerError("nobody asked about the adoption any more")
            if everything.error is not None:
                return
            if orphan.version is None or orphan.state not in (OrphanState.WHOLE, OrphanState.OPEN):
                everything.left += 1
            else:
                yield orphan

    async def _adopt_one_of_all(
        self, everything: _AdoptingAll, orphan: OrphanVersion, places: trio.CapacityLimiter
    ) -> None:
        assert orphan.version is not None
        try:
            request = AdoptOrphan(
                version=orphan.version,
                extents=tuple([extent.id for extent in orphan.extents]),
                folder=everything.folder,
            )
            await self._read_and_commit(_Adopting(request, math.inf, all_pools=True))
        except (Conflict, NotEnoughShards, IntegrityError, InvalidRequest) as error:
            log.warning("version not adopted version=%s: %s", orphan.version, error)
            everything.left += 1
        except DroppexError as error:
            everything.error = everything.error or error
        else:
            everything.adopted += 1
        finally:
            places.release_on_behalf_of(orphan)

    async def _read_and_commit(self, adopting: _Adopting) -> Receipt:
        request = adopting.request
        described = await self._describe(request.extents, adopting)
        headers = check_whole(request.version, described)
        adopting.size = sum(header.size for header in headers)
        hasher = blake3.blake3()
        extents: list[Extent] = []
        with self._registration.session.work() as ids:
            lease = await self._budget.lease()
            try:
                for one, header in zip(described, headers, strict=True):
                    extent = await self._sound(one, header, adopting)
                    try:
                        await self._read(extent, hasher, adopting)
                    except (NotEnoughShards, IntegrityError) as error:
                        if adopting.all_pools:  # They were all sound a moment ago.
                            raise PeerError(f"extent {extent.id} was not read: {error}") from error
                        raise
                    extents.append(extent)
            finally:
                lease.release()
            hint = next((header.name for header in headers if header.name), "")
            version = Version(
                id=request.version,
                size=adopting.size,
                blake3=hasher.digest(),
                extents=request.extents,
                metadata=_metadata(hint, headers),
            )
            adopt = Adopt(
                operation=ids.operation(),
                name=adopted_name(request.folder, hint, request.version),
                version=version,
                extents=tuple(extents),
            )
            return (await self._master.call(adopt, timeout_s=_MASTER_S)).receipt

    async def _describe(self, extents: Sequence[ExtentId], adopting: _Adopting) -> list[OrphanExtent]:
        """Return what the pools that can be asked have of these extents."""
        everyone = self._registration.view.map.pools
        pools = [pool for pool in everyone if pool.readable]
        described: list[OrphanExtent] = []
        for start in range(0, len(extents), ORPHANS_AT_ONCE):
            some = tuple(extents[start : start + ORPHANS_AT_ONCE])
            pages = await self._ask_pools(pools, FindOrphans(extents=some))
            if adopting.all_pools and len(pages) < len(everyone):
                raise PeerError("not all pools can be asked what they have of a version")
            found = _by_extent(pages)
            described += [describe_extent(extent, found.get(extent, ())) for extent in some]
        return described

    async def _sound(self, extent: OrphanExtent, header: OrphanHeader, adopting: _Adopting) -> Extent:
        """Have the pools read their shards of an extent whole; return a record of those that are sound."""
        view = self._registration.view
        holders: dict[int, list[int]] = defaultdict(list)
        silent: list[DroppexError] = []

        async def check(shard: int, number: int) -> None:
            pool = view.pool(number)
            if pool is None:
                return
            request = CheckShards(shards=(ShardName(extent.id, shard),))
            try:
                reply, _ = await self._connections.call(pool.address, request, timeout_s=_CHECK_S)
            except DroppexError as error:
                log.warning("shard not checked extent=%s shard=%d: %s", extent.id, shard, error)
                silent.append(error)
                return
            if all(one.state == ShardState.SOUND for one in reply.checks):
                holders[shard].append(number)

        async with trio.open_nursery() as nursery:
            for place in extent.places:
                if place.agrees:
                    nursery.start_soon(check, place.shard, place.pool)
        if silent and adopting.all_pools:
            raise PeerError(f"not all shards of extent {extent.id} can be read") from silent[0]
        made = candidate(extent.id, header, holders)
        if made.survives < 0:
            raise not_enough(
                extent.id, header.layout, [index for index, pool in enumerate(made.pools) if pool]
            )
        return made

    async def _read(self, extent: Extent, hasher: blake3.blake3, adopting: _Adopting) -> None:
        """Read an extent through, each piece verified by its checksum, and hash it."""
        for chunk in range(chunk_count(extent.size, extent.chunk_size)):
            if self._clock.now() - adopting.asked_at > _FORGET_S:
                raise PeerError("the adoption was given up: nobody asked about it any more")
            length = chunk_length(extent.size, extent.chunk_size, chunk)
            frames, _ = await self._reader.read(extent, chunk, 0, length)
            if length <= _INLINE_SIZE:
                _hash(hasher, frames)
            else:
                await self._runtime.run_blocking(_hash, hasher, frames)
            adopting.read += length


def _hash(hasher: blake3.blake3, frames: Sequence[Frame]) -> None:
    for frame in frames:
        hasher.update(frame)


def _by_extent(pages: Mapping[int, OrphansFound]) -> dict[ExtentId, list[tuple[int, OrphanShard]]]:
    """Return the shards of all pages by extent, each with its pool."""
    found: dict[ExtentId, list[tuple[int, OrphanShard]]] = defaultdict(list)
    for number, page in pages.items():
        for shard in page.shards:
            found[shard.holding.extent].append((number, shard))
    return found


def _metadata(hint: str, headers: Sequence[OrphanHeader]) -> Metadata:
    """Return what an adopted version says of itself, since less is known of it than of others."""
    incarnations = dict.fromkeys(header.incarnation.hex() for header in headers)
    return (
        ("adopted", "uncertain: order and number of its extents were inferred from shards without a record"),
        ("adopted-name", hint),
        ("adopted-incarnation", ", ".join(incarnations)[:1024]),
    )
