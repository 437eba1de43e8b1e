"""A pool's folder that nobody serves, opened to be looked at: nothing in it is changed.

Opening a store writes: a boot record, and an index that agrees with the files. Here the index is read as it
stands, with what lies in its log, and that it and the files differ is something to be told.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from droppexd.databases import uri_of_stopped
from droppexd.errors import DroppexError, IdentityError, IntegrityError, StoreError
from droppexd.held import holding_of, shard_key
from droppexd.model import ExtentId, Holding
from droppexd.store.disk import INDEX_FILE
from droppexd.store.files import SYSTEM_FILES
from droppexd.store.identity import (
    BOOT_FILE,
    LOCK_FILE,
    POOL_FILE,
    PoolIdentity,
    read_boot,
    read_identity,
    take_lock,
)
from droppexd.store.index_reader import IndexReader
from droppexd.store.interface import StoredShard
from droppexd.store.large import LargeShards
from droppexd.store.small import examine_small

_MOST_COMPLAINTS = 100
"""What SQLite says of a damaged database."""


def open_stopped_pool(folder: Path) -> "StoppedPool":
    """Open the folder of a pool that is not running. Blocking.

    Raise IdentityError when it is in use, or is not the folder of a pool; StoreError when it cannot be read.
    """
    if not (folder / POOL_FILE).exists():
        if folder.is_dir():
            raise IdentityError(f"{folder} is not the data folder of a pool: it has no {POOL_FILE}")
        raise StoreError(f"there is no folder {folder}")
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        lock = -1  # A copy of a folder may lack it. Whoever serves a folder has made it.
    except OSError as error:
        raise StoreError(f"cannot use the data folder {folder}: {error}") from error
    else:
        take_lock(lock, folder)
    try:
        return StoppedPool(folder, lock)
    except BaseException:
        if lock >= 0:
            os.close(lock)
        raise


class StoppedPool:
    """What lies in a folder that is locked already; `open_stopped_pool` makes it. Owns the lock."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock
        self._large = LargeShards(folder, files=SYSTEM_FILES)
        self._made = ""
        self._index = self._open_index()
        self.shards = 0
        """Rows of the index."""

    def _open_index(self) -> IndexReader | None:
        path = self._folder / INDEX_FILE
        if not path.exists():
            return None
        try:
            uri, made = uri_of_stopped(path)
        except OSError as error:
            raise StoreError(f"cannot read {error.filename}: {error}") from error
        self._made = str(made or "")  # It goes again with `close`.
        return IndexReader(uri)

    def identity(self) -> PoolIdentity:
        """Return whose folder this is. Raise StoreError when the record is damaged or of a later release."""
        identity = read_identity(self._folder)
        if identity is None or not identity.pool_id:
            raise StoreError(f"{self._folder / POOL_FILE} names no pool")
        return identity

    def complaints(self) -> Iterator[str]:
        """Yield what is wrong with the records of the folder and the structure of the index, a line each.

        Reads the whole index.
        """
        try:
            self.identity()
        except DroppexError as error:
            yield str(error)
        try:
            boot = read_boot(self._folder)
        except DroppexError as error:
            yield str(error)
        else:
            if boot is None and self._index is not None:
                yield f"{self._folder / BOOT_FILE} is missing: the folder was copied in part, or never served"
        if self._index is None:
            yield f"{self._folder / INDEX_FILE} is missing, and with it all small shards"
            return
        try:
            yield from self._index.complaints(_MOST_COMPLAINTS)
            self.shards = self._index.count()
        except DroppexError as error:
            yield f"{self._folder / INDEX_FILE}: {error}"

    def page(self, after: tuple[ExtentId, int] | None, limit: int) -> list[Holding]:
        """Return a page of what the index lists, as a store does."""
        if self._index is None:
            return []
        return self._index.page(b"" if after is None else shard_key(*after), limit)

    def find(self, extents: Sequence[ExtentId]) -> list[Holding]:
        """Return what the index lists of these extents."""
        return [] if self._index is None else self._index.find(extents)

    def examine(self, extent: ExtentId, index: int) -> StoredShard:
        """Open a shard as it stands on the disk, whether or not the index lists it; raise as a store does."""
        key = shard_key(extent, index)
        row = None if self._index is None else self._index.lookup(key)
        return self._large.examine(key) if row is None or row.large else examine_small(key, row)

    def unlisted(self) -> Iterator[tuple[ExtentId, int]]:
        """Yield the large shards that the index does not list: the next start finds them again.

        Raise StoreError when a folder cannot be read.
        """
        try:
            files = self._large.keys()
            for key in files:
                if not self._lists(key):
                    extent, index, _ = holding_of(key, 0)
                    yield extent, index
        except OSError as error:
            raise StoreError(f"cannot list the large shards: {error}") from error

    def _lists(self, key: bytes) -> bool:
        try:
            return self._index is not None and self._index.lookup(key) is not None
        except IntegrityError:
            return False  # A damaged small shard has this identity, or the index is damaged here.

    def close(self) -> None:
        """Unlock. Idempotent."""
        if self._index is not None:
            self._index.close_readers()
        self._large.close()
        if self._made:
            with suppress(OSError):
                Path(self._made).unlink()
            self._made = ""
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)
