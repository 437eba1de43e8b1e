"""Writing: chunks read and hashed in a worker thread, as many on their way as the app gives credit."""

from collections import deque
from collections.abc import Callable
from typing import BinaryIO

import trio
from blake3 import blake3

from droppexd.client.keeping import kept_alive
from droppexd.errors import DroppexError, IntegrityError, RemoteProtocolError
from droppexd.model import SMALL_SIZE, Layout, Metadata, Receipt
from droppexd.runtime import Runtime
from droppexd.wire.messages import Condition, KeepStream, PutAbort, PutChunk, PutOpen, PutProgress, PutSmall
from droppexd.wire.rpc import Connections, Pending

OPEN_S = 600.0
"""How long a put may wait for its turn at the app."""
CHUNK_S = 300.0
"""The longest that the app may take over one chunk, the commit after the last included."""
_ABORT_S = 2.0

Progress = Callable[[int], None]


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
    ) -> None:
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
        )
        opened, _ = await self._connections.call(self._address, request, timeout_s=OPEN_S)
        keep = KeepStream(stream=opened.stream, put=True)
        try:
            async with kept_alive(self._connections, self._address, keep):
                return await self._send(
                    reader, head, opened.stream, opened.credit, opened.chunk_size, progress
                )
        except BaseException:
            await self._abort(opened.stream)
            raise

    async def _send(
        self,
        reader: "_Reader",
        head: bytes,
        stream: int,
        credit: int,
        chunk_size: int,
        progress: Progress | None,
    ) -> Receipt:
        run_blocking = self._runtime.run_blocking
        pending: deque[tuple[int, Pending[PutProgress]]] = deque()
        chunk = head[:chunk_size] + await run_blocking(reader.read, max(0, chunk_size - len(head)))
        held = head[chunk_size:]
        sequence = 0
        receipt: Receipt | None = None
        while chunk or pending:
            if chunk and len(pending) < max(1, credit):
                following = held[:chunk_size]
                held = held[chunk_size:]
                following += await run_blocking(
                    reader.hash_and_read,
                    chunk,
                    chunk_size - len(following) if len(chunk) == chunk_size else 0,
                )
                last = not following
                request = PutChunk(
                    stream=stream, sequence=sequence, last=last, blake3=reader.digest() if last else None
                )
                begun = self._connections.begin(self._address, request, (chunk,), timeout_s=CHUNK_S)
                pending.append((len(chunk), begun))
                sequence += 1
                chunk = following
                continue
            length, oldest = pending.popleft()
            answer, _ = await oldest.answer()
            credit, receipt = answer.credit, answer.receipt
            if progress is not None:
                progress(length)
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
        self._hash = blake3()

    def read(self, length: int) -> bytes:
        """Return that many bytes; fewer only at the end."""
        data = self._source.read(length) if length else b""
        if len(data) == length or not data:
            return data
        parts = [data]
        missing = length - len(data)
        while missing:
            more = self._source.read(missing)
            if not more:
                break
            parts.append(more)
            missing -= len(more)
        return b"".join(parts)

    def hash_and_read(self, chunk: bytes, length: int) -> bytes:
        """Hash the chunk that is about to be sent and return the next `length` bytes."""
        self._hash.update(chunk)
        return self.read(length)

    def digest(self) -> bytes:
        """Return the BLAKE3 of all that was sent."""
        return self._hash.digest()


def _checked(receipt: Receipt, digest: bytes) -> Receipt:
    if receipt.blake3 != digest:
        raise IntegrityError(f"{receipt.name}: the receipt's BLAKE3 is not that of what was sent")
    return receipt
