"""Rebuilding lost shards, as a pool does it: each on the pool that is to keep it.

A pool takes orders from the master, as many as it has room for. For each it reads pieces of the extent's
other shards from their pools, verifies them, rebuilds its own piece of every chunk, writes the shard, flushes
it and reads it back. Only then the master hears of it, and records it if nobody changed the record meanwhile.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from droppexd.brief import BriefWork
from droppexd.coding import piece_checksum, rebuild_pieces
from droppexd.errors import (
    DroppexError,
    IntegrityError,
    NoSuchShard,
    NotEnoughShards,
    NotFound,
    StoreError,
)
from droppexd.model import (
    MISSING,
    SMALL_SIZE,
    UNKNOWN_PLACE,
    Extent,
    ExtentId,
    ShardHeader,
    VersionId,
    chunk_count,
    chunk_length,
    piece_size,
)
from droppexd.roles.master import MasterLink
from droppexd.roles.ordered import Turns
from droppexd.roles.pool_check import LOST, ShardState, check_shard
from droppexd.roles.pool_reconcile import Reconciler
from droppexd.roles.pool_writer import SmallWriter
from droppexd.roles.throttle import Throttle
from droppexd.runtime import Runtime
from droppexd.store.interface import ShardStore, ShardWriter, StoredShard
from droppexd.wire.messages import (
    MAX_ORDERS,
    MOST_TOGETHER,
    ExpectedShard,
    Piece,
    ReadPiece,
    RepairOrder,
    ShardsStored,
    TakeWork,
)
from droppexd.wire.rpc import Connections
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.pool")

_MASTER_S = 10.0
_PIECE_S = 20.0
_PAUSE_S = 1.0
"""Between two questions for work, when nothing else tells when to ask."""
_SMALL_AT_ONCE = 64
"""Orders for shards of one small piece in work at once: enough to share flushes."""
_LARGE_AT_ONCE = 2
_STEPS_AT_ONCE = 3
"""Steps of one large shard on their way: with k pieces each, 2 * 3 * 4 MiB in memory at the most."""
_INLINE_SIZE = 64 * 1024
"""Rebuilding this much costs less than handing it to a thread."""


@dataclass(slots=True)
class _Sources:
    """Where the other shards of one extent are, best first."""

    addresses: dict[int, str]
    order: list[int]
    failures: dict[int, str] = field(default_factory=dict)

    def fail(self, index: int, why: str) -> None:
        """Ask this one last from now on."""
        self.failures[index] = why
        self.order.remove(index)
        self.order.append(index)


@dataclass(slots=True)
class _Found:
    """What was rebuilt of a shard so far."""

    checksums: dict[int, bytes] = field(default_factory=dict)
    version: VersionId | None = None
    name: str = ""
    place: int = UNKNOWN_PLACE

    def hear(self, reply: Piece) -> None:
        """Take over the hints that come with the first piece of a shard."""
        if reply.version is not None:
            self.version, self.name, self.place = reply.version, reply.name, reply.place


class Rebuilder:
    """Takes orders and carries them out. `run` is its task."""

    def __init__(
        self,
        *,
        store: ShardStore,
        small: SmallWriter,
        connections: Connections,
        master: MasterLink,
        runtime: Runtime,
        reconciler: Reconciler,
        throttle: Throttle,
    ) -> None:
        self._store = store
        self._small = small
        self._connections = connections
        self._master = master
        self._runtime = runtime
        self._reconciler = reconciler
        self._throttle = throttle
        self._small_looks = BriefWork(runtime)
        self._boot_id = store.identity.boot_id
        self._running: dict[ExtentId, None] = {}
        self._failed: list[ExtentId] = []
        self._stored: list[ExpectedShard] = []
        self._news = trio.Event()
        self._report = trio.Event()
        self._small_room = trio.Semaphore(_SMALL_AT_ONCE)
        self._large_room = trio.Semaphore(_LARGE_AT_ONCE)
        self._addresses: dict[int, str] = {}
        self.number = MISSING
        self.incarnation = b""

    def heard(self, *, work: bool) -> None:
        """Take note of an answer to a heartbeat; `work`: the master has orders."""
        if work:
            self._news.set()

    async def run(self) -> None:
        """Ask for orders and carry them out, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report_stored)
            while True:
                await self._wait_for_news()
                try:
                    orders = await self._take()
                except DroppexError as error:
                    log.warning("no work from the master: %s", error)
                    await trio.sleep(_PAUSE_S)
                    continue
                for order in orders:
                    self._running[order.extent.id] = None
                    self._reconciler.pin(order.extent.id, order.shard)
                    nursery.start_soon(self._carry_out, order)

    async def _wait_for_news(self) -> None:
        """Wait until the master has work, or what is running leaves room for more."""
        if self._running or self._failed:
            with trio.move_on_after(_PAUSE_S):
                await self._news.wait()
        else:
            await self._news.wait()
        self._news = trio.Event()

    async def _take(self) -> tuple[RepairOrder, ...]:
        failed, self._failed = self._failed[:MAX_ORDERS], self._failed[MAX_ORDERS:]
        request = TakeWork(
            number=self.number,
            boot_id=self._boot_id,
            room=0 if self._store.read_only else MAX_ORDERS - len(self._running),
            running=tuple(self._running),
            failed=tuple(failed),
        )
        work = await self._master.call(request, timeout_s=_MASTER_S)
        self._addresses.update(work.pools)
        return tuple(order for order in work.orders if order.extent.id not in self._running)

    async def _carry_out(self, order: RepairOrder) -> None:
        """Carry out one order; a failure is told with the next question for work."""
        extent = order.extent
        room = self._small_room if _is_small(extent) else self._large_room
        try:
            async with room:
                await self._mend(extent, order.shard)
        except DroppexError as error:
            log.warning("shard not rebuilt extent=%s shard=%d: %s", extent.id, order.shard, error)
            if not self._store.read_only:
                self._failed.append(extent.id)  # Else it is no fault of the order: another pool takes it.
            self._end(extent.id, order.shard)
            self._news.set()
        else:
            self._stored.append(ExpectedShard(extent.id, order.shard, extent.edition))
            self._report.set()

    async def _report_stored(self) -> None:
        """Tell the master of what is stored: all that gathers while one report is under way is the next."""
        while True:
            await self._report.wait()
            self._report = trio.Event()
            while self._stored:
                page = tuple(self._stored[:MAX_ORDERS])
                request = ShardsStored(number=self.number, boot_id=self._boot_id, shards=page)
                try:
                    recorded = await self._master.call(request, timeout_s=_MASTER_S)
                except NotFound:
                    refused = page  # The master begins anew with this pool, and asks for what it wants.
                except DroppexError as error:
                    log.warning("rebuilt shards are reported later: %s", error)
                    await trio.sleep(_PAUSE_S)
                    continue
                else:
                    refused = recorded.refused
                for place in refused:
                    self._reconciler.doubt(place.extent)
                del self._stored[: len(page)]
                for place in page:
                    self._end(place.extent, place.shard)
                if len(self._running) <= MAX_ORDERS // 2:
                    self._news.set()

    def _end(self, extent: ExtentId, shard: int) -> None:
        del self._running[extent]
        self._reconciler.unpin(extent, shard)

    # -- one shard -----------------------------------------------------------------------------

    async def _mend(self, extent: Extent, shard: int) -> None:
        """Have a shard here, whole, flushed and verified; raise what stands in the way."""
        # A look at a small shard is briefer than the way to a thread and back.
        run_blocking = self._small_looks.run if _is_small(extent) else self._runtime.run_blocking
        old = await run_blocking(self._held, extent.id, shard)
        if old is not None:
            check = await run_blocking(check_shard, self._store, extent.id, shard)
            if check.state == ShardState.SOUND:
                # It has been here for some time: nobody may be about to have it dropped. (A damaged one that
                # is, is another instance than the one that takes its place.)
                async with self._reconciler.verdicts:
                    check = await run_blocking(check_shard, self._store, extent.id, shard)
                if check.state == ShardState.SOUND:
                    return
        addresses = {
            index: self._addresses[pool]
            for index, pool in enumerate(extent.pools)
            if pool not in (MISSING, self.number) and pool in self._addresses
        }
        # Every pool would begin with the same sources: let each extent begin with another one. A good copy of
        # the very shard spares the rebuilding.
        order = sorted(
            addresses, key=lambda at: (at != shard, (at + extent.id.counter) % extent.layout.total)
        )
        sources = _Sources(addresses, order)
        if _is_small(extent) and old is None:
            await self._rebuild_small(extent, shard, sources)
        else:
            await self._rebuild_large(extent, shard, sources, old)
        check = await run_blocking(check_shard, self._store, extent.id, shard)
        if check.state in LOST:
            # To try again here would fail again, or be believed wrongly some time.
            self._store.distrust(f"reading back what was flushed failed ({check.reason})")
        if check.state != ShardState.SOUND:
            raise IntegrityError(f"what was written is not what is read back: {check.reason}")

    def _held(self, extent: ExtentId, shard: int) -> "_Old | None":
        """Return the instance that is held already. Blocking."""
        generation = next((one.generation for one in self._store.find([extent]) if one.shard == shard), None)
        if generation is None:
            return None
        try:
            return _Old(generation, self._store.examine(extent, shard))
        except (IntegrityError, NoSuchShard, StoreError):
            return _Old(generation, None)

    async def _rebuild_small(self, extent: Extent, shard: int, sources: _Sources) -> None:
        found = _Found()
        piece = await self._piece(extent, shard, 0, sources, None, found)
        await self._throttle.wait(len(piece))
        stored = trio.Event()
        outcome: list[int | DroppexError] = []

        def done(result: int | DroppexError) -> None:
            outcome.append(result)
            stored.set()

        self._small.submit((self._header(extent, shard, found), bytes(piece)), done)
        await stored.wait()
        if isinstance(outcome[0], DroppexError):
            raise outcome[0]

    async def _rebuild_large(self, extent: Extent, shard: int, sources: _Sources, old: "_Old | None") -> None:
        """Stream the chunks through in steps: read ahead, write in order.

        A step rebuilds the piece of one chunk from k others or, where the very shard can be read, copies as
        many of its pieces.
        """
        writer = await self._runtime.run_blocking(self._store.begin, 0)
        try:
            found = _Found()
            turns = Turns()
            room = trio.Semaphore(_STEPS_AT_ONCE)
            failure: list[DroppexError] = []
            size = piece_size(extent.chunk_size, extent.layout.k)
            end = chunk_count(extent.size, extent.chunk_size)

            async def step(chunks: range, everything: trio.CancelScope) -> None:
                try:
                    if len(chunks) == 1 or not await self._copy(
                        extent, shard, chunks, sources, found, writer, turns
                    ):
                        for chunk in chunks:
                            piece = await self._piece(extent, shard, chunk, sources, old, found)
                            await turns.wait(chunk)
                            await self._runtime.run_blocking(writer.write, chunk, piece)
                            turns.pass_on()
                    room.release()
                except DroppexError as error:
                    failure.append(error)
                    everything.cancel()

            async with trio.open_nursery() as nursery:
                chunk = 0
                while chunk < end:
                    await room.acquire()
                    copying = old is None and sources.order[:1] == [shard]
                    together = min(extent.layout.k, MOST_TOGETHER, end - chunk) if copying else 1
                    chunks = range(chunk, chunk + together)
                    nursery.start_soon(step, chunks, nursery.cancel_scope)
                    await self._throttle.wait(len(chunks) * size)
                    chunk = chunks.stop
            if failure:
                raise failure[0]
            header = self._header(extent, shard, found)
            replacing = old.generation if old is not None else 0
            await self._runtime.run_blocking(lambda: writer.finish(header, replacing=replacing))
        finally:
            with trio.CancelScope(shield=True):
                await self._runtime.run_blocking(writer.abort)

    def _header(self, extent: Extent, shard: int, found: _Found) -> ShardHeader:
        return ShardHeader(
            incarnation=self.incarnation,
            extent=extent.id,
            index=shard,
            layout=extent.layout,
            size=extent.size,
            chunk_size=extent.chunk_size,
            checksums=tuple(found.checksums[chunk] for chunk in sorted(found.checksums)),
            version=found.version or VersionId(extent.id.session, 0),
            name=found.name,
            place=found.place,
        )

    async def _copy(
        self,
        extent: Extent,
        shard: int,
        chunks: range,
        sources: _Sources,
        found: _Found,
        writer: ShardWriter,
        turns: Turns,
    ) -> bool:
        """Copy pieces of the very shard; return whether they were whole, else nothing was written."""
        try:
            reply, pieces = await self._ask(extent, shard, chunks, sources.addresses[shard])
        except DroppexError as error:
            sources.fail(shard, str(error))
            return False
        checksums = (reply.checksum, *reply.following)
        await turns.wait(chunks.start)
        try:
            await self._runtime.run_blocking(
                _write_verified, writer, extent, shard, chunks, checksums, pieces
            )
        except IntegrityError as error:
            sources.fail(shard, str(error))
            return False
        found.hear(reply)
        found.checksums.update(zip(chunks, checksums, strict=True))
        turns.pass_on(len(chunks))
        return True

    async def _piece(
        self,
        extent: Extent,
        shard: int,
        chunk: int,
        sources: _Sources,
        old: "_Old | None",
        found: _Found,
    ) -> Frame:
        """Return the shard's piece of a chunk: what is still good of it here, or rebuilt from others."""
        if old is not None and old.shard is not None:
            async with old.reading:
                kept = await self._runtime.run_blocking(_good_piece, old.shard, extent, shard, chunk)
            if kept is not None:
                header = old.shard.header
                found.version, found.name, found.place = header.version, header.name, header.place
                found.checksums[chunk] = header.checksums[chunk]
                return kept
        pieces = await self._gather(extent, shard, chunk, sources, found)
        if shard in pieces:
            piece = pieces[shard]
        elif len(pieces) * piece_size(extent.chunk_size, extent.layout.k) <= _INLINE_SIZE:
            piece = rebuild_pieces(extent.layout, pieces, [shard])[shard]
        else:
            rebuilt = await self._runtime.run_blocking(rebuild_pieces, extent.layout, pieces, [shard])
            piece = rebuilt[shard]
        found.checksums[chunk] = piece_checksum(extent.id, extent.layout, shard, chunk, piece)
        return piece

    async def _gather(
        self, extent: Extent, shard: int, chunk: int, sources: _Sources, found: _Found
    ) -> dict[int, Frame]:
        """Return any k pieces of a chunk, or the very one that is wanted, all verified."""
        k = extent.layout.k
        pieces: dict[int, Frame] = {}
        untried = list(sources.order)

        async def fetch(index: int) -> None:
            try:
                pieces[index] = await self._fetch(extent, index, chunk, sources.addresses[index], found)
            except DroppexError as error:
                sources.fail(index, str(error))

        while len(pieces) < k and shard not in pieces:
            wanted = 1 if untried and untried[0] == shard else k - len(pieces)
            asked, untried = untried[:wanted], untried[wanted:]
            if len(asked) < wanted:
                raise NotEnoughShards(
                    f"only {len(pieces) + len(asked)} of the {k} shards that are needed can be read",
                    [f"shard {index}: {why}" for index, why in sorted(sources.failures.items())],
                )
            async with trio.open_nursery() as nursery:
                for index in asked:
                    nursery.start_soon(fetch, index)
        return pieces

    async def _fetch(self, extent: Extent, index: int, chunk: int, address: str, found: _Found) -> Frame:
        reply, (piece,) = await self._ask(extent, index, range(chunk, chunk + 1), address)
        _verify(extent, index, chunk, piece, reply.checksum)
        found.hear(reply)
        return piece

    async def _ask(
        self, extent: Extent, index: int, chunks: range, address: str
    ) -> tuple[Piece, Sequence[Frame]]:
        """Read pieces of a shard from its pool: as many as were asked for, not verified yet."""
        request = ReadPiece(extent=extent.id, index=index, chunk=chunks.start, count=len(chunks), repair=True)
        reply, body = await self._connections.call(address, request, timeout_s=_PIECE_S * len(chunks))
        if not len(body) == 1 + len(reply.following) == len(chunks):
            raise IntegrityError(f"{len(body)} pieces where {len(chunks)} were asked for")
        return reply, body


@dataclass(frozen=True, slots=True)
class _Old:
    """A damaged instance of the shard that is to be rebuilt; without `shard` nothing of it is readable."""

    generation: int
    shard: StoredShard | None
    reading: trio.Lock = field(default_factory=trio.Lock)
    """A stored shard is for one thread at a time."""


def _is_small(extent: Extent) -> bool:
    """Whether a shard is one piece that goes into the database."""
    return extent.size <= extent.chunk_size and piece_size(extent.size, extent.layout.k) <= SMALL_SIZE


def _verify(extent: Extent, shard: int, chunk: int, piece: Frame, checksum: bytes) -> None:
    """Raise IntegrityError unless this is that piece."""
    if len(piece) != piece_size(chunk_length(extent.size, extent.chunk_size, chunk), extent.layout.k):
        raise IntegrityError("a piece of the wrong size")
    if piece_checksum(extent.id, extent.layout, shard, chunk, piece) != checksum:
        raise IntegrityError("the bytes do not match their checksum")


def _write_verified(
    writer: ShardWriter,
    extent: Extent,
    shard: int,
    chunks: range,
    checksums: Sequence[bytes],
    pieces: Sequence[Frame],
) -> None:
    """Write pieces that are due, once all were verified. Blocking."""
    for chunk, checksum, piece in zip(chunks, checksums, pieces, strict=True):
        _verify(extent, shard, chunk, piece, checksum)
    for chunk, piece in zip(chunks, pieces, strict=True):
        writer.write(chunk, piece)


def _good_piece(old: StoredShard, extent: Extent, shard: int, chunk: int) -> Frame | None:
    """Return a piece of a damaged shard if that piece is whole. Blocking."""
    try:
        piece, checksum = old.read(chunk)
    except (IntegrityError, NoSuchShard, StoreError):
        return None
    size = piece_size(chunk_length(extent.size, extent.chunk_size, chunk), extent.layout.k)
    whole = piece_checksum(extent.id, extent.layout, shard, chunk, piece) == checksum
    return piece if whole and len(piece) == size else None
