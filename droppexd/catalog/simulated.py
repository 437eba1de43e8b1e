"""The engine of the simulation: in memory, with a disk that outlives a crash and a flush that takes time."""

from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby

import trio

from droppexd.catalog.engine import MOST_BYTES, Compare, Entry, LogEntry, Operation
from droppexd.catalog.replica import Installation, LogRow, pack_operations, unpack_operations
from droppexd.catalog.transactions import WaitingTxn, check_limit, check_txn, log_entries, log_trimmed
from droppexd.catalog.watching import Watch, Watchers
from droppexd.errors import CatalogError, CatalogFull
from droppexd.runtime import Runtime

KEEP_REVISIONS = 100_000


@dataclass(slots=True)
class SimulatedDisk:
    """What is durable. Hand it to the next engine after a crash."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)
    log: list[LogEntry] = field(default_factory=list)
    revision: int = 0

    def holds(self, compare: Sequence[Compare]) -> bool:
        """Return whether every key was written by the revision that is named for it."""
        return all(
            (entry.revision if (entry := self.entries.get(key)) else 0) == revision
            for key, revision in compare
        )

    def apply(self, time_ms: int, then: Sequence[Operation]) -> None:
        """Write one transaction under the next revision."""
        self.revision += 1
        for key, value in then:
            if value is None:
                if self.entries.pop(key, None):
                    del self.keys[bisect_left(self.keys, key)]
                continue
            if key not in self.entries:
                insort(self.keys, key)
            self.entries[key] = Entry(key, value, self.revision)
        self.log += log_entries(self.revision, time_ms, then)

    def become(self, other: "SimulatedDisk") -> None:
        """Hold what another holds."""
        self.entries, self.keys = dict(other.entries), list(other.keys)
        self.log, self.revision = list(other.log), other.revision


class _Copy:
    """A copy in the making."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()

    async def put(self, entries: Sequence[Entry]) -> None:
        """Take entries of the other engine, with their revisions."""
        await trio.lowlevel.checkpoint()
        for entry in entries:
            if entry.key not in self.disk.entries:
                insort(self.disk.keys, entry.key)
            self.disk.entries[entry.key] = entry

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Take rows of the other engine's log, in order, without a gap."""
        await trio.lowlevel.checkpoint()
        for row in rows:
            if self.disk.log and row.revision != self.disk.revision + 1:
                raise CatalogError(f"revision {row.revision} does not follow on {self.disk.revision}")
            self.disk.revision = row.revision - 1
            self.disk.apply(row.time_ms, unpack_operations(row))


def _revision_of(entry: LogEntry) -> int:
    return entry.revision


async def flush_at_once() -> None:
    """Flush in no time, but let others run: a disk never answers within the same step."""
    await trio.lowlevel.checkpoint()


class SimulatedEngine:
    """A Replica on a SimulatedDisk. Deterministic; `flush` says how long a flush takes."""

    most_bytes = MOST_BYTES

    def __init__(
        self,
        runtime: Runtime,
        disk: SimulatedDisk | None = None,
        *,
        flush: Callable[[], Awaitable[None]] = flush_at_once,
        keep_revisions: int = KEEP_REVISIONS,
    ) -> None:
        self.disk = disk or SimulatedDisk()
        self._runtime = runtime
        self._flush = flush
        self._keep_revisions = keep_revisions
        self._waiting: list[WaitingTxn] = []
        self._lock = trio.Lock()
        self._watchers = Watchers()
        self._failure = ""
        self._flush_failure = ""
        self._written_all_the_same = 0
        self.shortage = ""
        """Why nothing is to be added; for tests to set."""
        self.full = False
        """Whether the disk has no room for anything; for tests to set."""
        self.frees_when_full = False
        """Whether what only deletes is done all the same, as etcd does and SQLite cannot."""

    @property
    def revision(self) -> int:
        """The revision of the last acknowledged transaction; 0 for a new engine."""
        return self.disk.revision

    @property
    def failure(self) -> str:
        """Why the engine takes no more writes; empty while it does."""
        return self._failure

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, in the order asked, all as of one moment."""
        return self.peek(keys)

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return what `get` would; in memory that never takes waiting."""
        return [self.disk.entries.get(key) for key in keys]

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        check_limit(limit)
        keys = self.disk.keys
        first = bisect_left(keys, start)
        last = min(bisect_left(keys, end, first), first + limit)
        return [self.disk.entries[key] for key in keys[first:last]]

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds; return the revision, or None when it did not hold.

        A caller that is cancelled does not know the outcome: the transaction may still be applied.
        """
        check_txn(then)
        if self._failure:
            raise CatalogError(self._failure)
        if then and not (self.frees_when_full and all(value is None for _, value in then)):
            self._require_room()
        waiting = WaitingTxn(compare, then)
        self._waiting.append(waiting)
        # Whoever holds the lock writes for all who wait; it takes them only after the flush's time, so that
        # a writer that is cancelled leaves nothing half done.
        async with self._lock:
            if not waiting.done.is_set():
                await self._flush()
                if self._flush_failure:
                    self._lose_waiting(self._flush_failure, self._written_all_the_same)
                else:
                    self._write_waiting(len(self._waiting))
        return waiting.result()

    def _require_room(self) -> None:
        if self.full:
            raise CatalogFull("the simulated disk is full, and nothing was changed")

    def _write_waiting(self, count: int) -> None:
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        time_ms = self._runtime.clock.wall_ms()
        for txn in batch:
            if not self.disk.holds(txn.compare):
                txn.succeed(None)
                continue
            if txn.then:
                self.disk.apply(time_ms, txn.then)
                self._watchers.deliver(log_entries(self.revision, time_ms, txn.then))
            txn.succeed(self.revision)
        self._trim()

    def _trim(self) -> None:
        log = self.disk.log
        if log and log[0].revision <= self.revision - 2 * self._keep_revisions:
            oldest = self.revision - self._keep_revisions
            self.disk.log = [entry for entry in log if entry.revision > oldest]

    def watch(self, start: bytes, end: bytes) -> Watch:
        """Yield the operations on keys in [start, end) that are committed from now on, in order."""
        return self._watchers.add(start, end)

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them."""
        log = self.disk.log
        if log and after_revision + 1 < log[0].revision:
            raise log_trimmed(after_revision, log[0].revision)
        first = bisect_left(log, after_revision + 1, key=lambda entry: entry.revision)
        last = first + limit
        if last < len(log):
            last = bisect_left(log, log[last - 1].revision + 1, key=lambda entry: entry.revision)
        return log[first:last]

    # -- as a replica --------------------------------------------------------------------------

    async def rows(self, after_revision: int, most_bytes: int) -> list[LogRow]:
        """Return rows of the log in order, about so many bytes of them, and one at least if there is one.

        Raise CatalogError when the log does not reach back that far any more.
        """
        rows: list[LogRow] = []
        size = 0
        for revision, entries in groupby(await self.log(after_revision, most_bytes), _revision_of):
            some = list(entries)
            packed = pack_operations([Operation(entry.key, entry.value) for entry in some])
            size += len(packed)
            if rows and size > most_bytes:
                break
            rows.append(LogRow(revision, some[0].time_ms, packed))
        return rows

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Write down what follows the last revision, flushed. Raise CatalogError when it does not follow."""
        operations = [unpack_operations(row) for row in rows]
        async with self._writing():
            if rows and rows[0].revision != self.revision + 1:
                raise CatalogError(f"revision {rows[0].revision} of a log does not follow on {self.revision}")
            for row, then in zip(rows, operations, strict=True):
                self.disk.apply(row.time_ms, then)
            self._trim()

    @asynccontextmanager
    async def install(self) -> AsyncIterator[Installation]:
        """Replace everything, in one transaction, at the end of the block; nothing when the block fails."""
        copy = _Copy()
        yield copy
        if not copy.disk.log:
            raise CatalogError("a copy of a catalogue without its last transaction")
        async with self._writing():
            self.disk.become(copy.disk)

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        if self._failure:
            raise CatalogError(self._failure)
        async with self._lock:
            await self._flush()
            if self._flush_failure:
                self._lose_waiting(self._flush_failure, 0)
            if self._failure:
                raise CatalogError(self._failure)
            self._require_room()
            yield

    def fail_flush(self, reason: str = "Input/output error", *, written: int = 0) -> None:
        """Make the next flush fail: the engine takes no more writes, and nobody knows what was written.

        The first `written` of the transactions that wait then are on the disk all the same.
        """
        self._flush_failure = f"flushing failed ({reason})"
        self._written_all_the_same = written

    def crash(self, *, written: int = 0) -> SimulatedDisk:
        """Lose everything that is not flushed, end every waiting transaction, and return the disk.

        The first `written` of the waiting transactions reach the disk all the same, as can happen to a
        real one; their callers learn nothing of it.
        """
        self._lose_waiting("the catalogue crashed", written)
        disk, self.disk = self.disk, SimulatedDisk()
        return disk

    def _lose_waiting(self, reason: str, written: int) -> None:
        """Fail, and with it all that waits, though the first `written` of it reach the disk."""
        lost = self._waiting
        self._waiting = []
        self._fail(reason)
        for txn in lost[:written]:
            if self.disk.holds(txn.compare) and txn.then:
                self.disk.apply(self._runtime.clock.wall_ms(), txn.then)
        for txn in lost:
            txn.fail(CatalogError(self._failure))

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._watchers.end()

    async def close(self) -> None:
        """Finish what is under way, flush and close. Idempotent."""
        async with self._lock:
            if not self._failure:
                self._write_waiting(len(self._waiting))
                self._fail("the catalogue is closed")
