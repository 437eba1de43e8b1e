"""The engine of the simulation: in memory, with a disk that outlives a crash and a flush that takes time."""

from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from droppexd.catalog.engine import MOST_BYTES, Compare, Entry, LogEntry, Operation
from droppexd.catalog.transactions import WaitingTxn, check_limit, check_txn, log_entries, log_trimmed
from droppexd.catalog.watching import Watch, Watchers
from droppexd.errors import CatalogError
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


async def flush_at_once() -> None:
    """Flush in no time, but let others run: a disk never answers within the same step."""
    await trio.lowlevel.checkpoint()


class SimulatedEngine:
    """An Engine on a SimulatedDisk. Deterministic; `flush` says how long a flush takes."""

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
            txn.fail(self._failure)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._watchers.end()

    async def close(self) -> None:
        """Finish what is under way, flush and close. Idempotent."""
        async with self._lock:
            if not self._failure:
                self._write_waiting(len(self._waiting))
                self._fail("the catalogue is closed")
