"""One read: k data pieces of each chunk, handed on as they are; parity only when something is wrong.

A piece that is missing, wrong or late is replaced by another of its extent, and the chunk is rebuilt from
any k. Every piece is verified against its checksum before a byte of it is handed on.
"""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import trio

from droppexd.coding import piece_checksum, rebuild_pieces
from droppexd.errors import (
    DroppexError,
    InvalidRequest,
    NoSuchShard,
    NotEnoughShards,
    NotFound,
    PeerError,
    StaleRead,
)
from droppexd.model import MISSING, Extent, Layout, PoolInfo, chunk_count, chunk_length, piece_size
from droppexd.roles.app_reporter import Reporter
from droppexd.roles.app_session import Registration
from droppexd.roles.master import FAILOVER_S, MasterLink
from droppexd.roles.suspects import Suspects
from droppexd.runtime import Clock, Runtime
from droppexd.wire.messages import MAX_BODY_FRAMES, MOST_TOGETHER, Found, Lookup, Piece, ReadPiece
from droppexd.wire.rpc import Connections, Pending
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.app")

CONNECT_S = 2.0
PIECE_S = 20.0
"""A read of one piece that takes longer is a failure."""

_LATE_FACTOR = 3.0
"""A piece is late when it takes this many times the usual."""
_LATE_LEAST_S = 0.1
"""Below this, lateness is noise of the scheduler."""
_EXTRA_SHARE = 0.05
"""Extra reads for late pieces are at most this share of all reads..."""
_EXTRA_BURST = 8.0
"""...after this many, so that the first slow pool is met at once."""
_HUNG_S = 1.0
"""A pool that is silent for so long while others have answered hangs: reading elsewhere is no extra."""
_INLINE_SIZE = 64 * 1024
"""Rebuilding this much costs less than handing it to a thread."""


class Pace:
    """How long reads take, and how many extra ones are allowed. Shared by all reads of an app."""

    def __init__(self) -> None:
        self._usual_s = _LATE_LEAST_S
        self._extra = _EXTRA_BURST

    @property
    def late_s(self) -> float:
        """After how long a read is late."""
        return max(_LATE_LEAST_S, _LATE_FACTOR * self._usual_s)

    def note(self, seconds: float) -> None:
        """Take a finished read into account."""
        self._usual_s += (seconds - self._usual_s) / 32
        self._extra = min(_EXTRA_BURST, self._extra + _EXTRA_SHARE)

    def take_extra(self) -> bool:
        """Allow one extra read, if the share is not used up."""
        if self._extra < 1:
            return False
        self._extra -= 1
        return True


class Reader:
    """Reads pieces and rebuilds chunks for one app."""

    def __init__(
        self,
        connections: Connections,
        registration: Registration,
        master: MasterLink,
        runtime: Runtime,
        suspects: Suspects,
        reporter: Reporter,
    ) -> None:
        self._reporter = reporter
        self._connections = connections
        self._registration = registration
        self._master = master
        self._runtime = runtime
        self._suspects = suspects
        # Apart from those: a pool that is late to a reader may still take new shards.
        self._late = Suspects(runtime.clock)
        self._pace = Pace()

    async def look_up(self, request: Lookup) -> Found:
        """Ask the master what a name points at."""
        return await self._master.call(request, timeout_s=FAILOVER_S)

    async def read(self, extent: Extent, chunk: int, start: int, end: int) -> tuple[list[Frame], bool]:
        """Return the bytes [start, end) of a chunk as frames, and whether anything had to be rebuilt.

        Raise NotEnoughShards, naming what is missing and why, when fewer than k pieces can be had.
        """
        each = _piece_size(extent, chunk)
        wanted = range(start // each, (end - 1) // each + 1)
        fetched = await self._fetch(extent, chunk, 1, wanted).run()
        if len(wanted) == 1 and wanted[0] in fetched:  # Most small files.
            return _cut({wanted[0]: fetched[wanted[0]][0]}, wanted, each, start, end), False
        pieces, rebuilt = await self._complete(extent, fetched, wanted)
        return _cut(pieces[0], wanted, each, start, end), rebuilt

    async def read_whole(self, extent: Extent, first: int, count: int) -> tuple[list[Frame], int]:
        """Return whole consecutive chunks as frames, and how many of them had to be rebuilt.

        Each pool is asked once for all of its pieces. Raise NotEnoughShards as `read` does.
        """
        wanted = range(extent.layout.k)
        lengths = [
            chunk_length(extent.size, extent.chunk_size, chunk) for chunk in range(first, first + count)
        ]
        frames: list[Frame] = []
        fetch = self._fetch(extent, first, count, wanted)
        try:
            fetched = await fetch.run()
        except NotEnoughShards:
            fetched = {}
        if not fetched or fetch.torn:
            # A shard that is wrong in one chunk may be right in the others: judge each by itself.
            rebuilt = 0
            for chunk, length in enumerate(lengths, first):
                more, lost = await self.read(extent, chunk, 0, length)
                frames += more
                rebuilt += lost
            return frames, rebuilt
        pieces, lost = await self._complete(extent, fetched, wanted)
        for of_chunk, length in zip(pieces, lengths, strict=True):
            frames += _cut(of_chunk, wanted, piece_size(length, extent.layout.k), 0, length)
        return frames, count if lost else 0

    def _fetch(self, extent: Extent, first: int, count: int, wanted: Sequence[int]) -> "_Fetch":
        return _Fetch(
            connections=self._connections,
            registration=self._registration,
            pace=self._pace,
            suspects=self._suspects,
            late=self._late,
            reporter=self._reporter,
            clock=self._runtime.clock,
            extent=extent,
            first=first,
            count=count,
            wanted=wanted,
        )

    async def _complete(
        self, extent: Extent, fetched: dict[int, Sequence[Frame]], wanted: Sequence[int]
    ) -> tuple[list[dict[int, Frame]], bool]:
        """Return the wanted pieces of each chunk, and whether any had to be rebuilt for it."""
        count = len(next(iter(fetched.values())))
        chunks = [{index: pieces[place] for index, pieces in fetched.items()} for place in range(count)]
        if all(index in fetched for index in wanted):
            return chunks, False
        if count * extent.layout.k * len(next(iter(fetched.values()))[0]) <= _INLINE_SIZE:
            return _rebuilt(extent.layout, chunks, wanted), True
        return await self._runtime.run_blocking(_rebuilt, extent.layout, chunks, wanted), True


def _piece_size(extent: Extent, chunk: int) -> int:
    return piece_size(chunk_length(extent.size, extent.chunk_size, chunk), extent.layout.k)


def _rebuilt(
    layout: Layout, chunks: Sequence[dict[int, Frame]], wanted: Sequence[int]
) -> list[dict[int, Frame]]:
    return [rebuild_pieces(layout, pieces, wanted) for pieces in chunks]


def _cut(pieces: Mapping[int, Frame], wanted: Sequence[int], each: int, start: int, end: int) -> list[Frame]:
    """Return the bytes [start, end) of a chunk from its pieces, which have `each` bytes."""
    frames: list[Frame] = []
    for index in wanted:
        low = max(start - index * each, 0)
        high = min(end - index * each, each)
        piece = pieces[index]
        if (low, high) == (0, len(piece)):
            frames.append(piece)
        elif low < high:
            frames.append(memoryview(piece)[low:high])
    return frames


class _Fetch:
    """The pieces of consecutive chunks of an extent: those of the wanted shards, or of any k."""

    def __init__(
        self,
        *,
        connections: Connections,
        registration: Registration,
        pace: Pace,
        suspects: Suspects,
        late: Suspects,
        reporter: Reporter,
        clock: Clock,
        extent: Extent,
        first: int,
        count: int,
        wanted: Sequence[int],
    ) -> None:
        self._connections = connections
        self._pace = pace
        self._suspects = suspects
        self._late = late
        self._reporter = reporter
        self._clock = clock
        self._extent = extent
        self._chunks = range(first, first + count)
        self._wanted = wanted
        self._pieces: dict[int, Sequence[Frame]] = {}
        self.torn = False
        """Whether one of several pieces of a shard was wrong: then nothing more is fetched."""
        self._failures: dict[int, str] = {}
        self._pools: dict[int, PoolInfo] = {}
        self._down: set[int] = set()
        view = registration.view
        for index, number in enumerate(extent.pools):
            pool = view.pool(number)
            if number == MISSING or pool is None:
                self._failures[index] = "missing" if number == MISSING else f"pool {number} is unknown"
            else:
                self._pools[index] = pool
                if not pool.readable and not self._connections.connected(pool.address):
                    # The map may be some seconds old, and a master that began a moment ago calls all pools
                    # down: that is a reason to ask the others first, and none to refuse what can be read.
                    self._down.add(index)

    async def run(self) -> dict[int, Sequence[Frame]]:
        """Return the pieces of each chunk by shard index: all that are wanted, or else at least k."""
        late = await self._fetch_alone()
        if not self._enough():
            await self._fetch_side_by_side(late)
        if not self._enough() and not self.torn:
            raise NotEnoughShards(
                f"extent {self._extent.id}: only {len(self._pieces)} of the {self._extent.layout.k} shards "
                f"that are needed can be read",
                [
                    f"extent {self._extent.id} shard {index}: {why}"
                    for index, why in sorted(self._failures.items())
                ],
            )
        return self._pieces

    @property
    def _late_s(self) -> float:
        """After how long these pieces are late."""
        return self._pace.late_s * len(self._chunks)

    def _sources(self) -> list[int]:
        """Return the shards to ask for, best first: wanted, data, parity; then suspects, then down pools."""
        wanted = self._wanted
        return sorted(
            (index for index in self._pools if index not in self._failures and index not in self._pieces),
            key=lambda index: (
                index in self._down,
                self._extent.pools[index] in self._late or self._extent.pools[index] in self._suspects,
                index not in wanted,
                index,
            ),
        )

    def _enough(self) -> bool:
        return len(self._pieces) >= self._extent.layout.k or all(
            index in self._pieces for index in self._wanted
        )

    async def _fetch_alone(self) -> dict[int, Pending[Piece]]:
        """Fetch the one piece that is wanted, the common case of small files, without a task of its own.

        Return the read that is late, if it is.
        """
        best = self._sources()[:1]
        if len(self._wanted) != 1 or best != list(self._wanted):
            return {}
        index = best[0]
        if not self._connections.connected(self._pools[index].address):
            return {}
        pending = self._begin(index)
        if pending is None:
            return {}
        started = self._clock.now()
        if not await pending.settled(self._late_s):
            return {index: pending}
        await self._finish(index, pending, started)
        return {}

    async def _fetch_side_by_side(self, late: dict[int, Pending[Piece]]) -> None:
        """Fetch until there is enough; start another read for each that fails or is late."""
        k = self._extent.layout.k
        queue = [index for index in self._sources() if index not in late]
        missing = [index for index in self._wanted if index not in self._pieces and index not in late]
        first = queue[: len(missing)]
        if sorted(first) != missing:
            first = queue[: max(0, k - len(self._pieces) - len(late))]
        spare = queue[len(first) :]
        running: dict[int, None] = {}
        slow: set[int] = set()
        finished = trio.Event()

        async def one(index: int) -> None:
            await self._fetch(index, late.get(index))
            del running[index]
            finished.set()

        async with trio.open_nursery() as nursery:

            def start(indexes: Sequence[int]) -> None:
                for index in indexes:
                    running[index] = None
                    nursery.start_soon(one, index)

            start([*late, *first])
            hangs_at = self._clock.now() + _HUNG_S
            patience_s = 0.0 if late else self._late_s
            while not self._enough() and not self.torn:
                if not all(index in self._pieces or index in running for index in self._wanted):
                    short = max(0, k - len(self._pieces) - len(running))
                    start(spare[:short])
                    del spare[:short]
                if not running:
                    break
                finished = trio.Event()
                with trio.move_on_after(patience_s) as waiting:
                    await finished.wait()
                if waiting.cancelled_caught:
                    patience_s = self._late_s
                    waited_for = tuple(running)
                    hung = bool(self._pieces) and self._clock.now() >= hangs_at
                    for _ in range(k - len(self._pieces)):
                        if spare and (hung or self._pace.take_extra()):
                            slow.update(waited_for)
                            start([spare.pop(0)])
            for index in slow.intersection(running):
                self._late.add(self._extent.pools[index])
            nursery.cancel_scope.cancel()

    def _begin(self, index: int) -> Pending[Piece] | None:
        """Send the request for one piece, or note why that is not possible."""
        count = len(self._chunks)
        request = ReadPiece(extent=self._extent.id, index=index, chunk=self._chunks[0], count=count)
        try:
            return self._connections.begin(self._pools[index].address, request, timeout_s=PIECE_S * count)
        except PeerError as error:
            self._unreachable(index, error)
            return None

    def _unreachable(self, index: int, error: PeerError) -> None:
        pool = self._pools[index]
        self._suspects.add(pool.number)
        self._failures[index] = f"{pool.name}{' is down' if index in self._down else ''}: {error}"

    def _unreadable(self, index: int, why: str) -> None:
        pool = self._pools[index]
        log.warning("shard unreadable extent=%s shard=%d pool=%s: %s", self._extent.id, index, pool.name, why)
        self._failures[index] = f"{pool.name}: {why}"
        self._reporter.note(pool.address, self._extent.id, index)

    async def _fetch(self, index: int, pending: Pending[Piece] | None) -> None:
        """Fetch the pieces of one shard; a failure becomes a note, for parity is there for it."""
        started = self._clock.now()
        if pending is None:
            address = self._pools[index].address
            try:
                await self._connections.connect(address, timeout_s=CONNECT_S)
            except PeerError as error:
                self._unreachable(index, error)
                return
            pending = self._begin(index)
        if pending is not None:
            await self._finish(index, pending, started)

    async def _finish(self, index: int, pending: Pending[Piece], started: float) -> None:
        """Wait for the pieces of one shard and verify them."""
        pool = self._pools[index]
        try:
            reply, body = await pending.answer()
        except NoSuchShard:
            self._failures[index] = f"not on {pool.name}"
            self._reporter.note(pool.address, self._extent.id, index)
        except PeerError as error:
            self._unreachable(index, error)
        except DroppexError as error:
            self._unreadable(index, str(error))
        else:
            wrong = self._what_is_wrong(index, reply, body)
            if not wrong:
                self._pace.note((self._clock.now() - started) / len(body))
                self._pieces[index] = body
            elif len(self._chunks) > 1:
                self.torn = True
            else:
                self._unreadable(index, wrong)

    def _what_is_wrong(self, index: int, reply: Piece, body: Sequence[Frame]) -> str:
        """Verify the pieces of one shard; return what is wrong with one, or nothing."""
        extent = self._extent
        checksums = (reply.checksum, *reply.following)
        if len(body) != len(self._chunks) or len(checksums) != len(body):
            return f"{len(body)} pieces where {len(self._chunks)} were asked for"
        for chunk, checksum, piece in zip(self._chunks, checksums, body, strict=True):
            if len(piece) != _piece_size(extent, chunk):
                return "a piece of the wrong size"
            if piece_checksum(extent.id, extent.layout, index, chunk, piece) != checksum:
                return "the bytes do not match their checksum"
        return ""


class Download:
    """One open read of a version: its parts are its chunks, cut to the range that was asked for."""

    def __init__(self, reader: Reader, found: Found, start: int, length: int | None) -> None:
        size = found.version.size
        if start > size:
            raise InvalidRequest(f"the range starts at {start}, behind the end at {size}")
        self.found = found
        self.start = start
        self.end = size if length is None else min(size, start + length)
        self._reader = reader
        self._place(found)
        first, last = self._part_of(self.start), self._part_of(self.end - 1)
        self._first_part = first
        self.parts = last - first + 1 if self.end > self.start else 0

    def _place(self, found: Found) -> None:
        extents = found.extents
        self._offsets = [0, *accumulate(extent.size for extent in extents)]
        self._parts = [0, *accumulate(chunk_count(extent.size, extent.chunk_size) for extent in extents)]

    def _part_of(self, offset: int) -> int:
        """Return the number of the chunk, counted over the whole file, that holds this byte."""
        if not self.found.extents or offset < 0:
            return 0
        at = min(bisect_right(self._offsets, offset) - 1, len(self.found.extents) - 1)
        return self._parts[at] + (offset - self._offsets[at]) // self.found.extents[at].chunk_size

    @property
    def together(self) -> int:
        """How many parts fit into one answer: it takes so many frames."""
        most_pieces = max((extent.layout.k for extent in self.found.extents), default=1)
        return max(1, min(MOST_TOGETHER, MAX_BODY_FRAMES // most_pieces))

    async def read_parts(self, part: int, count: int = 1) -> tuple[list[Frame], int]:
        """Return the frames of parts, and of how many something had to be rebuilt.

        Raise NotEnoughShards, or StaleRead when the version has gone meanwhile.
        """
        if not 0 <= part <= self.parts - count or count > self.together:
            raise InvalidRequest(f"{count} parts from part {part} on, of a read with {self.parts} parts")
        try:
            return await self._read_chunks(self._first_part + part, count)
        except NotEnoughShards as error:
            found = await self._look_again(error)
            if found.extents == self.found.extents:
                raise
            self.found = found
        return await self._read_chunks(self._first_part + part, count)

    async def _look_again(self, error: NotEnoughShards) -> Found:
        """Ask for the version once more: its shards may have moved, or it may be gone."""
        request = Lookup(name=self.found.name, version=self.found.version.id)
        try:
            return await self._reader.look_up(request)
        except NotFound:
            raise StaleRead(f"{self.found.name} was removed or replaced while it was read") from error

    async def _read_chunks(self, number: int, count: int) -> tuple[list[Frame], int]:
        frames, done, rebuilt = await self._read_some(number, count)
        while done < count:
            number += done
            count -= done
            more, done, again = await self._read_some(number, count)
            frames += more
            rebuilt += again
        return frames, rebuilt

    async def _read_some(self, number: int, most: int) -> tuple[list[Frame], int, int]:
        """Return the frames of a chunk, or of whole ones with it; how many; and how many were rebuilt."""
        at = bisect_right(self._parts, number) - 1
        extent = self.found.extents[at]
        chunk = number - self._parts[at]
        offset = self._offsets[at] + chunk * extent.chunk_size
        start, end = self.start - offset, self.end - offset
        whole = 0  # So many from this one on lie within one extent, and within the range.
        if start <= 0:
            chunks = chunk_count(extent.size, extent.chunk_size) - chunk
            within = chunks if end >= extent.size - chunk * extent.chunk_size else end // extent.chunk_size
            whole = min(most, within)
        if whole > 1:
            frames, rebuilt = await self._reader.read_whole(extent, chunk, whole)
            return frames, whole, rebuilt
        length = chunk_length(extent.size, extent.chunk_size, chunk)
        frames, lost = await self._reader.read(extent, chunk, max(start, 0), min(end, length))
        return frames, 1, int(lost)
