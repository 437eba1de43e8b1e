"""The SQLite database of a pool: the ordered index of all shards, and the small shards themselves.

Two tables. `shard` has one narrow row for every shard, small or large, in the order of (extent, index):
pages, look-ups and counts need no listing of folders and no memory that grows with the number of shards.
`small` has header and piece of small shards in the order they came, so that inserting only appends.
For small shards this database is the truth; for large ones their files are, and the rows are derived:
they are committed without a flush and reconciled with the files at each start.

One connection, behind one lock, does all writing and all checkpoints (SQLite's WAL has had bugs where two
connections checkpoint at once); readers have connections of their own. No mmap: an unreadable sector under
a mapping kills the process, and a small read costs 8 us without it instead of 6.
Pages of 4096 bytes: against 8192 and more, a shard of 4 KiB takes 4.7 KB instead of 5.5 to 8.2 KB, and half
the WAL. `auto_vacuum=INCREMENTAL` costs 2 % of space and lets dropped shards give room back to large ones.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from droppexd.errors import IntegrityError, StoreError
from droppexd.store.files import Files
from droppexd.store.health import Health
from droppexd.store.index_reader import IndexReader

PAGE_BYTES = 4096
CHECKPOINT_BYTES = 8 * 1024 * 1024
"""About how much the WAL grows between checkpoints: each costs two flushes."""
CROWDED_WAL_PAGES = 64 * 1024 * 1024 // PAGE_BYTES
"""A WAL of this length is emptied even if readers have to be waited for."""
KEPT_FREE_PAGES = 8 * 1024 * 1024 // PAGE_BYTES
"""Free pages inside the database that are kept for the next small shards."""
VACUUM_PAGES = 512
"""Pages given back under one hold of the lock."""
MAX_VACUUMS = 64
"""Such holds in one call of `reclaim`."""
RECONCILE_BATCH = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shard (
    key BLOB PRIMARY KEY,
    generation INTEGER NOT NULL,
    large INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS small (
    generation INTEGER PRIMARY KEY,
    header BLOB NOT NULL,
    piece BLOB NOT NULL
);
"""
_ADD = "INSERT INTO shard VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_UNLISTED = """
SELECT key FROM temp.found
WHERE NOT EXISTS (SELECT 1 FROM main.shard WHERE shard.key = found.key) LIMIT ?
"""
_VANISHED = """
DELETE FROM main.shard
WHERE large AND NOT EXISTS (SELECT 1 FROM temp.found WHERE found.key = shard.key)
"""


class Held(NamedTuple):
    """A shard that stands in the index."""

    generation: int
    large: bool


class Transaction:
    """A transaction under way on the writing connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self.added = 0
        self.written_bytes = 0

    def add_small(self, key: bytes, generation: int, header: bytes, piece: bytes) -> bool:
        """Add a small shard; return False when the identity is held."""
        if not self._add(key, generation, large=False):
            return False
        self._execute("INSERT INTO small VALUES (?, ?, ?)", (generation, header, piece))
        self.written_bytes += len(piece)
        return True

    def add_large(self, key: bytes, generation: int) -> bool:
        """Add the row of a large shard; return False when the identity is held."""
        return self._add(key, generation, large=True)

    def held(self, key: bytes) -> Held | None:
        """Return what is held under this identity."""
        row = self._execute("SELECT generation, large FROM shard WHERE key = ?", (key,)).fetchone()
        return None if row is None else Held(row[0], bool(row[1]))

    def small_header(self, generation: int) -> bytes:
        """Return the sealed header of a small shard. Raise IntegrityError when damaged."""
        row = self._execute("SELECT header FROM small WHERE generation = ?", (generation,)).fetchone()
        if row is None or type(row[0]) is not bytes:
            raise IntegrityError("the small shard is damaged or missing in the database")
        return row[0]

    def remove(self, key: bytes, held: Held) -> None:
        """Remove a shard that `held` returned."""
        self._execute("DELETE FROM shard WHERE key = ?", (key,))
        if not held.large:
            self._execute("DELETE FROM small WHERE generation = ?", (held.generation,))
        self.added -= 1
        self.written_bytes += 2 * PAGE_BYTES

    def _add(self, key: bytes, generation: int, *, large: bool) -> bool:
        if self._execute(_ADD, (key, generation, large)).rowcount == 0:
            return False
        self.added += 1
        self.written_bytes += 2 * PAGE_BYTES
        return True


class ShardIndex(IndexReader):
    """The open database. Thread-safe: one writer at a time, readers beside it."""

    def __init__(self, path: Path, *, files: Files, health: Health) -> None:
        uri = path.resolve().as_uri()
        super().__init__(f"{uri}?mode=ro")
        self._files = files
        self._health = health
        self._lock = threading.Lock()
        self._flushing = True
        self._wal_bytes = 0
        try:
            self._writer = self._connect(uri)
            self._writer.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self._writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA wal_autocheckpoint = 0")
            self._writer.execute("PRAGMA cache_size = -8192")
            self._writer.executescript(_SCHEMA)
            self.shards: int = self._writer.execute("SELECT count(*) FROM shard").fetchone()[0]
        except sqlite3.Error as error:
            raise StoreError(f"cannot open the database {path}: {error}") from error

    # -- writing -----------------------------------------------------------------------------------

    @contextmanager
    def transaction(
        self, *, flush: bool = True, then: Callable[[], None] | None = None
    ) -> Iterator[Transaction]:
        """Commit what is done inside, durably unless `flush` is False; roll back when it raises.

        `then` is called after the commit, before anyone else may write.
        Raise StoreFull when there was no room: nothing changed. Any other failure of SQLite turns the store
        read-only.
        """
        with self._lock:
            self._require_open()
            self._health.require_writable()
            committing = False
            try:
                self._set_flushing(flush)
                self._writer.execute("BEGIN IMMEDIATE")
                transaction = Transaction(self._writer)
                yield transaction
                committing = True
                self._files.commit(self._writer)
            except sqlite3.Error as error:
                self._roll_back()
                raise self._health.database_failed(
                    "writing the database", error, committing=committing
                ) from error
            except BaseException:
                self._roll_back()
                raise
            self.shards += transaction.added
            self._wal_bytes += transaction.written_bytes
            if then is not None:
                then()
            if self._wal_bytes > CHECKPOINT_BYTES:
                self._checkpoint()

    def reconcile(self, found: Iterable[bytes], generation_of: Callable[[bytes], int]) -> None:
        """Make the rows of large shards agree with the keys of the files that are there, at each start.

        `generation_of` reads the generation of a file that has no row. Small shards that a killed start had
        written and not flushed are found in the WAL like any other, and to store one again would find
        nothing to write, so nothing to flush: the checkpoint flushes them before anyone relies on them.
        """
        try:
            self._writer.execute("CREATE TEMP TABLE found (key BLOB PRIMARY KEY) WITHOUT ROWID")
            self._writer.execute("BEGIN")
            self._writer.executemany("INSERT INTO temp.found VALUES (?)", ((key,) for key in found))
            self._writer.execute("COMMIT")
            with self.transaction() as transaction:
                transaction.added -= self._writer.execute(_VANISHED).rowcount
                while unlisted := self._writer.execute(_UNLISTED, (RECONCILE_BATCH,)).fetchall():
                    for (key,) in unlisted:
                        transaction.add_large(key, generation_of(key))
            self._writer.execute("DROP TABLE temp.found")
            self._checkpoint()
        except sqlite3.Error as error:
            self._roll_back()
            raise StoreError(f"cannot bring the index up to date: {error}") from error

    def reclaim(self) -> None:
        """Give free pages back to the file system while many are free, in small steps."""
        for _ in range(MAX_VACUUMS):
            with self._lock:
                if self.closed or self._health.reason:
                    return
                try:
                    free = self._writer.execute("PRAGMA freelist_count").fetchone()[0]
                    total = self._writer.execute("PRAGMA page_count").fetchone()[0]
                    if free - VACUUM_PAGES < max(KEPT_FREE_PAGES, total // 8):
                        return
                    self._set_flushing(False)
                    # `execute` would stop after the first page: each is a row, of no columns.
                    self._writer.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
                    self._wal_bytes += VACUUM_PAGES * PAGE_BYTES
                    if self._wal_bytes > CHECKPOINT_BYTES:
                        self._checkpoint()
                except sqlite3.Error as error:
                    # What was dropped is dropped; only a broken disk matters here, and it is remembered.
                    self._health.database_failed("giving back space", error, committing=True)
                    return

    def close(self) -> None:
        """Checkpoint and close. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            if not self._health.reason:
                self._checkpoint()
            self.close_readers()
            # The last to go, so that SQLite's own checkpoint at the end is the writer's too.
            with suppress(sqlite3.Error):
                self._writer.close()

    def _checkpoint(self) -> None:
        """Move the WAL into the database. What it holds is durable already, so failing is no one's error."""
        self._wal_bytes = 0
        try:
            remaining = self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
            if remaining > CROWDED_WAL_PAGES:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            self._health.database_failed("flushing the database", error, committing=False)

    def _set_flushing(self, flush: bool) -> None:
        if flush != self._flushing:
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
            self._flushing = flush

    def _roll_back(self) -> None:
        # After some errors SQLite has rolled back by itself; a second error tells nothing new.
        with suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
