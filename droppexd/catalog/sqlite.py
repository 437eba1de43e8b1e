"""The durable engine: one SQLite file, flushed before a transaction is acknowledged.

Table `kv` is the present; table `log` holds the operations of the last revisions, one row a transaction
(a msgpack list of [key, value or nil]), because a row each would cost more than what it says.

Three connections. The *writer* belongs to one task, which applies all transactions that wait in one
go: one thread hop and one flush for all of them. The *reader* serves point reads on the event loop's own
thread: some 6 us a key, where a thread hop costs 100 us and more; WAL readers never wait for the writer, and
see a transaction only after its flush. The *scanner* serves longer reads from a worker thread.
"""

import errno
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgpack
import trio

from droppexd.background import open_background
from droppexd.brief import BriefWork
from droppexd.catalog.engine import MOST_BYTES, Compare, Entry, LogEntry, Operation
from droppexd.catalog.replacement import finish_replacement
from droppexd.catalog.transactions import WaitingTxn, check_limit, check_txn, log_entries, log_trimmed
from droppexd.catalog.watching import Watch, Watchers
from droppexd.errors import CatalogError, IdentityError
from droppexd.folders import flush_folder, make_folder
from droppexd.runtime import Runtime

T = TypeVar("T")

KEEP_REVISIONS = 1_000_000
"""Transactions that the log reaches back; a standby that was away for longer copies everything."""

TRIM_EVERY = 1000
"""Revisions between two trims of the log: a trim dirties pages at the log's far end."""

INLINE_ENTRIES = 64
"""Entries that are read on the event loop's thread; more go to a worker thread."""

MAX_BATCH = 1024
"""Transactions in one flush."""

CATALOGUE_FILE = "catalogue.sqlite"
"""The name of the catalogue in a controller's folder."""

APPLICATION_ID = 0x64707863
SCHEMA_VERSION = 1

_CHECKPOINT_PAGES = 4000
_WAL_KEPT_BYTES = 64 * 1024 * 1024
_CACHE_KIB = 32 * 1024

_GET = "SELECT value, revision FROM kv WHERE key = ?"
_RANGE = "SELECT key, value, revision FROM kv WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
_PUT = "INSERT OR REPLACE INTO kv VALUES (?, ?, ?)"
_DELETE = "DELETE FROM kv WHERE key = ?"
_APPEND = "INSERT INTO log VALUES (?, ?, ?)"
_READ_LOG = "SELECT revision, time_ms, operations FROM log WHERE revision > ? ORDER BY revision"
_TABLES = (
    "CREATE TABLE kv (key BLOB PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE log (revision INTEGER PRIMARY KEY, time_ms INTEGER NOT NULL, operations BLOB NOT NULL)",
)


def _damaged(path: Path, error: sqlite3.Error) -> CatalogError:
    return CatalogError(
        f"the catalogue {path} cannot be read: {error}. Nothing was changed; to go back to a "
        f"backup: droppexd catalog restore BACKUP --force --data {path.parent}"
    )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the pragmas that durability rests on, and make or check the tables."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise CatalogError(f"the file system of {path} cannot hold a SQLite WAL; use a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    elif application != APPLICATION_ID:
        raise CatalogError(f"{path} is a database of another program, not a catalogue")
    elif version != SCHEMA_VERSION:
        raise CatalogError(
            f"the catalogue {path} has format {version} and this release reads {SCHEMA_VERSION}; "
            "run the release that wrote it"
        )


def take_lock(path: Path, *, make: bool = True) -> int:
    """Take the lock that a running engine holds, and return its descriptor.

    Without `make` nothing is written, and FileNotFoundError is raised when no engine has ever run here. Raise
    IdentityError when it is held.
    """
    lock_path = path.with_name(path.name + ".lock")
    how = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    descriptor = os.open(lock_path, how | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise IdentityError(f"the catalogue {path} is in use by another controller") from None
    return descriptor


class _File:
    """The three connections and what is done on them. Blocking; knows nothing of tasks."""

    def __init__(self, path: Path, keep_revisions: int) -> None:
        self.path = path
        self._keep_revisions = keep_revisions
        try:
            make_folder(path.parent)
            self._lock = take_lock(path)
        except OSError as error:
            raise CatalogError(f"the catalogue {path} cannot be opened: {error.strerror}") from error
        opened: list[sqlite3.Connection] = []
        try:
            finish_replacement(path)
            opened.append(_connect(path))
            _prepare(opened[0], path)
            flush_folder(path.parent)  # SQLite flushes the content of new files, not all of their names.
            opened += [_connect(path), _connect(path)]
            self._writer, self._reader, self._scanner = opened
            (newest,) = self._reader.execute("SELECT max(revision) FROM log").fetchone()
        except BaseException as error:
            for connection in opened:
                connection.close()
            os.close(self._lock)
            if isinstance(error, sqlite3.Error):
                raise _damaged(path, error) from error
            if isinstance(error, OSError):
                raise CatalogError(f"the catalogue {path} cannot be opened: {error}") from error
            raise
        self.revision: int = newest or 0

    def apply(self, batch: Sequence[WaitingTxn], time_ms: int) -> list[int | None]:
        """Apply transactions in order with one flush; return what each `txn` returns."""
        writer = self._writer
        revision = self.revision
        results: list[int | None] = []
        writer.execute("BEGIN IMMEDIATE")
        for txn in batch:
            if not self._holds(txn.compare):
                results.append(None)
                continue
            if txn.then:
                revision += 1
                puts = [(key, value, revision) for key, value in txn.then if value is not None]
                writer.executemany(_PUT, puts)
                if len(puts) < len(txn.then):
                    writer.executemany(_DELETE, [(key,) for key, value in txn.then if value is None])
                writer.execute(_APPEND, (revision, time_ms, msgpack.packb(txn.then)))
            results.append(revision)
        if revision // TRIM_EVERY > self.revision // TRIM_EVERY:
            writer.execute("DELETE FROM log WHERE revision <= ?", (revision - self._keep_revisions,))
        writer.execute("COMMIT")
        self.revision = revision
        return results

    def _holds(self, compare: Sequence[Compare]) -> bool:
        for key, revision in compare:
            row = self._writer.execute("SELECT revision FROM kv WHERE key = ?", (key,)).fetchone()
            if (row[0] if row else 0) != revision:
                return False
        return True

    def abandon(self) -> None:
        """Undo what a failed `apply` left open, as far as the disk lets us."""
        with suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")

    def get_one(self, key: bytes) -> Entry | None:
        row = self._reader.execute(_GET, (key,)).fetchone()
        return None if row is None else Entry(key, row[0], row[1])

    def get_few(self, keys: Sequence[bytes]) -> list[Entry | None]:
        return self._get(self._reader, keys)

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        return self._get(self._scanner, keys)

    @staticmethod
    def _get(connection: sqlite3.Connection, keys: Sequence[bytes]) -> list[Entry | None]:
        found: list[Entry | None] = []
        connection.execute("BEGIN")
        try:
            for key in keys:
                row = connection.execute(_GET, (key,)).fetchone()
                found.append(None if row is None else Entry(key, row[0], row[1]))
        finally:
            connection.execute("COMMIT")
        return found

    def range_few(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        return [Entry(*row) for row in self._reader.execute(_RANGE, (start, end, limit))]

    def range_many(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        return [Entry(*row) for row in self._scanner.execute(_RANGE, (start, end, limit))]

    def read_log(self, after_revision: int, limit: int) -> list[LogEntry]:
        (oldest,) = self._scanner.execute("SELECT min(revision) FROM log").fetchone()
        if oldest is not None and after_revision + 1 < oldest:
            raise log_trimmed(after_revision, oldest)
        entries: list[LogEntry] = []
        for revision, time_ms, packed in self._scanner.execute(_READ_LOG, (after_revision,)):
            entries += log_entries(revision, time_ms, msgpack.unpackb(packed))
            if len(entries) >= limit:
                break
        return entries

    def close(self) -> None:
        """Move the WAL into the file, close, unlock."""
        self._reader.close()
        self._scanner.close()
        self._writer.close()
        os.close(self._lock)


class SqliteEngine:
    """An Engine on one SQLite file; made by `open_sqlite_engine`.

    Reads of up to INLINE_ENTRIES entries do not yield to other tasks.
    """

    most_bytes = MOST_BYTES

    def __init__(self, file: _File, runtime: Runtime) -> None:
        self._file = file
        self._runtime = runtime
        self._commits = BriefWork(runtime)
        self._revision = file.revision
        self._waiting: deque[WaitingTxn] = deque()
        self._wake = trio.Event()
        self._scan_lock = trio.Lock()
        self._watchers = Watchers()
        self._failure = ""
        self._closing = False
        self._closed = trio.Event()

    @property
    def revision(self) -> int:
        """The revision of the last acknowledged transaction; 0 for a new engine."""
        return self._revision

    @property
    def failure(self) -> str:
        """Why the engine takes no more writes; empty while it does."""
        return self._failure

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, in the order asked, all as of one moment."""
        found = self.peek(keys)
        if found is not None:
            return found
        async with self._scan_lock:
            return await self._runtime.run_blocking(self._read, self._file.get_many, keys)

    def peek(self, keys: Sequence[bytes]) -> list[Entry | None] | None:
        """Return what `get` would, when that takes no waiting; None where it would have to wait."""
        if len(keys) == 1:
            return [self._read(self._file.get_one, keys[0])]
        if len(keys) <= INLINE_ENTRIES:
            return self._read(self._file.get_few, keys)
        return None

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        check_limit(limit)
        if limit <= INLINE_ENTRIES:
            return self._read(self._file.range_few, start, end, limit)
        async with self._scan_lock:
            return await self._runtime.run_blocking(self._read, self._file.range_many, start, end, limit)

    def _read(self, function: Callable[..., T], *args: object) -> T:
        if self._closed.is_set():
            raise CatalogError("the catalogue is closed")
        try:
            return function(*args)
        except sqlite3.Error as error:
            raise _damaged(self._file.path, error) from error

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds; return the revision, or None when it did not hold.

        A caller that is cancelled does not know the outcome: the transaction may still be applied.
        """
        check_txn(then)
        if self._failure:
            raise CatalogError(self._failure)
        if self._closing:
            raise CatalogError("the catalogue is closed")
        waiting = WaitingTxn(compare, then)
        self._waiting.append(waiting)
        self._wake.set()
        await waiting.done.wait()
        return waiting.result()

    def watch(self, start: bytes, end: bytes) -> Watch:
        """Yield the operations on keys in [start, end) that are committed from now on, in order."""
        return self._watchers.add(start, end)

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them.

        Raise CatalogError when the log does not reach back that far any more.
        """
        async with self._scan_lock:
            return await self._runtime.run_blocking(self._read, self._file.read_log, after_revision, limit)

    async def close(self) -> None:
        """Finish what is under way, flush and close. Idempotent."""
        self._closing = True
        self._wake.set()
        await self._closed.wait()

    async def write(self) -> None:
        """Apply waiting transactions until the engine is closed: the writer task."""
        try:
            while not (self._closing and not self._waiting):
                if not self._waiting:
                    self._wake = trio.Event()
                    await self._wake.wait()
                else:
                    await self._write_batch()
        finally:
            self._closing = True
            self._fail_waiting("the catalogue was closed before this change was written")
            with trio.CancelScope(shield=True):
                async with self._scan_lock:
                    await self._runtime.run_blocking(self._file.close)
            self._watchers.end()
            self._closed.set()

    async def _write_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        time_ms = self._runtime.clock.wall_ms()
        try:
            revisions = await self._commits.run(self._file.apply, batch, time_ms)
        except sqlite3.Error as error:
            # What reached the disk is unknown, and a second flush could claim success for pages that the
            # system has dropped: the engine is done for. (Rebello et al., "Can Applications Recover from
            # fsync Failures?", USENIX ATC 2020.)
            self._failure = (
                f"the catalogue {self._file.path} could not be written: {error}. It takes no more "
                "changes; mend the disk and start the controller again"
            )
            self._file.abandon()
            for txn in batch:
                txn.fail(self._failure)
            self._fail_waiting(self._failure)
            return
        self._revision = self._file.revision
        for txn, revision in zip(batch, revisions, strict=True):
            if revision is not None and self._watchers:
                self._watchers.deliver(log_entries(revision, time_ms, txn.then))
            txn.succeed(revision)

    def _fail_waiting(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popleft().fail(reason)


@asynccontextmanager
async def open_sqlite_engine(
    path: Path, runtime: Runtime, *, keep_revisions: int = KEEP_REVISIONS
) -> AsyncIterator[SqliteEngine]:
    """Open or make the catalogue file at `path`; on leaving, finish what waits and close it.

    Raise IdentityError when it is open already, and CatalogError when it cannot be opened or is damaged.
    """
    file = await runtime.run_blocking(_File, path, keep_revisions)
    engine = SqliteEngine(file, runtime)
    async with open_background() as nursery:
        nursery.start_soon(engine.write)
        try:
            yield engine
        finally:
            with trio.CancelScope(shield=True):
                await engine.close()
