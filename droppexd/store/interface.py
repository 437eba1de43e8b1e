"""What a pool asks of its store. Every method may block: call it through `run_blocking`.

All methods may be called from several threads at once. They raise StoreError (StoreFull when that is
why), NoSuchShard, IntegrityError; and InvalidRequest for a header that does not describe the bytes beside
it. A store whose flush failed says why in `read_only` until it is opened anew, and refuses every later write
with StoreError; it goes on reading. A closed store refuses everything with StoreError.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from droppexd.errors import DroppexError
from droppexd.model import ExtentId, Holding, ShardHeader

Buffer = bytes | bytearray | memoryview


class Identity(NamedTuple):
    """Whose folder this is. Random 16 bytes each; empty where not known yet."""

    pool_id: bytes
    """Permanent."""
    cluster_id: bytes
    """Set once, by `join`; empty before."""
    boot_id: bytes
    """New for each start."""
    previous_boot_id: bytes
    """The one before; empty at the first start."""


class Usage(NamedTuple):
    """How full a store is, in bytes, and how many shards it holds."""

    capacity: int
    free: int
    """For shards."""
    shards: int
    spare: int
    """For the journal of the catalogue: a part of what stays free of shards, too."""


class ShardWriter(Protocol):
    """A large shard on its way in. Used by one task at a time; ends with `finish` or `abort`."""

    def write(self, chunk: int, piece: Buffer) -> None:
        """Write the piece of `chunk`; chunks come in order from 0, else LocalProtocolError.

        The piece is taken before it returns. When it raises StoreError, the shard is given up already.
        """
        ...

    def finish(self, header: ShardHeader, *, replacing: int = 0) -> int:
        """Make the shard durable under its identity and return its generation.

        When it returns, the shard survives power loss. The same bytes under an existing identity return
        the generation that is there; other bytes raise StoreError and change nothing. Is the instance that
        is there the generation `replacing`, a damaged one, the shard takes its place at once, whatever
        that one holds: after a crash there is one of the two.
        """
        ...

    def abort(self) -> None:
        """Forget the shard. Idempotent, also after `finish`."""
        ...


NOTE_BYTES = 256 * 1024
"""The most that is remembered of one subject."""


class StoredShard(Protocol):
    """A shard as it stands on the disk, opened by who verifies it. For one thread at a time; blocking."""

    @property
    def header(self) -> ShardHeader:
        """What the shard says of itself."""
        ...

    @property
    def generation(self) -> int:
        """Which stored instance this is."""
        ...

    def read(self, chunk: int) -> tuple[Buffer, bytes]:
        """Return piece and stored checksum of a chunk, unverified; raise as `ShardStore.read` does."""
        ...


class Examined(Protocol):
    """Where shards can be examined: a store, or the folder of a stopped pool."""

    def examine(self, extent: ExtentId, index: int) -> StoredShard:
        """Open a shard as it stands on the disk now, past what the store keeps in memory of it.

        Raise NoSuchShard, IntegrityError when its header is damaged or is that of another shard.
        """
        ...

    def find(self, extents: Sequence[ExtentId]) -> list[Holding]:
        """Return the shards that are held of these extents, in the order of `extents`, then of indices."""
        ...

    def page(self, after: tuple[ExtentId, int] | None, limit: int) -> list[Holding]:
        """Return a page of everything held, ordered by (extent, shard index), after that one.

        Damaged shards are listed too, so that they can be dropped by their generation.
        """
        ...


SmallShard = tuple[ShardHeader, bytes]
"""A shard of one piece of at most SMALL_SIZE bytes, and that piece."""


class ShardStore(Examined, Protocol):
    """Shards on one disk."""

    @property
    def identity(self) -> Identity:
        """Whose folder this is, and which start of it."""
        ...

    @property
    def read_only(self) -> str:
        """Why the store takes no more writes; empty while it does."""
        ...

    def distrust(self, what_happened: str) -> None:
        """Turn read-only: the disk did not keep what it said it had. The first reason stays."""
        ...

    def join(self, cluster_id: bytes) -> None:
        """Belong to this cluster for ever. Raise IdentityError when the folder belongs to another."""
        ...

    def begin(self, expected_size: int) -> ShardWriter:
        """Begin a large shard; `expected_size` is a hint, 0 when unknown."""
        ...

    def put_small(self, shards: Sequence[SmallShard]) -> list[int | DroppexError]:
        """Make small shards durable with one flush for all; return generation or error for each."""
        ...

    def read(self, extent: ExtentId, index: int, chunk: int) -> tuple[Buffer, bytes]:
        """Return the piece of a chunk and its stored checksum, unverified: the reader verifies.

        Raise NoSuchShard when the shard is not held or has no such chunk, IntegrityError when its header is
        damaged, or the piece is cut short or cannot be read.
        """
        ...

    def header(self, extent: ExtentId, index: int) -> ShardHeader:
        """Return what the shard says of itself; raise NoSuchShard, IntegrityError when it is damaged."""
        ...

    def drop(self, holdings: Sequence[Holding]) -> list[Holding]:
        """Remove these instances, durably; return those of them that are not held any more.

        An instance with another generation than the one named is left alone and not returned. Works on a
        full disk. When it raises, some may be gone: ask again.
        """
        ...

    def remember(self, subject: str, fields: Mapping[str, object]) -> None:
        """Replace what is remembered of a subject, durably: fields that JSON can hold, at most NOTE_BYTES.

        For what a task of the pool would only repeat if it were lost. A full disk raises StoreFull and
        changes nothing.
        """
        ...

    def recall(self, subject: str) -> Mapping[str, object] | None:
        """Return what `remember` was given last, also after a crash; None when nothing is remembered.

        Raise IntegrityError when that is damaged.
        """
        ...

    def usage(self) -> Usage:
        """Return how full the disk is. Cheap enough for every heartbeat."""
        ...

    def close(self) -> None:
        """Flush and unlock. Idempotent."""
        ...
