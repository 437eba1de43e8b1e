"""The durable engine: one SQLite file, flushed before a transaction is acknowledged.

Table `kv` is the present; table `log` holds the operations of the last revisions, one row a transaction
(a msgpack list of [key, value or nil]), because a row each would cost more than what it says.

Three connections. The *writer* belongs to one task, which applies all transactions that wait in one
go, or takes over what another engine has written: one thread hop and one flush for all of them. The *reader*
serves point reads on the event loop's own thread: some 6 us a key, where a thread hop costs 100 us and more;
WAL readers never wait for the writer, and see a transaction only after its flush. The *scanner* serves longer
reads from a worker thread.
"""

import errno
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgpack
import trio

from droppexd.background import open_background
from droppexd.brief import BriefWork
from droppexd.catalog.engine import MOST_BYTES, Compare, Entry, LogEntry, Operation
from droppexd.catalog.replacement import finish_replacement
from droppexd.catalog.replica import Installation, LogRow, pack_operations, unpack_operations
from droppexd.catalog.room import Ballast, Room, is_full
from droppexd.catalog.transactions import WaitingTxn, check_limit, check_txn, log_entries, log_trimmed
from droppexd.catalog.watching import Watch, Watchers
from droppexd.errors import CatalogError, CatalogFull, IdentityError
from droppexd.folders import flush_folder, make_folder
from droppexd.runtime import Runtime

T = TypeVar("T")

KEEP_REVISIONS = 1_000_000
"""Transactions that the log reaches back; a standby that was away for longer copies everything."""

KEEP_BYTES = 1024**3
"""About how large the log may get; it then reaches back less far."""

TRIM_EVERY = 1000
"""Revisions between two trims of the log: a trim dirties pages at the log's far end."""

_MOST_TRIMMED = 8 * TRIM_EVERY
"""Rows that one trim deletes at most: commits wait for it."""

RECENT_BYTES = 4 * 1024 * 1024
"""Of the log's end, that are kept in memory."""

_SAMPLED_ROWS = 64
"""Rows of the log that tell how large the rest is."""

INLINE_ENTRIES = 64
"""Entries that are read on the event loop's thread; more go to a worker thread."""

MAX_BATCH = 1024
"""Transactions in one flush."""

CATALOGUE_FILE = "catalogue.sqlite"
"""The name of the catalogue in a controller's folder."""

APPLICATION_ID = 0x64707863
SCHEMA_VERSION = 1

_CHECKPOINT_PAGES = 4000
_SHORT_CHECKPOINT_PAGES = 64
"""While room is short: what the WAL has already is written over again before it grows."""
_LEAST_ROOM_BYTES = 256 * 1024
"""With less on the disk it is no damage when a file cannot be opened: SQLite makes one of 32 KiB first."""
_LOOK_S = 1.0
"""Between two looks for room, while it is short."""
_WAL_KEPT_BYTES = 64 * 1024 * 1024
CACHE_KIB = 32 * 1024
"""Of each connection, at most."""

_GET = "SELECT value, revision FROM kv WHERE key = ?"
_RANGE = "SELECT key, value, revision FROM kv WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
_PUT = "INSERT OR REPLACE INTO kv VALUES (?, ?, ?)"
_DELETE = "DELETE FROM kv WHERE key = ?"
_APPEND = "INSERT INTO log VALUES (?, ?, ?)"
_SIZE_OF = "SELECT length(operations) FROM log WHERE revision >= ? ORDER BY revision LIMIT 1"
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


def _cannot_open(path: Path, error: sqlite3.Error | OSError) -> CatalogError:
    disk = os.statvfs(path.parent)
    if disk.f_bavail * disk.f_frsize < _LEAST_ROOM_BYTES:
        return CatalogFull(
            f"the catalogue {path} is on a disk without any room: make a little, then start the controller"
        )
    if isinstance(error, sqlite3.Error):
        return _damaged(path, error)
    return CatalogError(f"the catalogue {path} cannot be opened: {error}")


def _full(path: Path) -> CatalogFull:
    return CatalogFull(f"the disk of the catalogue {path} is full, and nothing was changed")


def _connect(path: Path, cache_kib: int) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.execute(f"PRAGMA cache_size = -{cache_kib}")
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


class RecentRows:
    """The last rows of the log, for followers that keep up: they need not be read from the file.

    For one thread: the file is written to from others.
    """

    def __init__(self) -> None:
        self._rows: deque[LogRow] = deque()
        self._bytes = 0

    def add(self, rows: Sequence[LogRow]) -> None:
        """Take rows that are flushed, which follow the last ones."""
        self._rows.extend(rows)
        self._bytes += sum(len(row.operations) for row in rows)
        while self._bytes > RECENT_BYTES:
            self._bytes -= len(self._rows.popleft().operations)

    def trim(self, last: int) -> None:
        """Forget the rows up to this revision, as the file has."""
        while self._rows and self._rows[0].revision <= last:
            self._bytes -= len(self._rows.popleft().operations)

    def after(self, revision: int, most_bytes: int) -> list[LogRow] | None:
        """Return rows behind a revision, about so many bytes of them; None when they are not all here."""
        if not self._rows or revision + 1 < self._rows[0].revision:
            return None
        found: list[LogRow] = []
        size = 0
        for index in range(revision + 1 - self._rows[0].revision, len(self._rows)):
            row = self._rows[index]  # Near the end, where a deque is quick.
            size += len(row.operations)
            if found and size > most_bytes:
                break
            found.append(row)
        return found


class _File:
    """The three connections and what is done on them. Blocking; knows nothing of tasks."""

    def __init__(
        self, path: Path, keep_revisions: int, keep_bytes: int, cache_kib: int, ballast: Ballast | None
    ) -> None:
        self.path = path
        self.room = Room(path, ballast)
        self._keep_revisions = keep_revisions
        self._keep_bytes = keep_bytes
        try:
            make_folder(path.parent)
            self._lock = take_lock(path)
        except OSError as error:
            raise CatalogError(f"the catalogue {path} cannot be opened: {error.strerror}") from error
        opened: list[sqlite3.Connection] = []
        try:
            self.room.before_opening()
            finish_replacement(path)
            opened.append(_connect(path, cache_kib))
            _prepare(opened[0], path)
            flush_folder(path.parent)  # SQLite flushes the content of new files, not all of their names.
            opened += [_connect(path, cache_kib), _connect(path, cache_kib)]
            self._writer, self._reader, self._scanner = opened
            (newest,) = self._reader.execute("SELECT max(revision) FROM log").fetchone()
        except BaseException as error:
            for connection in opened:
                connection.close()
            os.close(self._lock)
            if isinstance(error, sqlite3.Error | OSError):
                raise _cannot_open(path, error) from error
            raise
        self.regain()
        self.revision: int = newest or 0
        self.written: Sequence[LogRow] = ()
        """The rows of the last `apply` or `append`."""
        self.replaced = False
        """Whether a whole copy has taken the place of everything."""
        self.trimmed = 0
        """The last revision that the log was rid of."""
        self._installed = -1
        """The last revision of a copy in the making."""

    def apply(self, batch: Sequence[WaitingTxn], time_ms: int) -> list[int | None]:
        """Apply transactions in order with one flush; return what each `txn` returns. Raise CatalogFull."""
        return self._within_room(lambda: self._apply(batch, time_ms))

    def _apply(self, batch: Sequence[WaitingTxn], time_ms: int) -> list[int | None]:
        writer = self._writer
        revision = self.revision
        results: list[int | None] = []
        rows: list[LogRow] = []
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
                row = LogRow(revision, time_ms, pack_operations(txn.then))
                writer.execute(_APPEND, row)
                rows.append(row)
            results.append(revision)
        self._commit(revision)
        self.written = rows
        return results

    def append(self, rows: Sequence[LogRow], operations: Sequence[Sequence[Operation]]) -> None:
        """Write down rows of a log that follow the last revision, with one flush. Raise CatalogFull."""
        if rows and rows[0].revision != self.revision + 1:
            raise CatalogError(
                f"revision {rows[0].revision} of a log does not follow on {self.revision}, the last here"
            )
        self._within_room(lambda: self._append(rows, operations))

    def _append(self, rows: Sequence[LogRow], operations: Sequence[Sequence[Operation]]) -> None:
        self._writer.execute("BEGIN IMMEDIATE")
        self._write_rows(rows, operations)
        self._commit(rows[-1].revision if rows else self.revision)
        self.written = rows

    def _write_rows(self, rows: Sequence[LogRow], operations: Sequence[Sequence[Operation]]) -> None:
        writer = self._writer
        for row, then in zip(rows, operations, strict=True):
            puts = [(key, value, row.revision) for key, value in then if value is not None]
            writer.executemany(_PUT, puts)
            if len(puts) < len(then):
                writer.executemany(_DELETE, [(key,) for key, value in then if value is None])
            writer.execute(_APPEND, row)

    def _commit(self, revision: int) -> None:
        if revision // TRIM_EVERY > self.revision // TRIM_EVERY:
            self._trim(revision)
        self._writer.execute("COMMIT")
        self.revision = revision

    # -- room ----------------------------------------------------------------------------------

    def _within_room(self, write: Callable[[], T]) -> T:
        """Write a transaction; where the disk has no room, with that of the ballast.

        Raise CatalogFull when that does not do either: nothing was changed.
        """
        emptied = False
        while True:
            try:
                return write()
            except sqlite3.Error as error:
                self._undo_full(error)
                failure = error
            if not self.room.make() and emptied:
                raise _full(self.path) from failure
            if self.room.shortage:
                self._writer.execute(f"PRAGMA wal_autocheckpoint = {_SHORT_CHECKPOINT_PAGES}")
            self._empty_log()
            emptied = True

    def _undo_full(self, error: sqlite3.Error) -> None:
        """Roll back what found no room; raise the error when it is another, or that cannot be done."""
        self.abandon()
        if not is_full(error) or self._writer.in_transaction:
            raise error

    def _empty_log(self) -> None:
        """Move the WAL into the file, so that its room is written over: it keeps what it has."""
        try:
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            if not is_full(error):
                raise

    def regain(self) -> None:
        """Look whether the disk has room again."""
        self.room.regain()
        if not self.room.shortage:
            self._writer.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")

    def _trim(self, newest: int) -> None:
        """Delete the far end of the log: what is older than is kept, or too much by a sample of its sizes."""
        (oldest,) = self._writer.execute("SELECT min(revision) FROM log").fetchone()
        rows = newest - oldest + 1
        step = max(1, rows // _SAMPLED_ROWS)
        sizes = [
            size
            for at in range(oldest, newest + 1, step)
            for (size,) in self._writer.execute(_SIZE_OF, (at,))
        ]
        keep = min(self._keep_revisions, int(self._keep_bytes * len(sizes) / max(1, sum(sizes))))
        last = min(newest - max(1, keep), oldest + _MOST_TRIMMED)
        self._writer.execute("DELETE FROM log WHERE revision <= ?", (last,))
        self.trimmed = last

    # -- a whole copy --------------------------------------------------------------------------

    def begin_install(self) -> None:
        """Begin to replace everything. Until `end_install` the file is as it was for everybody else."""
        self._writer.execute("BEGIN IMMEDIATE")
        self._writer.execute("DELETE FROM kv")
        self._writer.execute("DELETE FROM log")
        self._installed = -1

    def install_entries(self, entries: Sequence[Entry]) -> None:
        self._writer.executemany(_PUT, entries)

    def install_rows(self, rows: Sequence[LogRow], operations: Sequence[Sequence[Operation]]) -> None:
        if self._installed >= 0 and rows and rows[0].revision != self._installed + 1:
            raise CatalogError(f"revision {rows[0].revision} of a log does not follow on {self._installed}")
        self._write_rows(rows, operations)
        if rows:
            self._installed = rows[-1].revision

    def end_install(self) -> None:
        if self._installed < 0:
            raise CatalogError("a copy of a catalogue without its last transaction")
        self._writer.execute("COMMIT")
        self.revision = self._installed
        self.replaced, self.trimmed = True, 0

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

    def read_rows(self, after_revision: int, most_bytes: int) -> list[LogRow]:
        (oldest,) = self._scanner.execute("SELECT min(revision) FROM log").fetchone()
        if oldest is not None and after_revision + 1 < oldest:
            raise log_trimmed(after_revision, oldest)
        rows: list[LogRow] = []
        size = 0
        for row in self._scanner.execute(_READ_LOG, (after_revision,)):
            size += len(row[2])
            if rows and size > most_bytes:
                break
            rows.append(LogRow(*row))
        return rows

    def close(self) -> None:
        """Move the WAL into the file, close, unlock."""
        self._reader.close()
        self._scanner.close()
        self._writer.close()
        os.close(self._lock)


class _WaitingJob:
    """Something else for the writer's connection, on its way there."""

    __slots__ = ("done", "error", "function")

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.done = trio.Event()
        self.error: CatalogError | None = None

    def fail(self, error: CatalogError) -> None:
        self.error = error
        self.done.set()


class SqliteEngine:
    """A Replica on one SQLite file; made by `open_sqlite_engine`.

    Reads of up to INLINE_ENTRIES entries do not yield to other tasks.
    """

    most_bytes = MOST_BYTES

    def __init__(self, file: _File, runtime: Runtime) -> None:
        self._file = file
        self._runtime = runtime
        self._commits = BriefWork(runtime)
        self._revision = file.revision
        self._recent = RecentRows()
        self._waiting: deque[WaitingTxn | _WaitingJob] = deque()
        self._wake = trio.Event()
        self._scan_lock = trio.Lock()
        self._watchers = Watchers()
        self._failure = ""
        self._closing = False
        self._closed = trio.Event()
        self._readable = True

    @property
    def revision(self) -> int:
        """The revision of the last acknowledged transaction; 0 for a new engine."""
        return self._revision

    @property
    def failure(self) -> str:
        """Why the engine takes no more writes; empty while it does."""
        return self._failure

    @property
    def shortage(self) -> str:
        """Why nothing is to be added, for the disk has no room but what is kept for deletes; else empty."""
        return self._file.room.shortage

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
        if not self._readable:
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

    # -- as a replica --------------------------------------------------------------------------

    async def rows(self, after_revision: int, most_bytes: int) -> list[LogRow]:
        """Return rows of the log in order, about so many bytes of them, and one at least if there is one.

        Raise CatalogError when the log does not reach back that far any more.
        """
        recent = self._recent.after(after_revision, most_bytes)
        if recent is not None:
            return recent
        async with self._scan_lock:
            return await self._runtime.run_blocking(
                self._read, self._file.read_rows, after_revision, most_bytes
            )

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Write down what follows the last revision, flushed. Raise CatalogError when it does not follow."""
        operations = [unpack_operations(row) for row in rows]
        await self._job(lambda: self._file.append(rows, operations))

    @asynccontextmanager
    async def install(self) -> AsyncIterator[Installation]:
        """Replace everything, in one transaction, at the end of the block; nothing when the block fails."""
        await self._job(self._file.begin_install)
        try:
            yield _Installation(self._job, self._file)
            await self._job(self._file.end_install)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(CatalogError):
                await self._job(self._file.abandon)
            raise

    def _remember(self) -> None:
        """Keep the rows that the writer has just flushed; it writes nothing before this returns."""
        if self._file.replaced:
            self._recent, self._file.replaced = RecentRows(), False
        self._recent.add(self._file.written)
        self._file.written = ()
        self._recent.trim(self._file.trimmed)

    async def _job(self, function: Callable[[], None]) -> None:
        """Have the writer do something else, in its turn, and once it has begun to the end."""
        if self._failure or self._closing:
            raise CatalogError(self._failure or "the catalogue is closed")
        job = _WaitingJob(function)
        self._waiting.append(job)
        self._wake.set()
        with trio.CancelScope(shield=True):
            await job.done.wait()
        if job.error is not None:
            raise job.error

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
                elif isinstance(self._waiting[0], _WaitingJob):
                    await self._do(self._waiting[0])
                else:
                    await self._write_batch()
        finally:
            self._closing = True
            self._fail_waiting("the catalogue was closed before this change was written")
            with trio.CancelScope(shield=True):
                async with self._scan_lock:
                    self._readable = False  # Here reads would use what another thread closes: SQLite crashes.
                    await self._runtime.run_blocking(self._file.close)
            self._watchers.end()
            self._closed.set()

    async def _do(self, job: _WaitingJob) -> None:
        self._waiting.popleft()
        job.error = CatalogError("the catalogue was closed before this change was written")
        try:
            await self._commits.run(job.function)
        except CatalogError as error:
            self._file.abandon()
            job.error = error
        except sqlite3.Error as error:
            if is_full(error):
                self._file.abandon()
                job.error = _full(self._file.path)
            else:
                self._give_up(error)
                job.error = CatalogError(self._failure)
        else:
            job.error = None
            self._remember()
        finally:
            self._revision = self._file.revision
            job.done.set()

    async def _write_batch(self) -> None:
        batch: list[WaitingTxn] = []
        while self._waiting and len(batch) < MAX_BATCH and isinstance(self._waiting[0], WaitingTxn):
            batch.append(self._waiting[0])
            self._waiting.popleft()
        time_ms = self._runtime.clock.wall_ms()
        try:
            revisions = await self._commits.run(self._file.apply, batch, time_ms)
        except CatalogFull as error:
            for txn in batch:
                txn.fail(error)
            return
        except sqlite3.Error as error:
            self._give_up(error)
            for txn in batch:
                txn.fail(CatalogError(self._failure))
            return
        self._revision = self._file.revision
        self._remember()
        for txn, revision in zip(batch, revisions, strict=True):
            if revision is not None and self._watchers:
                self._watchers.deliver(log_entries(revision, time_ms, txn.then))
            txn.succeed(revision)

    async def look_for_room(self) -> None:
        """While room is short, look whether there is some again, for ever."""
        while True:
            await trio.sleep(_LOOK_S)
            if self.shortage:
                with suppress(CatalogError):  # Then nothing is written any more.
                    await self._job(self._file.regain)

    def _give_up(self, error: sqlite3.Error) -> None:
        """Take no more changes.

        What reached the disk is unknown, and a second flush could claim success for pages that the system has
        dropped. (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020.)
        """
        self._failure = (
            f"the catalogue {self._file.path} could not be written: {error}. It takes no more "
            "changes; mend the disk and start the controller again"
        )
        self._file.abandon()
        self._fail_waiting(self._failure)

    def _fail_waiting(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popleft().fail(CatalogError(reason))


class _Installation:
    """A copy in the making, in a transaction of the writer's connection."""

    def __init__(self, job: Callable[[Callable[[], None]], Awaitable[None]], file: _File) -> None:
        self._job = job
        self._file = file

    async def put(self, entries: Sequence[Entry]) -> None:
        """Take entries of the other engine, with their revisions."""
        await self._job(lambda: self._file.install_entries(entries))

    async def append(self, rows: Sequence[LogRow]) -> None:
        """Take rows of the other engine's log, in order, without a gap."""
        operations = [unpack_operations(row) for row in rows]
        await self._job(lambda: self._file.install_rows(rows, operations))


@asynccontextmanager
async def open_sqlite_engine(
    path: Path,
    runtime: Runtime,
    *,
    keep_revisions: int = KEEP_REVISIONS,
    keep_bytes: int = KEEP_BYTES,
    cache_kib: int = CACHE_KIB,
    ballast: Ballast | None = None,
) -> AsyncIterator[SqliteEngine]:
    """Open or make the catalogue file at `path`; on leaving, finish what waits and close it.

    With `ballast` some room is kept for deletes on a full disk. Raise IdentityError when it is open already,
    and CatalogError when it cannot be opened or is damaged, CatalogFull when there is no room to open it.
    """
    file = await runtime.run_blocking(_File, path, keep_revisions, keep_bytes, cache_kib, ballast)
    engine = SqliteEngine(file, runtime)
    async with open_background() as nursery:
        nursery.start_soon(engine.write)
        if ballast is not None:
            nursery.start_soon(engine.look_for_room)
        try:
            yield engine
        finally:
            with trio.CancelScope(shield=True):
                await engine.close()
