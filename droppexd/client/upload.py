"""Writing: chunks read and hashed in a worker thread, as many on their way as the app gives credit.

Half of the credit goes in one message, so that the app works on one while the next is made. The first
messages are smaller: of a short file, too, the app gets the begin while the rest is read.

A put that says where its bytes come from goes on with what an earlier one from there has left: its bytes are
read and compared, and only what is behind them, or differs, is sent.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import BinaryIO

import trio
from blake3 import blake3

from droppexd.client.keeping import kept_alive
from droppexd.client.together import chunks_together
from droppexd.coding import chunk_checksum, extent_digest
from droppexd.errors import (
    DroppexError,
    IntegrityError,
    NotFound,
    PeerError,
    RemoteProtocolError,
    StreamGone,
)
from droppexd.model import EXTENT_CHUNKS, SMALL_SIZE, Layout, Metadata, Receipt
from droppexd.runtime import Runtime
from droppexd.wire.messages import (
    Condition,
    KeepStream,
    PutAbort,
    PutChunk,
    PutOpen,
    PutOpened,
    PutProgress,
    PutSmall,
)
from droppexd.wire.rpc import Connections, Pending
from droppexd.wire.upload_messages import PutResume

OPEN_S = 600.0
"""How long a put may wait for its turn at the app."""
CHUNK_S = 300.0
"""The longest that the app may take over one chunk, the commit after the last included."""
_ABORT_S = 2.0

Progress = Callable[[int], None]
Resumed = Callable[[int], None]
"""Is told how many bytes of a file are not sent again."""


class Upload:
    """One put through an app."""

    def __init__(
        self,
        connections: Connections,
        runtime: Runtime,
        address: str,
        *,
        name: str,
        condition: Condition,
        layout: Layout | None,
        metadata: Metadata,
        origin: bytes = b"",
        on_resume: Resumed | None = None,
    ) -> None:
        self._origin = origin
        self._on_resume = on_resume
        self._connections = connections
        self._runtime = runtime
        self._address = address
        self._name = name
        self._condition = condition
        self._layout = layout
        self._metadata = metadata

    async def put_bytes(self, data: bytes) -> Receipt:
        """Store a small file, in one message."""
        digest = blake3(data).digest()
        request = PutSmall(
            name=self._name,
            condition=self._condition,
            blake3=digest,
            layout=self._layout,
            metadata=self._metadata,
        )
        body = (data,) if data else ()
        stored, _ = await self._connections.call(self._address, request, body, timeout_s=CHUNK_S)
        return _checked(stored.receipt, digest)

    async def put_file(self, source: BinaryIO, size: int | None, progress: Progress | None) -> Receipt:
        """Store what `source` holds, to its end; `size` is what it should hold, when that is known."""
        reader = _Reader(source)
        if self._origin and size is not None:
            reader.remember_start()
        head = await self._runtime.run_blocking(reader.read, SMALL_SIZE + 1)
        if len(head) <= SMALL_SIZE:
            if size is not None and size != len(head):
                raise IntegrityError(f"the source holds {len(head)} bytes and not {size}; did it change?")
            receipt = await self.put_bytes(head)
            if progress is not None:
                progress(len(head))
            return receipt
        request = PutOpen(
            name=self._name,
            condition=self._condition,
            size=size,
            layout=self._layout,
            metadata=self._metadata,
            source=self._origin if size is not None else b"",
        )
        opened, _ = await self._connections.call(self._address, request, timeout_s=OPEN_S)
        keep = KeepStream(stream=opened.stream, put=True)
        try:
            async with kept_alive(self._connections, self._address, lambda: keep):
                reader.unread(head)
                first = await self._go_on(reader, opened, size or 0, progress) if opened.digests else 0
                return await self._send(reader, first, opened, progress)
        except StreamGone as error:
            raise PeerError(
                f"the app at {self._address} was started anew, or gave up this put: {error}"
            ) from error
        except BaseException:
            await self._abort(opened.stream)
            raise

    async def _go_on(self, reader: "_Reader", opened: PutOpened, size: int, progress: Progress | None) -> int:
        """Pass over what an earlier put has left; return the number of the first chunk that is to be sent."""
        extent_size = opened.chunk_size * EXTENT_CHUNKS
        same = 0
        for place, digest in enumerate(opened.digests):
            if (place + 1) * extent_size >= size:
                break  # Something must be left to be sent.
            found = await self._runtime.run_blocking(reader.pass_extent, place, opened.chunk_size, digest)
            if not found:
                break
            same += 1
            if progress is not None:
                progress(extent_size)
        request = PutResume(stream=opened.stream, keep=same)
        try:
            await self._connections.call(self._address, request, timeout_s=OPEN_S)
        except NotFound:  # It was given up just now.
            if progress is not None:
                progress(-same * extent_size)
            await self._runtime.run_blocking(reader.begin_anew)
            return 0
        if same and self._on_resume is not None:
            self._on_resume(same * extent_size)
        return same * EXTENT_CHUNKS

    async def _send(
        self, reader: "_Reader", first: int, opened: PutOpened, progress: Progress | None
    ) -> Receipt:
        run_blocking = self._runtime.run_blocking
        pending: deque[tuple[int, int, Pending[PutProgress]]] = deque()
        credit, chunk_size = opened.credit, opened.chunk_size
        sequence, unanswered = first, 0
        ready = await run_blocking(
            reader.read_chunks, chunks_together(sequence - first, opened.together, credit), chunk_size
        )
        receipt: Receipt | None = None
        while ready or pending:
            count = min(len(ready), chunks_together(sequence - first, opened.together, credit))
            if count and unanswered + count <= max(1, credit):
                chunks, ready = ready[:count], ready[count:]
                ahead = chunks_together(sequence - first + count, opened.together, credit)
                checksums, more = await run_blocking(
                    reader.hash_and_read, sequence, chunks, ahead - len(ready), chunk_size
                )
                ready += more
                request = PutChunk(
                    stream=opened.stream,
                    sequence=sequence,
                    last=not ready,
                    blake3=None if ready else reader.digest(),
                    checksums=checksums,
                )
                begun = self._connections.begin(self._address, request, chunks, timeout_s=CHUNK_S)
                pending.append((count, sum(map(len, chunks)), begun))
                sequence += count
                unanswered += count
                continue
            count, size, oldest = pending.popleft()
            answer, _ = await oldest.answer()
            unanswered -= count
            credit, receipt = answer.credit, answer.receipt
            if progress is not None:
                progress(size)
        if receipt is None:
            raise RemoteProtocolError("the app sent no receipt for the last chunk")
        return _checked(receipt, reader.digest())

    async def _abort(self, stream: int) -> None:
        with trio.move_on_after(_ABORT_S, shield=True):
            try:
                await self._connections.call(self._address, PutAbort(stream=stream), timeout_s=_ABORT_S)
            except DroppexError:
                return  # The app has given the stream up already, or will when it hears nothing more.


class _Reader:
    """Reads whole chunks of a source, and hashes what is sent. Its methods block."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._start = 0
        self._hash = blake3()
        self._held = b""
        self._ended = False

    def read(self, length: int) -> bytes:
        """Return that many bytes; fewer only at the end, and none after it: a terminal would ask again."""
        data = b"" if self._ended else self._source.read(length)
        if len(data) == length:
            return data
        parts = [data]
        missing = length - len(data)
        while missing and not self._ended:
            more = self._source.read(missing) if parts[-1] else b""
            self._ended = not more
            parts.append(more)
            missing -= len(more)
        return b"".join(parts)

    def remember_start(self) -> None:
        """Note where the source begins, to return there; it can be read again."""
        self._start = self._source.tell()

    def unread(self, data: bytes) -> None:
        """Let the next chunk begin with these bytes."""
        self._held = data

    def pass_extent(self, place: int, chunk_size: int, digest: bytes) -> bool:
        """Read the next extent; go on behind it if it has this digest, and else return to its begin."""
        hasher = self._hash.copy()
        checksums = []
        for number in range(place * EXTENT_CHUNKS, (place + 1) * EXTENT_CHUNKS):
            chunks = self.read_chunks(1, chunk_size)
            for chunk in chunks:
                hasher.update(chunk)
                checksums.append(chunk_checksum(number, chunk))
        if extent_digest(checksums) == digest:
            self._hash = hasher
            return True
        self._return_to(place * EXTENT_CHUNKS * chunk_size)
        return False

    def begin_anew(self) -> None:
        """Return to the begin of the source."""
        self._hash = blake3()
        self._return_to(0)

    def _return_to(self, offset: int) -> None:
        self._source.seek(self._start + offset)
        self._held, self._ended = b"", False

    def read_chunks(self, count: int, chunk_size: int) -> list[bytes]:
        """Return the next chunks, `count` or as many as are left; only the last of all may be short."""
        chunks: list[bytes] = []
        for _ in range(count):
            chunk = self._held[:chunk_size]
            self._held = self._held[chunk_size:]
            if len(chunk) < chunk_size:
                chunk += self.read(chunk_size - len(chunk))
            if not chunk:
                break
            chunks.append(chunk)
        return chunks

    def hash_and_read(
        self, sequence: int, sent: Sequence[bytes], count: int, chunk_size: int
    ) -> tuple[tuple[bytes, ...], list[bytes]]:
        """Return the checksums of the chunks that are about to be sent, and the next `count` chunks."""
        checksums = []
        for number, chunk in enumerate(sent, sequence):
            self._hash.update(chunk)
            checksums.append(chunk_checksum(number, chunk))
        return tuple(checksums), self.read_chunks(count, chunk_size)

    def digest(self) -> bytes:
        """Return the BLAKE3 of all that was sent."""
        return self._hash.digest()


def _checked(receipt: Receipt, digest: bytes) -> Receipt:
    if receipt.blake3 != digest:
        raise IntegrityError(f"{receipt.name}: the receipt's BLAKE3 is not that of what was sent")
    return receipt
