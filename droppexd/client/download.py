"""Reading: parts asked for ahead, handed on in order, verified at the end.

When the app goes away, the read is opened again for the rest of the same version, and goes on.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import BinaryIO

from blake3 import blake3

from droppexd.client.patience import Trying
from droppexd.client.together import chunks_together
from droppexd.errors import (
    DroppexError,
    IntegrityError,
    NotFound,
    RemoteProtocolError,
    StaleRead,
    StreamGone,
)
from droppexd.runtime import Runtime
from droppexd.wire.messages import GetData, GetOpen, GetOpened, GetPart
from droppexd.wire.rpc import Connections, Pending
from droppexd.wire.transport import Frame

PART_S = 120.0
"""The longest that the app may take over one part."""

_INLINE_SIZE = 64 * 1024
"""Hashing this much costs less than handing it to a thread."""

Progress = Callable[[int], None]
"""Told how many more bytes are through."""

Open = Callable[[GetOpen], Awaitable[tuple[GetOpened, Sequence[Frame]]]]
"""Opens a read at the app, once."""


class Download:
    """One open read. `info` says what is read; the content comes by iteration, once."""

    def __init__(
        self,
        connections: Connections,
        runtime: Runtime,
        address: str,
        name: str,
        info: GetOpened,
        first: Sequence[Frame],
        reopen: Open,
        trying: Trying,
    ) -> None:
        self.name = name
        self.info = info
        self.opened = info
        """What the app said when the read was opened last, for the rest that was left then."""
        self.rebuilt_parts = int(info.rebuilt)
        """Chunks so far of which a piece had to be rebuilt."""
        self._connections = connections
        self._runtime = runtime
        self._address = address
        self._first = first
        self._reopen = reopen
        self._trying = trying
        self._through = 0
        self._hash = blake3() if (info.start, info.end) == (0, info.size) else None
        self._content: AsyncGenerator[Sequence[Frame], None] | None = None

    @property
    def length(self) -> int:
        """How many bytes are read in all."""
        return self.info.end - self.info.start

    def __aiter__(self) -> AsyncIterator[Sequence[Frame]]:
        """Yield the content as groups of buffers, in order.

        A whole read is verified against the version's BLAKE3: IntegrityError at its end if it differs.
        """
        self._content = self._verified_parts()
        return self._content

    async def aclose(self) -> None:
        """End an iteration that was left early. Idempotent."""
        if self._content is not None:
            await self._content.aclose()

    async def _verified_parts(self) -> AsyncGenerator[Sequence[Frame], None]:
        async with aclosing(self._parts()) as parts:
            async for frames in parts:
                if self._hash is not None:
                    if sum(map(len, frames)) <= _INLINE_SIZE:
                        self._update(frames)
                    else:
                        await self._runtime.run_blocking(self._update, frames)
                yield frames
        self._verify()

    async def write_to(self, target: BinaryIO, progress: Progress | None = None) -> None:
        """Write the content to a file object, in a worker thread; verify it as iteration does."""
        async with aclosing(self._parts()) as parts:
            async for frames in parts:
                await self._runtime.run_blocking(self._write, frames, target)
                if progress is not None:
                    progress(sum(map(len, frames)))
        self._verify()

    def _write(self, frames: Sequence[Frame], target: BinaryIO) -> None:
        self._update(frames)
        for frame in frames:
            view = memoryview(frame)
            while view:
                written = target.write(view)
                view = view[written:]

    def _update(self, frames: Sequence[Frame]) -> None:
        if self._hash is not None:
            for frame in frames:
                self._hash.update(frame)

    def _verify(self) -> None:
        if self._hash is not None and self._hash.digest() != self.info.blake3:
            raise IntegrityError(f"{self.name}: what arrived does not match its BLAKE3; nothing was kept")

    async def _parts(self) -> AsyncGenerator[Sequence[Frame], None]:
        """Yield the parts in order, over one opening of the read or several."""
        while True:
            try:
                async with aclosing(self._opened_parts()) as parts:
                    async for frames in parts:
                        self._through += sum(map(len, frames))
                        yield frames
                        self._trying.went_on()  # Whoever reads may have taken any time.
            except DroppexError as error:
                await self._open_again(error)
            else:
                break
        if self._through != self.length:
            raise RemoteProtocolError(f"{self.name}: the app sent another number of bytes than it said")

    async def _open_again(self, error: DroppexError) -> None:
        """Open the read for what is left. Raise `error` when that is no use, or does not come about in time.

        An app that was started anew does not know the read: the stream is gone.
        """
        forgotten = isinstance(error, StreamGone)
        await self._trying.pause(error, anyway=forgotten)
        request = GetOpen(
            name=self.name,
            start=self.info.start + self._through,
            length=self.length - self._through,
            version=self.info.version,
        )
        try:
            self.opened, self._first = await self._trying.until_done(lambda: self._reopen(request))
        except NotFound:
            raise StaleRead(f"{self.name} was removed or replaced while it was read") from error
        if not self.opened.stream:
            self.rebuilt_parts += self.opened.rebuilt

    async def _opened_parts(self) -> AsyncGenerator[Sequence[Frame], None]:
        """Yield the parts of what is opened, with as many asked for ahead as the app gives credit."""
        opened = self.opened
        if not opened.stream:
            if self._through < self.length:
                yield self._first
            return
        credit = opened.credit
        asked = unanswered = 0
        pending: deque[tuple[int, Pending[GetData]]] = deque()
        try:
            while asked < opened.parts or pending:
                while asked < opened.parts:
                    count = min(chunks_together(asked, opened.together, credit), opened.parts - asked)
                    if unanswered + count > max(1, credit):
                        break
                    request = GetPart(stream=opened.stream, part=asked, count=count)
                    begun = self._connections.begin(self._address, request, timeout_s=PART_S)
                    pending.append((count, begun))
                    asked += count
                    unanswered += count
                count, oldest = pending.popleft()
                data, frames = await oldest.answer()
                unanswered -= count
                credit = data.credit
                self.rebuilt_parts += data.rebuilt
                yield frames
        finally:
            for _, unread in pending:
                unread.abandon()
