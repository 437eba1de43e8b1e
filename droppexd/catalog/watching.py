"""Watchers of an engine: each gets the operations on its keys in order, through a bounded buffer."""

import weakref
from collections.abc import Iterable
from typing import Self

import trio

from droppexd.catalog.engine import LogEntry
from droppexd.errors import CatalogError

WATCH_BUFFER = 10_000
"""Operations that a slow watcher may lag behind before it is cut off."""


class Watch:
    """An asynchronous iterator over the operations on keys in [start, end).

    It ends when the engine closes, and raises CatalogError when its reader fell WATCH_BUFFER operations
    behind: read the log from the last revision seen, then watch again.
    """

    def __init__(self, start: bytes, end: bytes, buffer: int = WATCH_BUFFER) -> None:
        self._start = start
        self._end = end
        self._sender, self._receiver = trio.open_memory_channel[LogEntry](buffer)
        self._overrun = False

    def deliver(self, entries: Iterable[LogEntry]) -> None:
        """Buffer those of the entries that are watched. Never blocks."""
        try:
            for entry in entries:
                if self._start <= entry.key < self._end:
                    self._sender.send_nowait(entry)
        except trio.WouldBlock:
            self._overrun = True
            self._sender.close()
        except trio.ClosedResourceError:
            return

    def end(self) -> None:
        """Let the iteration end after what is buffered."""
        self._sender.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LogEntry:
        try:
            return await self._receiver.receive()
        except trio.EndOfChannel:
            if self._overrun:
                raise CatalogError(
                    "this watcher of the catalogue fell too far behind; read the log, then watch again"
                ) from None
            raise StopAsyncIteration from None


class Watchers:
    """All watches of one engine. A watch that nobody holds any more goes by itself."""

    def __init__(self) -> None:
        # Keyed by a counter and not a set: the order of delivery must not depend on addresses in memory.
        self._watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
        self._next = 0

    def __bool__(self) -> bool:
        return bool(self._watches)

    def add(self, start: bytes, end: bytes) -> Watch:
        """Return a new watch of what is delivered from now on."""
        watch = Watch(start, end)
        self._watches[self._next] = watch
        self._next += 1
        return watch

    def deliver(self, entries: list[LogEntry]) -> None:
        """Hand the operations of committed transactions to every watch."""
        for watch in list(self._watches.values()):
            watch.deliver(entries)

    def end(self) -> None:
        """End every watch."""
        for watch in list(self._watches.values()):
            watch.end()
