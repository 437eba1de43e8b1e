"""Shards on their way into a pool: streams of pieces into files, and small shards in groups.

Many small shards that arrive at the same time share one flush: the first starts a commit, and all that
arrive while it runs make up the next.
"""

import threading
from collections.abc import Callable, Sequence

import trio

from droppexd.brief import BriefWork
from droppexd.coding import piece_checksum
from droppexd.errors import DroppexError, IntegrityError, PeerBusy, RemoteProtocolError, StoreError
from droppexd.model import EXTENT_CHUNKS, SMALL_SIZE, ExtentId, ShardHeader
from droppexd.roles.ordered import Turns
from droppexd.runtime import Runtime
from droppexd.store.interface import ShardStore, ShardWriter, SmallShard
from droppexd.wire.messages import MOST_TOGETHER, WritePiece
from droppexd.wire.transport import Frame

CREDIT = 2 * MOST_TOGETHER
"""Pieces of one shard that may be unanswered: 8 MiB at 4+2."""

_MOST_STREAMS = 512
_MOST_SMALL = 4096
_GROUP = 512
"""Small shards in one commit: bounds how long the first waits for the last."""

_FAILURES_KEPT = 256
"""Shards that the disk refused a moment ago, and whose pieces may still be on their way."""

Key = tuple[ExtentId, int]


Done = Callable[[int | DroppexError], None]
"""Told the generation of a small shard that is durable, or why it is not."""


class SmallWriter:
    """Commits small shards in groups, one flush a group."""

    def __init__(self, store: ShardStore, runtime: Runtime) -> None:
        self._store = store
        self._work = BriefWork(runtime)
        self._waiting: list[tuple[SmallShard, Done]] = []
        self._more = trio.Event()

    def submit(self, shard: SmallShard, done: Done) -> None:
        """Store one small shard with the next commit; `done` is called when it is durable, or never will be.

        Raise PeerBusy when too many wait.
        """
        if len(self._waiting) >= _MOST_SMALL:
            raise PeerBusy("the pool has as many small shards waiting as it takes; try again")
        self._waiting.append((shard, done))
        self._more.set()

    async def run(self) -> None:
        """Commit what waits, for ever."""
        while True:
            await self._more.wait()
            group, self._waiting = self._waiting[:_GROUP], self._waiting[_GROUP:]
            if not self._waiting:
                self._more = trio.Event()
            await self._commit(group)

    async def _commit(self, group: Sequence[tuple[SmallShard, Done]]) -> None:
        results: Sequence[int | DroppexError]
        try:
            results = await self._work.run(self._store.put_small, [shard for shard, _ in group])
        except DroppexError as error:
            results = [error] * len(group)
        for (_, done), result in zip(group, results, strict=True):
            done(result)


class ShardStream:
    """One shard that is being written: what has arrived, and what is on disk."""

    def __init__(self, store: ShardStore, first: WritePiece) -> None:
        self.first = first
        self.arrived = 0
        self.unanswered = 0
        self.heard = 0.0
        self._store = store
        self._turns = Turns()
        self._checksums: list[bytes] = []
        self._writer: ShardWriter | None = None
        # A shard may be given up while a thread writes a piece of it, and a writer is for one at a time.
        self._lock = threading.Lock()
        self._given_up = False

    def admit(self, request: WritePiece) -> None:
        """Count the pieces of a message in, in order of arrival; raise RemoteProtocolError at a gap."""
        count = piece_count(request)
        if request.chunk != self.arrived:
            raise RemoteProtocolError(f"piece {request.chunk} came where {self.arrived} was due")
        if self.arrived + count > EXTENT_CHUNKS:
            raise RemoteProtocolError(f"a shard of more than {EXTENT_CHUNKS} pieces")
        if request.layout != self.first.layout or request.chunk_size != self.first.chunk_size:
            raise RemoteProtocolError("the layout changed within a shard")
        if self.unanswered + count > CREDIT:
            raise PeerBusy("more pieces came than credit was given")
        self.arrived += count
        self.unanswered += count

    def answered(self, request: WritePiece, now: float) -> None:
        """Count the pieces of a message out again."""
        self.unanswered -= piece_count(request)
        self.heard = now

    async def write(self, request: WritePiece, pieces: Sequence[Frame], runtime: Runtime) -> int:
        """Verify and write pieces in their turn; return the shard's generation after the last."""
        await self._turns.wait(request.chunk)
        generation = await runtime.run_blocking(self._write, request, pieces)
        self._turns.pass_on(len(pieces))
        return generation

    def due(self, chunk: int) -> bool:
        """Whether all pieces before this one are written."""
        return self._turns.due(chunk)

    def write_now(self, request: WritePiece, pieces: Sequence[Frame]) -> None:
        """Verify and write the pieces that are due; the last is not among them. Blocking."""
        self._write(request, pieces)
        self._turns.pass_on(len(pieces))

    def _write(self, request: WritePiece, pieces: Sequence[Frame]) -> int:
        for place, piece in enumerate(pieces):
            verify_piece(request, piece, place)
        with self._lock:
            if self._given_up:
                raise StoreError("the shard was given up")
            if self._writer is None:
                self._writer = self._store.begin(0)
            for chunk, piece in enumerate(pieces, request.chunk):
                self._writer.write(chunk, piece)
            self._checksums += (request.checksum, *request.following)
            if not request.last:
                return 0
            return self._writer.finish(header_of(self.first, request.size, self._checksums))

    def break_off(self, reason: BaseException) -> None:
        """Let no later piece be written."""
        self._turns.break_off(reason)

    def abort(self) -> None:
        """Remove what was written, and let nothing more be. Blocking, idempotent."""
        with self._lock:
            self._given_up = True
            if self._writer is not None:
                self._writer.abort()


def piece_count(request: WritePiece) -> int:
    """Return how many pieces the request says that it brings."""
    return 1 + len(request.following)


def verify_piece(request: WritePiece, piece: Frame, place: int = 0) -> None:
    """Raise IntegrityError unless the piece in this place of the request is what its sender coded."""
    found = piece_checksum(request.extent, request.layout, request.index, request.chunk + place, piece)
    if found != (request.following[place - 1] if place else request.checksum):
        raise IntegrityError(f"shard {request.index} of extent {request.extent} arrived damaged")


def header_of(first: WritePiece, size: int, checksums: Sequence[bytes]) -> ShardHeader:
    """Return what a shard says of itself."""
    return ShardHeader(
        incarnation=first.incarnation,
        extent=first.extent,
        index=first.index,
        layout=first.layout,
        size=size,
        chunk_size=first.chunk_size,
        checksums=tuple(checksums),
        version=first.version,
        name=first.name,
        place=first.place,
    )


def is_small(request: WritePiece, body: Sequence[Frame]) -> bool:
    """Whether this one message is a whole small shard."""
    return (
        request.chunk == 0
        and request.last
        and not request.following
        and len(body) == 1
        and len(body[0]) <= SMALL_SIZE
    )


def _whole(request: WritePiece, body: Sequence[Frame]) -> bool:
    """Whether there is a frame for each piece that the request speaks of."""
    return len(body) == piece_count(request)


class ShardStreams:
    """The shards that are being written, by identity."""

    def __init__(self, store: ShardStore, runtime: Runtime) -> None:
        self._store = store
        self._runtime = runtime
        self._writes = BriefWork(runtime)
        self._streams: dict[Key, ShardStream] = {}
        self._failures: dict[Key, StoreError] = {}

    def admit(self, request: WritePiece, body: Sequence[Frame]) -> ShardStream | None:
        """Return the stream of a piece, in order of arrival; None for a whole small shard.

        Raise RemoteProtocolError for a gap, another boot of the pool, or a piece of no stream.
        """
        if is_small(request, body):
            return None
        key = (request.extent, request.index)
        stream = self._streams.get(key)
        if request.chunk == 0:
            if stream is not None:
                raise StoreError(f"shard {request.index} of extent {request.extent} is being written already")
            if len(self._streams) >= _MOST_STREAMS:
                raise PeerBusy("the pool has as many shards being written as it takes; try again")
            stream = self._streams[key] = ShardStream(self._store, request)
        elif request.boot_id != self._store.identity.boot_id:
            raise RemoteProtocolError("the pool was restarted since this shard was begun")
        elif stream is None:
            # A writer with more pieces on their way is told the reason, in whichever answer it sees first.
            raise self._failures.get(key) or RemoteProtocolError(
                "a piece of a shard that is not being written"
            )
        stream.admit(request)
        return stream

    def write_now(self, stream: ShardStream, request: WritePiece, body: Sequence[Frame]) -> bool:
        """Write admitted pieces at once, if they are due and the disk takes them; return whether it did.

        The last piece of a shard brings its flush, which is for a thread.
        """
        if request.last or not _whole(request, body):
            return False
        if not (self._writes.brief and stream.due(request.chunk)):
            return False
        try:
            self._writes.now(stream.write_now, request, body)
        except DroppexError as error:
            stream.break_off(error)
            if isinstance(error, StoreError):
                self._note_failure((request.extent, request.index), error)
            stream.abort()
            self._forget(request.extent, request.index, stream)
            raise
        finally:
            stream.answered(request, self._runtime.clock.now())
        return True

    async def write(self, stream: ShardStream, request: WritePiece, body: Sequence[Frame]) -> int:
        """Write admitted pieces; a shard with a failed piece is forgotten whole."""
        finished = request.last
        try:
            if not _whole(request, body):
                raise RemoteProtocolError("a piece without its bytes, or bytes without their piece")
            return await stream.write(request, body, self._runtime)
        except BaseException as error:
            finished = True
            # Pieces behind this one must not wait for a turn that never comes.
            reason = error if isinstance(error, DroppexError) else StoreError("the shard was given up")
            stream.break_off(reason)
            if isinstance(error, StoreError):
                self._note_failure((request.extent, request.index), error)
            with trio.CancelScope(shield=True):
                await self._runtime.run_blocking(stream.abort)
            raise
        finally:
            stream.answered(request, self._runtime.clock.now())
            if finished:
                self._forget(request.extent, request.index, stream)

    def _note_failure(self, key: Key, reason: StoreError) -> None:
        self._failures.setdefault(key, reason)
        if len(self._failures) > _FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]

    def _forget(self, extent: ExtentId, index: int, stream: ShardStream) -> None:
        if self._streams.get((extent, index)) is stream:
            del self._streams[extent, index]

    def keep(self, extent: ExtentId, index: int) -> None:
        """Note that the writer of a shard is there, though it sends nothing."""
        stream = self._streams.get((extent, index))
        if stream is not None:
            stream.heard = self._runtime.clock.now()

    async def abort(self, extent: ExtentId, index: int) -> None:
        """Give up a shard that is being written; nothing happens when there is none."""
        stream = self._streams.pop((extent, index), None)
        if stream is not None:
            stream.break_off(StoreError("the writer gave this shard up"))
            await self._runtime.run_blocking(stream.abort)

    async def reap(self, idle_s: float) -> None:
        """Give up shards whose writer was silent for too long."""
        now = self._runtime.clock.now()
        silent = [
            key
            for key, stream in self._streams.items()
            if not stream.unanswered and now - stream.heard > idle_s
        ]
        for extent, index in silent:
            await self.abort(extent, index)
