"""The shard store on a real folder.

    lock, pool.json, boot.json   whose folder it is          (identity.py)
    index.db                     index, and small shards     (index.py)
    large/FF/EXTENT-INDEX        large shards                (large.py, header_file.py)
    incoming/                    large shards on their way   (writer.py), emptied at each start
    ballast                      room for deletes            (ballast.py)

A large shard is written and flushed under a temporary name; then, under the index's lock, its row is added
and the file renamed; then its folder is flushed. That rename is the commit point: a row without a file is
forgotten at the next start, a file without a row is found again. To drop is the reverse: the rows go first,
durably, then the files, so that a file never outlives its row into the time of another generation.
"""

import errno
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from droppexd.errors import DroppexError, NoSuchShard, StoreError, StoreFull
from droppexd.held import shard_key
from droppexd.model import ExtentId, Holding, ShardHeader
from droppexd.runtime import Entropy
from droppexd.store.ballast import BALLAST_BYTES, Ballast
from droppexd.store.checks import (
    ID_BYTES,
    check_note,
    check_small,
    first_generation,
    may_join,
    other_bytes,
    same_bytes,
)
from droppexd.store.files import SYSTEM_FILES, Files, Space
from droppexd.store.header_file import seal, sealed_checksum, unseal
from droppexd.store.health import Health
from droppexd.store.identity import (
    BOOT_FILE,
    Boot,
    PoolIdentity,
    lock_folder,
    note_path,
    read_boot,
    read_identity,
    read_note,
    write_boot,
    write_identity,
    write_sealed,
)
from droppexd.store.index import Held, ShardIndex, Transaction
from droppexd.store.interface import Buffer, Identity, ShardWriter, SmallShard, StoredShard, Usage
from droppexd.store.large import LargeShards
from droppexd.store.small import examine_small
from droppexd.store.writer import LargeWriter

INDEX_FILE = "index.db"

_DROP_BATCH = 64
"""Shards dropped under one hold of the index's lock, so that a long list keeps no small put waiting."""


_RESERVE_PART = 20
_MOST_RESERVE = 10 * 1024**3


def usual_reserve(folder: Path, *, files: Files = SYSTEM_FILES) -> int:
    """Return what a pool leaves free of its disk by itself: a twentieth, or 10 GiB. Raise StoreError."""
    try:
        return min(files.space(str(folder)).capacity // _RESERVE_PART, _MOST_RESERVE)
    except OSError as error:
        raise StoreError(f"cannot look at the disk of {folder}: {error.strerror}") from error


def open_disk_store(
    folder: Path,
    *,
    entropy: Entropy,
    reserve_bytes: int = 0,
    ballast_bytes: int = BALLAST_BYTES,
    files: Files = SYSTEM_FILES,
) -> "DiskStore":
    """Open the pool folder, or make an empty or absent one a pool folder. May block.

    With less than `reserve_bytes` free the store takes no new shards. Raise IdentityError when the folder
    is in use or is none of ours, StoreError when it is damaged, unusable or of a later release.
    """
    lock = lock_folder(folder)
    try:
        return DiskStore(
            folder,
            lock,
            entropy=entropy,
            reserve_bytes=reserve_bytes,
            ballast_bytes=ballast_bytes,
            files=files,
        )
    except BaseException:
        os.close(lock)
        raise


class DiskStore:
    """A ShardStore on a folder that is locked already; `open_disk_store` makes it. Owns the lock."""

    def __init__(
        self,
        folder: Path,
        lock: int,
        *,
        entropy: Entropy,
        reserve_bytes: int,
        ballast_bytes: int,
        files: Files,
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._files = files
        self._reserve = reserve_bytes
        self._health = Health()
        self._joining = threading.Lock()
        self._remembering = threading.Lock()
        self._large = LargeShards(folder, files=files)
        try:
            self._ballast = Ballast(folder, ballast_bytes, reserve=reserve_bytes, files=files)
            self._ballast.make_way()
            self._pool, previous = self._open_identity(entropy)
            self._large.prepare()
            self._index = ShardIndex(folder / INDEX_FILE, files=files, health=self._health)
        except OSError as error:
            raise _cannot_open(folder, error) from error
        try:
            self._boot = self._start(previous, entropy)
            self._generations = itertools.count(first_generation(self._boot.number))
            self._index.reconcile(self._large.keys(), self._generation_of)
        except OSError as error:
            self._index.close()
            raise _cannot_open(folder, error) from error
        except DroppexError:
            self._index.close()
            raise
        self._ballast.refill()

    def _open_identity(self, entropy: Entropy) -> tuple[PoolIdentity, Boot | None]:
        pool = read_identity(self._folder)
        if pool is None:
            pool = PoolIdentity(entropy.token(ID_BYTES), b"")
            write_identity(self._folder, pool, self._files)
        previous = read_boot(self._folder)
        if previous is not None and not (self._folder / INDEX_FILE).exists():
            raise StoreError(
                f"{self._folder / INDEX_FILE} is missing, and with it all small shards: restore it, or start "
                "the pool on an empty folder and let the cluster rebuild its shards"
            )
        return pool, previous

    def _start(self, previous: Boot | None, entropy: Entropy) -> Boot:
        if previous is None and self._index.shards:
            raise StoreError(
                f"{self._folder / BOOT_FILE} is missing, and there are shards: restore it, or start the pool "
                "on an empty folder and let the cluster rebuild its shards"
            )
        number = 1 if previous is None else previous.number + 1
        boot = Boot(number, entropy.token(ID_BYTES), b"" if previous is None else previous.boot_id)
        write_boot(self._folder, boot, self._files)
        return boot

    def _generation_of(self, key: bytes) -> int:
        """Return the generation of a file without a row; one with a damaged header gets a new one."""
        generation = self._large.generation(key)
        return next(self._generations) if generation is None else generation

    # -- the store ---------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """Whose folder this is, and which start of it."""
        return Identity(*self._pool, self._boot.boot_id, self._boot.previous_boot_id)

    @property
    def read_only(self) -> str:
        """Why the store takes no more writes; empty while it does."""
        return self._health.reason

    def distrust(self, what_happened: str) -> None:
        """Take no more writes: the disk did not keep what it said it had."""
        self._health.distrust(what_happened)

    def join(self, cluster_id: bytes) -> None:
        """Belong to this cluster for ever."""
        with self._joining:
            if not may_join(self._pool.cluster_id, cluster_id, str(self._folder)):
                return
            self._health.require_writable()
            joined = self._pool._replace(cluster_id=cluster_id)
            try:
                write_identity(self._folder, joined, self._files)
            except OSError as error:
                raise self._health.flush_failed("the identity", error) from error
            self._pool = joined

    def begin(self, expected_size: int) -> ShardWriter:
        """Begin a large shard."""
        self._health.require_writable()
        self._require_room(expected_size)
        return LargeWriter(
            self._large.incoming_path(),
            expected_size,
            files=self._files,
            health=self._health,
            place=self._place,
            generations=self._generations.__next__,
            discard=self._large.discard,
            require_room=self._require_room,
        )

    def _place(self, header: ShardHeader, generation: int, incoming: str, replacing: int) -> int:
        key = shard_key(header.extent, header.index)
        if replacing and self._replace(key, generation, incoming, replacing):
            return generation
        placed = False
        try:
            with self._index.transaction(flush=False) as transaction:
                if transaction.add_large(key, generation):
                    self._large.place(key, incoming)
                    placed = True
                else:
                    generation = self._same_as_held(transaction, key, header)
        except OSError as error:
            raise self._health.write_failed("naming a shard", error) from error
        except StoreFull:
            if placed:
                self._large.withdraw(key)
            raise
        # Also for a shard that was there: another thread may be between its rename and its flush.
        self._flush_folders({self._large.folder_of(key)})
        return generation

    def _replace(self, key: bytes, generation: int, incoming: str, replacing: int) -> bool:
        """Put a finished file in the place of a damaged instance, durably, if that is still there.

        Unlike that of a new shard the row is flushed: a damaged small shard's row would hide the file. The
        file's name is flushed before: a small shard's row must not go while the file may still vanish.
        """
        try:
            with self._index.transaction() as transaction:
                held = transaction.held(key)
                if held is None or held.generation != replacing:
                    return False
                transaction.remove(key, held)
                transaction.add_large(key, generation)
                self._large.replace(key, incoming)
                self._flush_folders({self._large.folder_of(key)})
        except OSError as error:
            raise self._health.write_failed("replacing a shard", error) from error
        return True

    def _same_as_held(self, transaction: Transaction, key: bytes, header: ShardHeader) -> int:
        """Return the generation held under the identity if its bytes are the same; else raise StoreError."""
        held = transaction.held(key)
        assert held is not None, "the index refused an identity that it does not hold"
        if not same_bytes(self._header_of(transaction, key, held), header):
            raise other_bytes(header.extent, header.index)
        return held.generation

    def _header_of(self, transaction: Transaction, key: bytes, held: Held) -> ShardHeader:
        if held.large:
            return (self._large.opened(key) or self._large.open(key)).header
        return unseal(transaction.small_header(held.generation))

    def put_small(self, shards: Sequence[SmallShard]) -> list[int | DroppexError]:
        """Make small shards durable with one flush for all."""
        outcomes: list[int | DroppexError] = []
        try:
            self._require_room(sum(len(piece) for _, piece in shards))
            with self._index.transaction() as transaction:
                for header, piece in shards:
                    try:
                        outcomes.append(self._add_small(transaction, header, piece))
                    except DroppexError as error:
                        outcomes.append(error)
        except StoreError as error:
            return [error] * len(shards)
        return outcomes

    def _add_small(self, transaction: Transaction, header: ShardHeader, piece: bytes) -> int:
        check_small(header, piece)
        key = shard_key(header.extent, header.index)
        generation = next(self._generations)
        if transaction.add_small(key, generation, seal(header, generation), piece):
            return generation
        return self._same_as_held(transaction, key, header)

    def read(self, extent: ExtentId, index: int, chunk: int) -> tuple[Buffer, bytes]:
        """Return the piece of a chunk and its stored checksum, unverified."""
        key = shard_key(extent, index)
        opened = self._large.opened(key)
        if opened is not None:
            return opened.read(chunk)
        row = self._index.lookup(key)
        if row is None:
            raise NoSuchShard(f"no shard {index} of extent {extent}")
        if row.large:
            return self._large.open(key).read(chunk)
        if chunk != 0:
            raise NoSuchShard(f"the shard has 1 chunk, no chunk {chunk}")
        return row.piece, sealed_checksum(row.header)

    def header(self, extent: ExtentId, index: int) -> ShardHeader:
        """Return what the shard says of itself."""
        key = shard_key(extent, index)
        opened = self._large.opened(key)
        if opened is not None:
            return opened.header
        row = self._index.lookup(key)
        if row is None:
            raise NoSuchShard(f"no shard {index} of extent {extent}")
        return self._large.open(key).header if row.large else unseal(row.header)

    def examine(self, extent: ExtentId, index: int) -> StoredShard:
        """Open a shard as it stands on the disk now."""
        key = shard_key(extent, index)
        row = self._index.lookup(key)
        if row is None:
            raise NoSuchShard(f"no shard {index} of extent {extent}")
        return self._large.examine(key) if row.large else examine_small(key, row)

    def find(self, extents: Sequence[ExtentId]) -> list[Holding]:
        """Return the shards that are held of these extents."""
        return self._index.find(extents)

    def page(self, after: tuple[ExtentId, int] | None, limit: int) -> list[Holding]:
        """Return a page of everything held, in order."""
        return self._index.page(b"" if after is None else shard_key(*after), limit)

    def drop(self, holdings: Sequence[Holding]) -> list[Holding]:
        """Remove these instances, durably; return those that are not held any more."""
        gone: list[Holding] = []
        folders: set[str] = set()
        self._health.require_writable()
        try:
            for start in range(0, len(holdings), _DROP_BATCH):
                gone += self._drop_within_room(holdings[start : start + _DROP_BATCH], folders)
        finally:
            self._flush_folders(folders)
        self._index.reclaim()
        self._ballast.refill()
        return gone

    def _drop_within_room(self, holdings: Sequence[Holding], folders: set[str]) -> list[Holding]:
        """Drop in one transaction; where the disk has no room, with that of the ballast."""
        while True:
            try:
                return self._drop_batch(holdings, folders)
            except StoreFull:
                if not self._ballast.release():
                    raise

    def _drop_batch(self, holdings: Sequence[Holding], folders: set[str]) -> list[Holding]:
        """Drop in one transaction; add the folders that must be flushed before anyone is told."""
        gone: list[Holding] = []
        files: list[bytes] = []
        remains = ExitStack()

        def remove_files() -> None:
            for key in files:
                remains.enter_context(self._large.remove(key))

        try:
            with remains, self._index.transaction(then=remove_files) as transaction:
                for holding in holdings:
                    key = shard_key(holding.extent, holding.shard)
                    held = transaction.held(key)
                    if held is None:
                        # Another thread may have dropped it and not have flushed yet.
                        folders.add(self._large.folder_of(key))
                    elif held.generation == holding.generation:
                        transaction.remove(key, held)
                        if held.large:
                            files.append(key)
                            folders.add(self._large.folder_of(key))
                    else:
                        continue
                    gone.append(holding)
        except OSError as error:
            raise self._health.write_failed("removing a shard", error) from error
        return gone

    def remember(self, subject: str, fields: Mapping[str, object]) -> None:
        """Replace what is remembered of a subject, durably."""
        self._health.require_writable()
        check_note(subject, fields)
        with self._remembering:
            try:
                write_sealed(note_path(self._folder, subject), fields, self._files)
            except OSError as error:
                raise self._health.write_failed(f"remembering the {subject}", error) from error

    def recall(self, subject: str) -> Mapping[str, object] | None:
        """Return what `remember` was given last; None when nothing is remembered."""
        if self._lock < 0:
            raise StoreError("the store is closed")
        return read_note(self._folder, subject)

    def usage(self) -> Usage:
        """Return how full the disk is."""
        space, shards = self._space(), self._index.shards
        free = max(0, space.free - self._reserve)
        return Usage(space.capacity, free, shards, max(0, space.free - self._reserve // 2))

    def close(self) -> None:
        """Flush and unlock. Idempotent."""
        self._index.close()
        self._large.close()
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)

    # -- helpers -----------------------------------------------------------------------------------

    def _flush_folders(self, folders: set[str]) -> None:
        for folder in sorted(folders):
            try:
                self._files.fsync_folder(folder)
            except OSError as error:
                raise self._health.flush_failed("a folder", error) from error

    def _space(self) -> Space:
        try:
            return self._files.space(str(self._folder))
        except OSError as error:
            raise StoreError(f"cannot tell how full {self._folder} is: {error}") from error

    def _require_room(self, size: int) -> None:
        free = self._space().free
        if free - size < self._reserve:
            raise StoreFull(f"the disk is full: {free} bytes are free, and {self._reserve} of them stay free")


def _cannot_open(folder: Path, error: OSError) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreFull(f"{folder} is on a disk without any room: make a little, then start the pool")
    return StoreError(f"cannot open the data folder {folder}: {error}")
