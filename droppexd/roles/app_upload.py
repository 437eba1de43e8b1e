"""One put: chunks in, coded, sent out to pools, and in the end one commit at the master.

Chunks that come in one message go out in one message to each pool, as far as they are of one extent. A
message is answered when each of its pieces is with its pool, or the pool was given up. The last piece of
an extent is answered only after the pool has flushed the shard, so a commit names only durable shards.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from droppexd.coding import EncodedChunk, chunk_checksum, encode_chunk, extent_digest
from droppexd.errors import (
    ClusterFull,
    DroppexError,
    IntegrityError,
    InvalidRequest,
    NotEnoughShards,
    PeerBusy,
    PeerError,
    RemoteProtocolError,
    StoreFull,
)
from droppexd.model import (
    CHUNK_SIZE,
    EXTENT_CHUNKS,
    MAX_EXTENTS,
    MISSING,
    SMALL_SIZE,
    UNKNOWN_PLACE,
    Extent,
    ExtentId,
    Layout,
    Metadata,
    Receipt,
    UploadRecord,
    Version,
    VersionId,
)
from droppexd.placement import small_layout, writable_layout
from droppexd.roles.app_recording import Recording
from droppexd.roles.app_session import Ids, MapView, Registration
from droppexd.roles.master import MasterLink
from droppexd.roles.ordered import Turns
from droppexd.roles.suspects import Suspects
from droppexd.runtime import Runtime
from droppexd.wire.messages import (
    MOST_TOGETHER,
    AbortShard,
    Commit,
    Committed,
    Condition,
    KeepShard,
    PieceWritten,
    Request,
    WritePiece,
)
from droppexd.wire.rpc import Connections, Pending, all_settled
from droppexd.wire.transport import Frame
from droppexd.wire.upload_messages import CommitUpload

log = logging.getLogger("droppex.app")

CONNECT_S = 2.0
"""A pool that does not take a connection in this time is passed over."""

STALL_S = 5.0
"""A pool that makes no progress for so long while others do is given up."""

_SLOW_S = 1.0
"""Pieces that take longer than this to be answered are sent one by one: see STALL_S."""

_LOOK_S = 0.5
"""How often a pool that is waited for is compared with the others."""

PIECE_S = 120.0
"""The longest that a piece may take when every pool is slow: backpressure, not failure."""

COMMIT_S = 60.0
TELL_S = 2.0
_MOST_ABORTED = 64
"""Extents of a given up upload whose pools are told. 16 GiB: enough to matter, and few enough to tell."""

_INLINE_SIZE = 64 * 1024
"""Coding this much costs less than handing it to a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """What every upload of an app works with."""

    connections: Connections
    registration: Registration
    master: MasterLink
    runtime: Runtime
    suspects: Suspects
    layout: Layout | None
    chunk_size: int = CHUNK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the caller asked to be stored."""

    name: str
    condition: Condition
    layout: Layout | None
    metadata: Metadata
    size: int | None
    """None when it is not known yet."""


class _Target:
    """One shard of the extent that is being sent, and the pool that gets it."""

    __slots__ = ("address", "boot_id", "busy", "failure", "full", "heard", "index", "pool")

    def __init__(self, index: int, pool: int, address: str) -> None:
        self.index = index
        self.pool = pool
        self.address = address
        self.boot_id = b""
        self.failure = ""
        self.busy = False
        """Whether it failed for having too much to do, which says nothing against the pool."""
        self.full = False
        """Whether a pool that got it had no room for it."""
        self.heard = 0.0
        """When the pool last took a connection or a piece."""


class _ExtentUpload:
    """The extent that is being sent."""

    def __init__(self, extent: ExtentId, place: int, layout: Layout, targets: Sequence[_Target]) -> None:
        self.id = extent
        self.place = place
        self.layout = layout
        self.targets = list(targets)
        self.size = 0
        self.chunks = 0
        self.opened = trio.Event()
        self.checksums: list[bytes] = []
        """Of the chunks, while the extent is to be noted with the master."""

    @property
    def alive(self) -> list[_Target]:
        return [target for target in self.targets if target.pool != MISSING]

    def record(self, chunk_size: int) -> Extent:
        """Return the record of what is with the pools now."""
        return Extent(
            id=self.id,
            layout=self.layout,
            size=self.size,
            chunk_size=chunk_size,
            pools=tuple(target.pool for target in self.targets),
        )


class Upload:
    """One put, from its first chunk to its commit or abort."""

    def __init__(
        self, outlets: Outlets, wanted: Wanted, ids: Ids, version: VersionId | None = None, place: int = 0
    ) -> None:
        """Begin with a version of its own, or write extents of another, from this place of its list on."""
        self._outlets = outlets
        self._wanted = wanted
        self._ids = ids
        self._version = version or ids.version()
        self._place = place
        self._kept: tuple[ExtentId, ...] = ()
        """The extents of an earlier attempt that it goes on with."""
        self._recording: Recording | None = None
        self._size = 0
        self._extents: list[_ExtentUpload] = []
        self._turns = Turns()
        self._unsettled = 0
        self._all_settled = trio.Event()
        self._note = ""
        self._view: MapView = outlets.registration.view
        self._trusting = False
        self._slow = False
        self._layout = self._choose_layout()
        self._avoid: set[int] = set()  # Pools that failed this upload; membership only, never iterated.

    def record(self, recording: Recording) -> None:
        """Note extents with the master as they become durable."""
        self._recording = recording

    @property
    def version(self) -> VersionId:
        """What the extents belong to."""
        return self._version

    async def go_on(self, upload: UploadRecord, keep: int) -> int:
        """Begin with the first extents of an earlier attempt; return the number of the first chunk to send.

        Raise NotFound when it was given up meanwhile.
        """
        assert self._recording is not None
        version, extents = await self._recording.take(upload, keep)
        self._version = version.id
        self._kept = version.extents
        self._size = sum(extent.size for extent in extents)
        self._place = len(extents)
        first = keep * EXTENT_CHUNKS
        self._turns = Turns(first)
        return first

    def _choose_layout(self) -> Layout:
        wanted = self._wanted
        if wanted.layout is not None:
            wanted.layout.check_survives()
        layout = self._view.layout(wanted.layout or self._outlets.layout)
        if wanted.layout is None and wanted.size is not None and wanted.size <= SMALL_SIZE:
            layout = small_layout(layout)
        takers = self._view.takers
        trusted = [number for number in takers if number not in self._outlets.suspects]
        try:
            layout, self._note = writable_layout(layout, len(trusted))
        except NotEnoughShards:
            # Better to try pools that failed a moment ago than to refuse.
            layout, self._note = self._writable_layout(layout)
            self._trusting = True
        return layout

    def _writable_layout(self, layout: Layout) -> tuple[Layout, str]:
        """Return what `writable_layout` does of all pools that take shards; raise ClusterFull, too."""
        try:
            return writable_layout(layout, len(self._view.takers))
        except NotEnoughShards as error:
            full = self._view.full
            if not full:
                raise
            disks = "the disk of one pool is" if full == 1 else f"the disks of {full} pools are"
            raise ClusterFull(f"{error}; {disks} full") from error

    async def send_chunks(
        self, sequence: int, chunks: Sequence[Frame], *, last: bool, checksums: Sequence[bytes] | None = None
    ) -> None:
        """Code and send chunks from number `sequence` on; return when their pieces are with the pools.

        `checksums` has one for each chunk; without, the caller has verified them. Raise IntegrityError when
        one differs, NotEnoughShards when fewer than k+1 shards of an extent can still become durable.
        """
        self._unsettled += 1
        try:
            self._check(chunks, last=last)
            if checksums is not None and len(checksums) != len(chunks):
                raise RemoteProtocolError(f"{len(checksums)} checksums of {len(chunks)} chunks")
            await self._turns.wait(sequence)
            under_way: list[tuple[_ExtentUpload, _Sent]] = []
            done = 0
            while done < len(chunks):
                extent = self._extent()
                run = slice(done, done + self._together(extent))
                arrived = _Arrived(
                    sequence + done, chunks[run], None if checksums is None else checksums[run]
                )
                done += len(arrived.chunks)
                sent = await self._code_and_send(extent, arrived, last=last and done == len(chunks))
                if sent.chunk == 0:
                    await self._settle(extent, sent)
                else:
                    under_way.append((extent, sent))
            self._turns.pass_on(len(chunks))
            for extent, sent in under_way:
                await self._settle(extent, sent)
        except BaseException as error:
            # Chunks behind this one must not wait for a turn that never comes.
            self._turns.break_off(
                error if isinstance(error, DroppexError) else PeerError("the upload was given up")
            )
            for started in self._extents:
                started.opened.set()
            raise
        finally:
            self._unsettled -= 1
            if not self._unsettled:
                self._all_settled.set()

    def _check(self, chunks: Sequence[Frame], *, last: bool) -> None:
        chunk_size = self._outlets.chunk_size
        for number, data in enumerate(chunks, 1):
            short = len(data) < chunk_size and not (last and number == len(chunks))
            if not data or len(data) > chunk_size or short:
                raise RemoteProtocolError(f"a chunk of {len(data)} bytes; all but the last have {chunk_size}")

    def _extent(self) -> _ExtentUpload:
        """Return the extent that the next chunk goes to."""
        if not self._extents or self._extents[-1].chunks == EXTENT_CHUNKS:
            self._extents.append(self._new_extent())
        return self._extents[-1]

    def _together(self, extent: _ExtentUpload) -> int:
        """Return how many of the extent's next chunks go to the pools in one message.

        The first goes alone, for its answer tells the pool's boot; and each does when pools are slow, for
        their answers are what tells a slow pool from one that hangs.
        """
        if not extent.chunks or self._slow:
            return 1
        return min(MOST_TOGETHER, EXTENT_CHUNKS - extent.chunks)

    async def _code_and_send(self, extent: _ExtentUpload, arrived: "_Arrived", *, last: bool) -> "_Sent":
        first = extent.chunks
        size = sum(map(len, arrived.chunks))
        extent.chunks += len(arrived.chunks)
        extent.size += size
        if self._recording is not None:
            told = arrived.checksums
            if told is None:
                told = await self._outlets.runtime.run_blocking(_checksums, arrived)
            extent.checksums.extend(told)
        self._size += size
        if size <= _INLINE_SIZE:
            encoded = _verify_and_encode(extent, first, arrived)
        else:
            encoded = await self._outlets.runtime.run_blocking(_verify_and_encode, extent, first, arrived)
        if first == 0:
            await self._connect(extent)
        else:
            await extent.opened.wait()
            self._turns.check()
        now = self._outlets.runtime.clock.now()
        sent = _Sent(first, encoded, now, last=last or extent.chunks == EXTENT_CHUNKS, ends=last)
        for target in extent.alive:
            self._send_pieces(extent, target, sent)
        return sent

    def _new_extent(self) -> _ExtentUpload:
        if self._place + len(self._extents) == MAX_EXTENTS:
            raise InvalidRequest("the file is too large: at most 4 TiB are allowed")
        self._view = self._outlets.registration.view
        extent_id = self._ids.extent()
        numbers = self._view.placement.choose(extent_id, self._layout, self._usable)
        return _ExtentUpload(
            extent_id,
            self._place + len(self._extents),
            self._layout,
            [_Target(index, number, self._address(number)) for index, number in enumerate(numbers)],
        )

    def _usable(self, number: int) -> bool:
        if not self._view.writable(number) or number in self._avoid:
            return False
        return self._trusting or number not in self._outlets.suspects

    def _address(self, number: int) -> str:
        pool = self._view.pool(number)
        return pool.address if pool is not None else ""

    async def _connect(self, extent: _ExtentUpload) -> None:
        """Connect to the pools of an extent; those that do not answer are replaced or missing."""
        missing = [
            target for target in extent.alive if not self._outlets.connections.connected(target.address)
        ]
        if missing:
            async with trio.open_nursery() as nursery:
                for target in missing:
                    nursery.start_soon(self._connect_one, target)
        for target in extent.alive:
            if target.failure:
                await self._replace(extent, target)

    async def _connect_one(self, target: _Target) -> None:
        try:
            await self._outlets.connections.connect(target.address, timeout_s=CONNECT_S)
        except PeerError as error:
            target.failure = str(error)
        else:
            target.heard = self._outlets.runtime.clock.now()

    async def _replace(self, extent: _ExtentUpload, target: _Target) -> bool:
        """Give the shard to another pool that can be reached, while none of it was sent yet."""
        while True:
            self._give_up(extent, target, target.failure)
            taken = {other.pool for other in extent.targets}
            spare = next(
                (
                    number
                    for number in self._view.placement.order(extent.id, extent.layout)
                    if number not in taken and self._usable(number)
                ),
                None,
            )
            if spare is None:
                return False
            target.pool, target.address = spare, self._address(spare)
            target.failure, target.busy = "", False
            await self._connect_one(target)
            if not target.failure:
                return True

    def _send_pieces(self, extent: _ExtentUpload, target: _Target, sent: "_Sent") -> None:
        index = target.index
        checksums = [encoded.checksums[index] for encoded in sent.encoded]
        request = WritePiece(
            extent=extent.id,
            index=index,
            layout=extent.layout,
            chunk=sent.chunk,
            chunk_size=self._outlets.chunk_size,
            checksum=checksums[0],
            boot_id=target.boot_id,
            incarnation=self._view.map.incarnation,
            version=self._version,
            last=sent.last,
            size=extent.size if sent.last else 0,
            name=self._wanted.name if sent.chunk == 0 else "",
            following=tuple(checksums[1:]),
            place=extent.place if sent.chunk == 0 else UNKNOWN_PLACE,
        )
        pieces = [encoded.pieces[index] for encoded in sent.encoded]
        try:
            pending = self._outlets.connections.begin(target.address, request, pieces, timeout_s=PIECE_S)
        except PeerError as error:
            target.failure = str(error)
            target.busy = isinstance(error, PeerBusy)
        else:
            sent.pending[index] = pending

    async def _settle(self, extent: _ExtentUpload, sent: "_Sent") -> None:
        """Wait for the answers to one message; give up pools that failed, or replace them at the start."""
        await self._await_answers(extent, sent)
        self._slow = self._outlets.runtime.clock.now() - sent.at > _SLOW_S
        if sent.chunk == 0:
            for target in extent.alive:
                while target.failure and await self._replace(extent, target):
                    self._send_pieces(extent, target, sent)
                    await self._await_answers(extent, sent)
            extent.opened.set()
        for target in extent.alive:
            if target.failure:
                self._give_up(extent, target, target.failure)
        if len(extent.alive) < extent.layout.least:
            self._turns.check()  # What broke the upload off is the reason, not what came of it.
            raise _too_few(extent)
        if self._recording is not None and extent.chunks == EXTENT_CHUNKS and sent.last and not sent.ends:
            digest = extent_digest(extent.checksums)
            await self._recording.add(extent.place, extent.record(self._outlets.chunk_size), digest)

    async def _await_answers(self, extent: _ExtentUpload, sent: "_Sent") -> None:
        await all_settled(list(sent.pending.values()), _LOOK_S)
        for target in extent.targets:
            pending = sent.pending.get(target.index)
            if pending is None:
                continue
            if not pending.done:
                await self._settled_or_stalled(target, pending, sent)
            del sent.pending[target.index]
            try:
                if pending.done:
                    reply, _ = await pending.answer()
                else:
                    pending.abandon()
                    raise PeerError(f"no progress for {STALL_S:g} s while other pools made some")
            except DroppexError as error:
                if not target.failure:  # The first is the reason; those behind it only follow from it.
                    target.failure = f"{target.address}: {error}"
                    target.busy = isinstance(error, PeerBusy)
                    target.full = isinstance(error, StoreFull)
            else:
                self._note_written(target, reply)
                if sent.progress_at is None:
                    sent.progress_at = target.heard

    async def _settled_or_stalled(
        self, target: _Target, pending: Pending[PieceWritten], sent: "_Sent"
    ) -> None:
        """Wait for an answer for as long as its pool gets on, or the others do not either."""
        clock = self._outlets.runtime.clock
        while not await pending.settled(_LOOK_S):
            now = clock.now()
            if sent.progress_at is None and any(other.done for other in sent.pending.values()):
                sent.progress_at = now
            if sent.progress_at is not None and now - max(sent.progress_at, target.heard) >= STALL_S:
                return

    def _note_written(self, target: _Target, reply: PieceWritten) -> None:
        target.heard = self._outlets.runtime.clock.now()
        if target.boot_id and target.boot_id != reply.boot_id:
            target.failure = f"{target.address} was restarted"
        target.boot_id = reply.boot_id

    def _give_up(self, extent: _ExtentUpload, target: _Target, why: str) -> None:
        log.warning(
            "shard given up extent=%s shard=%d pool=%d: %s", extent.id, target.index, target.pool, why
        )
        self._avoid.add(target.pool)
        if not target.busy:
            self._outlets.suspects.add(target.pool)
        target.failure = why
        target.pool = MISSING

    async def finish(self, blake3: bytes) -> Receipt:
        """Commit what was sent, under its name; all chunks were answered before.

        `blake3` is the sender's. Raise IntegrityError when another number of bytes arrived than was
        announced, Conflict when the condition does not hold.
        """
        extents = await self.records()
        version = Version(
            id=self._version,
            size=self._size,
            blake3=blake3,
            extents=(*self._kept, *(extent.id for extent in extents)),
            created_ms=self._outlets.runtime.clock.wall_ms(),
            metadata=self._wanted.metadata,
        )
        if self._recording is not None:
            await self._recording.settle()
        request = self._commit(version, extents)
        committed = await self._outlets.master.call(request, timeout_s=COMMIT_S)
        return committed.receipt

    def _commit(self, version: Version, extents: tuple[Extent, ...]) -> Request[Committed]:
        wanted, recording = self._wanted, self._recording
        operation = self._ids.operation()
        if recording is None or not recording.count:
            return Commit(
                operation=operation,
                name=wanted.name,
                condition=wanted.condition,
                version=version,
                extents=extents,
                note=self._note,
            )
        return CommitUpload(
            operation=operation,
            holder=recording.holder,
            name=wanted.name,
            condition=wanted.condition,
            version=version,
            rest=extents[recording.count - len(self._kept) :],
            note=self._note,
        )

    async def records(self) -> tuple[Extent, ...]:
        """Return the records of what was sent, once all of it is durable.

        Raise IntegrityError when another number of bytes arrived than was announced.
        """
        while self._unsettled:
            self._all_settled = trio.Event()
            await self._all_settled.wait()
        self._turns.check()
        if self._wanted.size is not None and self._wanted.size != self._size:
            raise IntegrityError(f"{self._size} bytes arrived of the {self._wanted.size} announced")
        return tuple(extent.record(self._outlets.chunk_size) for extent in self._extents)

    async def keep(self) -> None:
        """Tell the pools that the shards of the last extent go on, though their sender pauses."""
        await self._tell_pools(KeepShard, self._extents[-1:])

    async def abort(self) -> None:
        """Tell the pools that nothing of this will be committed; they drop it when the master agrees.

        Pools that miss it find out when they look through all that they hold.
        """
        self._turns.break_off(PeerError("the upload was aborted"))
        with trio.CancelScope(shield=True):
            noted = self._recording.count - len(self._kept) if self._recording is not None else 0
            await self._tell_pools(AbortShard, self._extents[noted:][-_MOST_ABORTED:])

    async def _tell_pools(
        self, kind: type[KeepShard] | type[AbortShard], extents: Sequence[_ExtentUpload]
    ) -> None:
        with trio.move_on_after(TELL_S):
            async with trio.open_nursery() as nursery:
                for extent in extents:
                    for target in extent.alive:
                        nursery.start_soon(
                            self._tell_pool, target.address, kind(extent=extent.id, index=target.index)
                        )

    async def _tell_pool(self, address: str, request: KeepShard | AbortShard) -> None:
        try:
            await self._outlets.connections.call(address, request, timeout_s=TELL_S)
        except DroppexError as error:
            log.debug("a pool was not told of a shard: %s", error)


def _checksums(arrived: "_Arrived") -> list[bytes]:
    return [chunk_checksum(number, data) for number, data in enumerate(arrived.chunks, arrived.sequence)]


def _too_few(extent: _ExtentUpload) -> NotEnoughShards:
    """Return the error for an extent that too few pools took, with what to do where that is known."""
    full = "; others had no room: delete files or add a pool" if any(t.full for t in extent.targets) else ""
    return NotEnoughShards(
        f"only {len(extent.alive)} of the {extent.layout.total} pools of {extent.layout} took their shard; "
        f"at least {extent.layout.least} are needed for a write that survives a loss{full}",
        [f"shard {target.index}: {target.failure}" for target in extent.targets if target.pool == MISSING],
    )


class _Arrived(NamedTuple):
    """Consecutive chunks as they came, from number `sequence` of the file on."""

    sequence: int
    chunks: Sequence[Frame]
    checksums: Sequence[bytes] | None


def _verify_and_encode(extent: _ExtentUpload, first: int, arrived: _Arrived) -> list[EncodedChunk]:
    """Return the pieces of the chunks, which are the extent's from `first` on. Blocking."""
    if arrived.checksums is not None:
        expected = zip(arrived.chunks, arrived.checksums, strict=True)
        for number, (data, checksum) in enumerate(expected, arrived.sequence):
            if chunk_checksum(number, data) != checksum:
                raise IntegrityError(f"chunk {number} arrived damaged: its checksum differs; try again")
    return [
        encode_chunk(extent.id, extent.layout, chunk, data)
        for chunk, data in enumerate(arrived.chunks, first)
    ]


class _Sent:
    """Consecutive chunks of an extent on their way to the pools, in one message to each."""

    __slots__ = ("at", "chunk", "encoded", "ends", "last", "pending", "progress_at")

    def __init__(
        self, chunk: int, encoded: Sequence[EncodedChunk], at: float, *, last: bool, ends: bool
    ) -> None:
        self.ends = ends
        """Whether the file ends here, and not only the extent."""
        self.chunk = chunk
        self.encoded = encoded
        self.at = at
        self.last = last
        self.pending: dict[int, Pending[PieceWritten]] = {}
        self.progress_at: float | None = None
        """When it was seen that a pool had taken its piece."""
