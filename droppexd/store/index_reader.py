"""Reading the database of a pool: look-ups and pages, by any number of threads."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from droppexd.errors import DroppexError, IntegrityError, StoreError
from droppexd.held import ID_BYTES, KEY_BYTES, holding_of
from droppexd.model import MAX_K, MAX_M, ExtentId, Holding
from droppexd.store.health import primary_code

IDLE_READERS = 8

_UNREADABLE = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS)
"""The disk does not give back what it took. Want of memory, descriptors or locks is another matter."""

_LOOKUP = """
SELECT shard.generation, shard.large, small.header, small.piece
FROM shard LEFT JOIN small ON small.generation = shard.generation WHERE shard.key = ?
"""
_PAGE = "SELECT key, generation FROM shard WHERE key > ? ORDER BY key LIMIT ?"
_FIND = "SELECT key, generation FROM shard WHERE key BETWEEN ? AND ? ORDER BY key"
_STRAY = "SELECT (SELECT count(*) FROM small) - (SELECT count(*) FROM shard WHERE NOT large)"


class Row(NamedTuple):
    """A shard as the database has it; `header` (sealed) and `piece` are empty for a large one."""

    generation: int
    large: bool
    header: bytes
    piece: bytes


def _is_sound(key: object, generation: object) -> bool:
    """Whether a row names a shard. A damaged one may hold anything, and must not hide those behind it."""
    return (
        type(key) is bytes
        and len(key) == KEY_BYTES
        and key[ID_BYTES] < MAX_K + MAX_M
        and type(generation) is int
        and generation >= 0
    )


class IndexReader:
    """Reads the database at a URI. Thread-safe: each thread that reads has a connection of its own."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._readers: list[sqlite3.Connection] = []
        self.closed = False

    def lookup(self, key: bytes) -> Row | None:
        """Return a shard; None when it is not held."""
        reader = self._take_reader()
        try:
            row = reader.execute(_LOOKUP, (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        finally:
            self._give_reader(reader)
        if row is None:
            return None
        generation, large, header, piece = row
        if large:
            return Row(generation, True, b"", b"")
        if type(header) is not bytes or type(piece) is not bytes:
            raise IntegrityError("the small shard is damaged or missing in the database")
        return Row(generation, False, header, piece)

    def page(self, after: bytes, limit: int) -> list[Holding]:
        """Return holdings in order of their keys, after the key `after`."""
        return self._holdings(_PAGE, ((after, limit),))

    def find(self, extents: Sequence[ExtentId]) -> list[Holding]:
        """Return what is held of these extents."""
        ranges = ((packed + b"\x00", packed + b"\xff") for packed in map(ExtentId.to_bytes, extents))
        return self._holdings(_FIND, ranges)

    def count(self) -> int:
        """Return how many shards are listed."""
        with self._reading() as reader:
            count: int = reader.execute("SELECT count(*) FROM shard").fetchone()[0]
        return count

    def complaints(self, most: int) -> list[str]:
        """Return what SQLite finds wrong with the structure of the database, reading all of it."""
        with self._reading() as reader:
            found = reader.execute(f"PRAGMA quick_check({int(most)})").fetchall()
            stray = reader.execute(_STRAY).fetchone()[0]
        lines = [bytes(line).decode(errors="replace") for (line,) in found if line != b"ok"]
        if stray > 0:
            lines.append(f"{stray} small shards are stored and not listed")
        return [f"the database is damaged: {line}" for line in lines]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; SQLite's errors become ours."""
        reader = self._take_reader()
        try:
            yield reader
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        finally:
            self._give_reader(reader)

    def _holdings(self, query: str, parameters: Iterable[tuple[object, ...]]) -> list[Holding]:
        found: list[Holding] = []
        with self._reading() as reader:
            for values in parameters:
                found += [holding_of(*row) for row in reader.execute(query, values) if _is_sound(*row)]
        return found

    def close_readers(self) -> None:
        """Close the connections that nobody uses, and keep none from now on."""
        self.closed = True
        while self._readers:
            self._readers.pop().close()

    # -- connections -------------------------------------------------------------------------------

    @staticmethod
    def _connect(uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        connection.text_factory = bytes  # A damaged row may claim to be text.
        return connection

    def _take_reader(self) -> sqlite3.Connection:
        """Return a connection that nobody else uses: at most one for each thread that reads."""
        self._require_open()
        try:
            return self._readers.pop()
        except IndexError:
            pass
        try:
            reader = self._connect(self._uri)
            reader.execute("PRAGMA cache_size = -1024")
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        return reader

    def _give_reader(self, reader: sqlite3.Connection) -> None:
        if self.closed or len(self._readers) >= IDLE_READERS:
            reader.close()
        else:
            self._readers.append(reader)

    def _require_open(self) -> None:
        if self.closed:
            raise StoreError("the store is closed")

    @staticmethod
    def _unreadable(error: sqlite3.Error) -> DroppexError:
        if primary_code(error) == sqlite3.SQLITE_CORRUPT:
            return IntegrityError(f"the database is damaged here: {error}")
        if getattr(error, "sqlite_errorcode", None) in _UNREADABLE:
            return IntegrityError(f"the database cannot be read from the disk here: {error}")
        return StoreError(f"cannot read the database: {error}")
