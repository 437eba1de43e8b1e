"""What an engine offers besides, so that its log can be kept in several places.

A **replica** takes transactions from elsewhere under the revisions that they have there, or a whole copy. Who
calls it sees to it that nobody else writes meanwhile.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import msgpack

from droppexd.catalog.engine import MAX_KEY_BYTES, MAX_VALUE_BYTES, Engine, Entry, Operation
from droppexd.errors import RemoteProtocolError

MAX_ROW_BYTES = 96 * 1024 * 1024
"""Of one transaction as it is packed: what an engine takes at most, and some."""


class LogRow(NamedTuple):
    """One transaction of the log, as it is stored: `operations` is a msgpack list of [key, value or nil]."""

    revision: int
    time_ms: int
    operations: bytes


class Installation(Protocol):
    """A copy in the making. Nothing of it is seen before it is whole."""

    async def put(self, entries: Sequence[Entry]) -> None:
        """Take entries of the other engine, with their revisions."""
        ...

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Take rows of the other engine's log, in order, without a gap."""
        ...


class Replica(Engine, Protocol):
    """An engine whose log is kept in several places."""

    async def rows(self, after_revision: int, most_bytes: int) -> list[LogRow]:
        """Return rows of the log in order, about so many bytes of them, and one at least if there is one.

        Raise CatalogError when the log does not reach back that far any more.
        """
        ...

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Write down what follows the last revision, flushed. Raise CatalogError when it does not follow."""
        ...

    def install(self) -> AbstractAsyncContextManager[Installation]:
        """Replace everything, in one transaction, at the end of the block; nothing when the block fails."""
        ...


def pack_operations(then: Sequence[Operation]) -> bytes:
    """Return a transaction as it is stored in the log."""
    packed: bytes = msgpack.packb(then)
    return packed


def unpack_operations(row: LogRow) -> list[Operation]:
    """Return the operations of a row; raise RemoteProtocolError when they are none."""
    try:
        raw = msgpack.unpackb(row.operations)
        operations = [(key, value) for key, value in raw]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"revision {row.revision} of a log does not decode") from error
    for key, value in operations:
        if not (_is_short(key, MAX_KEY_BYTES) and (value is None or _is_short(value, MAX_VALUE_BYTES))):
            raise RemoteProtocolError(f"revision {row.revision} of a log has an operation that is none")
    return [Operation(key, value) for key, value in operations]


def _is_short(raw: object, most: int) -> bool:
    return isinstance(raw, bytes) and len(raw) <= most


def pack_rows(rows: Sequence[LogRow]) -> bytes:
    """Return rows as they are sent."""
    packed: bytes = msgpack.packb(rows)
    return packed


def unpack_rows(raw: bytes | bytearray | memoryview, after: int) -> list[LogRow]:
    """Return rows that were sent, which follow a revision without a gap; raise RemoteProtocolError."""
    try:
        rows = [(revision, time_ms, operations) for revision, time_ms, operations in msgpack.unpackb(raw)]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("a part of a log does not decode") from error
    for revision, time_ms, operations in rows:
        after += 1
        if revision != after or not isinstance(time_ms, int) or not isinstance(operations, bytes):
            raise RemoteProtocolError(f"a part of a log is not what follows: {revision!r}, not {after}")
    return [LogRow(*row) for row in rows]


def pack_entries(entries: Sequence[Entry]) -> bytes:
    """Return entries as they are sent."""
    packed: bytes = msgpack.packb(entries)
    return packed


def unpack_entries(raw: bytes | bytearray | memoryview) -> list[Entry]:
    """Return entries that were sent; raise RemoteProtocolError."""
    try:
        entries = [(key, value, revision) for key, value, revision in msgpack.unpackb(raw)]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("a part of a catalogue does not decode") from error
    for key, value, revision in entries:
        sound = _is_short(key, MAX_KEY_BYTES) and _is_short(value, MAX_VALUE_BYTES)
        if not sound or not isinstance(revision, int) or revision < 0:
            raise RemoteProtocolError("a part of a catalogue has an entry that is none")
    return [Entry(*entry) for entry in entries]
