"""The ordered key-value interface that the catalogue is built on, as every engine offers it.

Keys and values are bytes; keys sort as bytes do. Each transaction that writes gets the next **revision**
and stands in the operation log as its PUTs and DELETEs in order. A reader sees whole transactions only,
and sees every transaction that was acknowledged before the read began.

Engines: SQLite (`sqlite.py`, durable) and the simulated one (`simulated.py`); one conformance suite.
"""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

MAX_KEY_BYTES = 2048
MAX_VALUE_BYTES = 1024 * 1024
MAX_RANGE = 10_000
MOST_BYTES = 64 * 1024 * 1024
"""Of keys and values in one transaction, where an engine says nothing else."""


class Entry(NamedTuple):
    """A key, its value, and the revision of the transaction that wrote it."""

    key: bytes
    value: bytes
    revision: int


class Compare(NamedTuple):
    """A condition of a transaction: the key was written by that revision; 0: the key is absent."""

    key: bytes
    revision: int


class Operation(NamedTuple):
    """Write a value under a key, or with None delete the key."""

    key: bytes
    value: bytes | None


class LogEntry(NamedTuple):
    """One operation of the log. `time_ms` is for people."""

    revision: int
    time_ms: int
    key: bytes
    value: bytes | None


class Engine(Protocol):
    """An ordered key-value store with transactions and a log."""

    @property
    def most_bytes(self) -> int:
        """How many bytes of keys and values a transaction may have."""
        ...

    @property
    def revision(self) -> int:
        """The revision of the last acknowledged transaction; 0 for a new engine."""
        ...

    @property
    def shortage(self) -> str:
        """Why nothing is to be added, for the disk has no room but what is kept for deletes; else empty."""
        ...

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, in the order asked, all as of one moment."""
        ...

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None] | None:
        """Return what `get` would, when that takes no waiting; None where it would have to wait."""
        ...

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        ...

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds; return the revision, or None when it did not hold.

        When it returns a revision, the transaction survives power loss. Raise CatalogFull when the disk has
        no room: nothing was changed, and the engine goes on. Raise any other CatalogError when the engine
        failed: the outcome is then unknown, and the engine takes no more writes.
        Transactions that wait at the same time may share one flush. Keys of `then` are distinct.
        """
        ...

    def watch(self, start: bytes, end: bytes) -> AsyncIterator[LogEntry]:
        """Yield the operations on keys in [start, end) that are committed from now on, in order."""
        ...

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them."""
        ...

    async def close(self) -> None:
        """Finish what is under way, flush and close. Idempotent."""
        ...
