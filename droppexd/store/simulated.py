"""A store in memory with the contract of the real one, for the simulation and for tests.

A `SimulatedDisk` is what survives a crash; a `SimulatedStore` is one start of a pool on it. Deterministic:
nothing depends on anything but the calls and the entropy handed in.
"""

import json
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from droppexd.errors import (
    DroppexError,
    IdentityError,
    IntegrityError,
    InvalidRequest,
    LocalProtocolError,
    NoSuchShard,
    StoreError,
    StoreFull,
)
from droppexd.model import CHUNK_SIZE, EXTENT_CHUNKS, ExtentId, Holding, ShardHeader
from droppexd.runtime import Entropy
from droppexd.store.checks import (
    ID_BYTES,
    check_note,
    check_small,
    check_written,
    first_generation,
    may_join,
    other_bytes,
    same_bytes,
)
from droppexd.store.interface import Buffer, Identity, ShardWriter, SmallShard, StoredShard, Usage

DEFAULT_CAPACITY = 1024 * 1024 * 1024
OVERHEAD_BYTES = 4096
"""What a shard takes beside its pieces."""

_Key = tuple[ExtentId, int]


@dataclass(slots=True)
class _Stored:
    """A shard on the disk."""

    header: ShardHeader
    pieces: list[bytes]
    generation: int
    damaged: bool = False

    @property
    def taken_bytes(self) -> int:
        return OVERHEAD_BYTES + self.header.stored_size


class PowerLoss(NamedTuple):
    """A power failure that is planned for the next flush."""

    kept: int
    """How many of the writes that wait for that flush reach the disk all the same."""
    on_loss: Callable[[], None]
    """Told at that moment, so that the process that used the disk ends as well."""


class Snapshot(NamedTuple):
    """What a disk held at some moment."""

    cluster_id: bytes
    boot_id: bytes
    boots: int
    shards: dict[_Key, _Stored]


def _nothing() -> None:
    """Take no time."""


class SimulatedDisk:
    """What survives a crash: identity, boot record and flushed shards. Also where faults are planted."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self.pool_id = b""
        self.cluster_id = b""
        self.boot_id = b""
        self.boots = 0
        self.in_use = False
        self.flush_failure = ""
        self.power_loss: PowerLoss | None = None
        self.on_access: Callable[[], None] = _nothing
        """Called when something is read or flushed: a slow disk has time pass here."""
        self.unreadable: set[_Key] = set()
        """Shards whose pieces cannot be read; headers and lists can."""
        self.worn: set[_Key] = set()
        """Shards that cannot be read back, however often they are written."""
        self.forgotten: set[_Key] = set()
        """Shards that are gone as soon as they are flushed, however often they are written."""
        self.shards: dict[_Key, _Stored] = {}
        self.order: list[_Key] = []
        self.taken_bytes = 0
        self.notes: dict[str, str] = {}

    # -- faults ------------------------------------------------------------------------------------

    def flip_piece(self, extent: ExtentId, shard: int, chunk: int) -> None:
        """Flip a bit of a stored piece."""
        pieces = self._stored(extent, shard).pieces
        pieces[chunk] = _flipped(pieces[chunk])

    def flip_checksum(self, extent: ExtentId, shard: int, chunk: int = 0) -> None:
        """Flip a bit of a stored checksum, in a header that is otherwise sound."""
        stored = self._stored(extent, shard)
        checksums = list(stored.header.checksums)
        checksums[chunk] = _flipped(checksums[chunk])
        stored.header = replace(stored.header, checksums=tuple(checksums))

    def damage_header(self, extent: ExtentId, shard: int) -> None:
        """Make a stored header unreadable."""
        self._stored(extent, shard).damaged = True

    def damage_note(self, subject: str) -> None:
        """Make what is remembered of a subject unreadable."""
        self.notes[subject] = self.notes[subject][:-1]

    def fail_flush(self, reason: str = "Input/output error") -> None:
        """Make the next flush fail, and with it every later one of that start."""
        self.flush_failure = reason

    def fail_power(self, kept: int, on_loss: Callable[[], None]) -> None:
        """Have the power fail at the next flush, between writing and flushing.

        The first `kept` of the writes that this flush was for are on the disk afterwards, the others are not;
        none is acknowledged. A large shard is there whole or not at all, as it is on a real disk.
        """
        self.power_loss = PowerLoss(kept, on_loss)

    def snapshot(self) -> Snapshot:
        """Return a copy of what is on the disk now."""
        shards = {
            key: replace(stored, pieces=list(stored.pieces)) for key, stored in sorted(self.shards.items())
        }
        return Snapshot(self.cluster_id, self.boot_id, self.boots, shards)

    def restore(self, snapshot: Snapshot) -> None:
        """Make the disk what it was then, while no store uses it."""
        self.cluster_id, self.boot_id, self.boots = snapshot[:3]
        self.shards = {
            key: replace(stored, pieces=list(stored.pieces)) for key, stored in snapshot.shards.items()
        }
        self.order = sorted(self.shards)
        self.taken_bytes = sum(stored.taken_bytes for stored in self.shards.values())

    def _stored(self, extent: ExtentId, shard: int) -> _Stored:
        stored = self.shards.get((extent, shard))
        if stored is None:
            raise NoSuchShard(f"no shard {shard} of extent {extent}")
        return stored

    # -- what a store does to it -------------------------------------------------------------------

    def free(self) -> int:
        """Return the bytes that nothing takes."""
        return max(0, self.capacity - self.taken_bytes)

    def add(self, key: _Key, stored: _Stored) -> None:
        """Keep a flushed shard."""
        if key in self.forgotten:
            return
        self.shards[key] = stored
        insort(self.order, key)
        self.taken_bytes += stored.taken_bytes

    def remove(self, key: _Key) -> None:
        """Forget a shard."""
        self.taken_bytes -= self.shards.pop(key).taken_bytes
        self.order.remove(key)


class SimulatedStore:
    """A ShardStore on a SimulatedDisk. One start of a pool: after `close` or `crash` make another."""

    def __init__(self, disk: SimulatedDisk, *, entropy: Entropy) -> None:
        if disk.in_use:
            raise IdentityError("the simulated disk is in use by another pool")
        disk.in_use = True
        disk.flush_failure = ""
        disk.power_loss = None
        if not disk.pool_id:
            disk.pool_id = entropy.token(ID_BYTES)
        previous, disk.boot_id = disk.boot_id, entropy.token(ID_BYTES)
        disk.boots += 1
        self._disk = disk
        self._boot_id = disk.boot_id
        self._previous_boot_id = previous
        self._generation = first_generation(disk.boots) - 1
        self._reason = ""
        self._open = True
        self._unfinished_bytes = 0
        self._lock = threading.RLock()

    @property
    def identity(self) -> Identity:
        """Whose disk this is, and which start of it."""
        return Identity(self._disk.pool_id, self._disk.cluster_id, self._boot_id, self._previous_boot_id)

    @property
    def read_only(self) -> str:
        """Why the store takes no more writes; empty while it does."""
        return self._reason

    def distrust(self, what_happened: str) -> None:
        """Take no more writes."""
        self._reason = self._reason or what_happened

    def join(self, cluster_id: bytes) -> None:
        """Belong to this cluster for ever."""
        with self._lock:
            if not may_join(self._disk.cluster_id, cluster_id, "the simulated disk"):
                return
            self._require_writable()
            self._flush(partial(setattr, self._disk, "cluster_id", cluster_id))
            self._disk.cluster_id = cluster_id

    def begin(self, expected_size: int) -> ShardWriter:
        """Begin a large shard."""
        with self._lock:
            self._require_writable()
            self._require_room(OVERHEAD_BYTES + expected_size)
            return _SimulatedWriter(self)

    def take_room(self, size: int) -> None:
        """Count bytes that a writer holds. Raise StoreFull when there is no room."""
        with self._lock:
            self._require_writable()
            self._require_room(size)
            self._unfinished_bytes += size

    def give_room(self, size: int) -> None:
        """Count them no more."""
        with self._lock:
            self._unfinished_bytes -= size

    def keep_large(self, header: ShardHeader, pieces: list[bytes], replacing: int) -> int:
        """Flush a shard that a writer finished and return its generation."""
        with self._lock:
            self._require_writable()
            self._flush(partial(self._keep, header, pieces, replacing))
            return self._keep(header, pieces, replacing)

    def put_small(self, shards: Sequence[SmallShard]) -> list[int | DroppexError]:
        """Make small shards durable with one flush for all."""
        with self._lock:
            try:
                self._require_writable()
                self._flush(*[partial(self._put_one, header, piece) for header, piece in shards])
            except StoreError as error:
                return [error] * len(shards)
            return [self._put_one(header, piece) for header, piece in shards]

    def _put_one(self, header: ShardHeader, piece: bytes) -> int | DroppexError:
        try:
            check_small(header, piece)
            return self._keep(header, [bytes(piece)])
        except DroppexError as error:
            return error

    def read(self, extent: ExtentId, index: int, chunk: int) -> tuple[Buffer, bytes]:
        """Return the piece of a chunk and its stored checksum, unverified."""
        with self._lock:
            self._disk.on_access()
            stored = self._sound(extent, index)
            if (extent, index) in self._disk.unreadable:
                raise IntegrityError("the piece cannot be read (Input/output error)")
            if not 0 <= chunk < len(stored.pieces):
                raise NoSuchShard(f"the shard has {len(stored.pieces)} chunks, no chunk {chunk}")
            return stored.pieces[chunk], stored.header.checksums[chunk]

    def header(self, extent: ExtentId, index: int) -> ShardHeader:
        """Return what the shard says of itself."""
        with self._lock:
            return self._sound(extent, index).header

    def examine(self, extent: ExtentId, index: int) -> StoredShard:
        """Open a shard as it stands on the disk now."""
        with self._lock:
            stored = self._sound(extent, index)
            return _Examined(stored.header, stored.generation, tuple(stored.pieces))

    def find(self, extents: Sequence[ExtentId]) -> list[Holding]:
        """Return the shards that are held of these extents."""
        found: list[Holding] = []
        with self._lock:
            self._require_open()
            for extent in extents:
                start = bisect_right(self._disk.order, (extent, -1))
                end = bisect_right(self._disk.order, (extent, 255))
                found += [self._holding(key) for key in self._disk.order[start:end]]
        return found

    def page(self, after: tuple[ExtentId, int] | None, limit: int) -> list[Holding]:
        """Return a page of everything held, in order."""
        with self._lock:
            self._require_open()
            start = 0 if after is None else bisect_right(self._disk.order, after)
            return [self._holding(key) for key in self._disk.order[start : start + limit]]

    def drop(self, holdings: Sequence[Holding]) -> list[Holding]:
        """Remove these instances, durably; return those that are not held any more."""
        gone: list[Holding] = []
        with self._lock:
            self._require_writable()
            self._flush(*[partial(self._drop_one, holding) for holding in holdings])
            gone += [holding for holding in holdings if self._drop_one(holding)]
        return gone

    def remember(self, subject: str, fields: Mapping[str, object]) -> None:
        """Replace what is remembered of a subject, durably."""
        with self._lock:
            self._require_writable()
            check_note(subject, fields)
            note = json.dumps(fields)
            self._require_room(len(note))
            self._flush()
            self._disk.notes[subject] = note

    def recall(self, subject: str) -> Mapping[str, object] | None:
        """Return what `remember` was given last; None when nothing is remembered."""
        with self._lock:
            self._require_open()
            note = self._disk.notes.get(subject)
            if note is None:
                return None
            try:
                fields: Mapping[str, object] = json.loads(note)
            except ValueError as error:
                raise IntegrityError(f"the note of the {subject} is damaged") from error
            return fields

    def _drop_one(self, holding: Holding) -> bool:
        """Remove one instance; return False when another one is held in its place."""
        key = (holding.extent, holding.shard)
        stored = self._disk.shards.get(key)
        if stored is not None and stored.generation != holding.generation:
            return False
        if stored is not None:
            self._disk.remove(key)
        return True

    def usage(self) -> Usage:
        """Return how full the disk is."""
        with self._lock:
            self._require_open()
            free = max(0, self._disk.free() - self._unfinished_bytes)
            return Usage(self._disk.capacity, free, len(self._disk.shards), free)

    def close(self) -> None:
        """Unlock. Idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                self._disk.in_use = False

    def crash(self) -> None:
        """End as a power failure does: what was not flushed is lost, and every later call fails."""
        self.close()

    # -- helpers, the lock held --------------------------------------------------------------------

    def _keep(self, header: ShardHeader, pieces: list[bytes], replacing: int = 0) -> int:
        key = (header.extent, header.index)
        there = self._disk.shards.get(key)
        if there is not None and there.generation == replacing:
            self._disk.remove(key)
        elif there is not None:
            held = self._sound(*key)
            if not same_bytes(held.header, header):
                raise other_bytes(header.extent, header.index)
            return held.generation
        stored = _Stored(header, pieces, self._generation + 1)
        self._require_room(stored.taken_bytes)
        self._generation += 1
        self._disk.add(key, stored)
        return stored.generation

    def _sound(self, extent: ExtentId, index: int) -> _Stored:
        self._require_open()
        stored = self._disk.shards.get((extent, index))
        if stored is None:
            raise NoSuchShard(f"no shard {index} of extent {extent}")
        if stored.damaged or (extent, index) in self._disk.worn:
            raise IntegrityError("the shard's header is damaged")
        return stored

    def _holding(self, key: _Key) -> Holding:
        return Holding(*key, self._disk.shards[key].generation)

    def _flush(self, *written: Callable[[], object]) -> None:
        """Flush, which does nothing here unless it fails; `written` is what is not durable before."""
        disk = self._disk
        disk.on_access()
        if disk.power_loss is not None:
            loss, disk.power_loss = disk.power_loss, None
            for write in written[: loss.kept]:
                with suppress(DroppexError):
                    write()
            self.crash()
            loss.on_loss()
            raise StoreError("the power failed")
        if disk.flush_failure:
            self._reason = f"flushing failed ({self._disk.flush_failure})"
            self._require_writable()

    def _require_open(self) -> None:
        if not self._open:
            raise StoreError("the store is closed")

    def _require_writable(self) -> None:
        self._require_open()
        if self._reason:
            raise StoreError(f"the store is read-only: {self._reason}")

    def _require_room(self, size: int) -> None:
        if self._disk.free() - self._unfinished_bytes < size:
            raise StoreFull("the simulated disk is full")


@dataclass(frozen=True, slots=True)
class _Examined:
    """A shard as it stood on the disk when it was opened."""

    header: ShardHeader
    generation: int
    _pieces: tuple[bytes, ...]

    def read(self, chunk: int) -> tuple[bytes, bytes]:
        """Return piece and checksum of a chunk."""
        if not 0 <= chunk < len(self._pieces):
            raise NoSuchShard(f"the shard has {len(self._pieces)} chunks, no chunk {chunk}")
        return self._pieces[chunk], self.header.checksums[chunk]


class _SimulatedWriter:
    """A large shard on its way in; a crash loses it."""

    def __init__(self, store: SimulatedStore) -> None:
        self._store = store
        self._pieces: list[bytes] = []
        self._size = 0
        self._usable = True

    def write(self, chunk: int, piece: Buffer) -> None:
        """Write the piece of the next chunk."""
        self._require_usable()
        if chunk != len(self._pieces):
            raise LocalProtocolError(f"piece {chunk} was written where {len(self._pieces)} was due")
        if self._size + len(piece) > CHUNK_SIZE * EXTENT_CHUNKS:
            raise InvalidRequest(f"a shard of more than {CHUNK_SIZE * EXTENT_CHUNKS} bytes")
        try:
            self._store.take_room(len(piece))
        except StoreFull:
            self.abort()
            raise
        self._pieces.append(bytes(piece))
        self._size += len(piece)

    def finish(self, header: ShardHeader, *, replacing: int = 0) -> int:
        """Keep the shard under its identity."""
        self._require_usable()
        check_written(header, [len(piece) for piece in self._pieces])
        self.abort()  # Its room is counted as the shard's from here on.
        return self._store.keep_large(header, self._pieces, replacing)

    def abort(self) -> None:
        """Forget the shard. Idempotent."""
        if self._usable:
            self._usable = False
            self._store.give_room(self._size)

    def _require_usable(self) -> None:
        if not self._usable:
            raise StoreError("this shard was finished or given up already")


def _flipped(data: bytes) -> bytes:
    """Return the bytes with the lowest bit of the middle one flipped."""
    middle = len(data) // 2
    return data[:middle] + bytes((data[middle] ^ 1,)) + data[middle + 1 :]
