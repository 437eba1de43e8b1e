"""The catalogue's values: msgpack lists that begin with the version of their format.

Ids that stand in the key are not repeated. Values are written by hand and not through `droppexd.schema`:
they come from our own disk, are read on every look-up, and each byte is paid for ten million times.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from droppexd import schema
from droppexd.errors import CatalogError, DroppexError, from_wire
from droppexd.model import (
    ControllerRecord,
    Extent,
    ExtentId,
    FileEntry,
    Layout,
    MemberRecord,
    PoolRecord,
    TokenRecord,
    UploadRecord,
    Version,
    VersionId,
)

FORMAT = 1


class Name(NamedTuple):
    """What a name points at, and what a listing shows of it."""

    version: VersionId
    size: int
    created_ms: int


class StoredExtent(NamedTuple):
    """An extent and the version it belongs to."""

    extent: Extent
    version: VersionId


class Garbage(NamedTuple):
    """A dead extent: the epoch it died in, and the pools that must still confirm that they dropped it."""

    epoch: int
    pools: tuple[int, ...]


class SessionRecord(NamedTuple):
    """A session: `floor` is the lowest counter that the app may still use."""

    open: bool
    floor: int
    address: str
    boot_id: bytes


class Totals(NamedTuple):
    """Sums over the whole catalogue, kept by every transaction.

    `files` counts names, `size` the bytes of versions (a copied name adds none), `garbage` dead extents that
    some pool has not confirmed, `empty_files` the names of versions without extents.
    """

    files: int = 0
    size: int = 0
    extents: int = 0
    garbage: int = 0
    empty_files: int = 0


class Placed(NamedTuple):
    """What a commit came to: the part of its receipt that a repeated request does not bring along."""

    version: VersionId
    survives_pools: int | None
    survives_machines: int | None
    replaced: bool


class Taken(NamedTuple):
    """What an adoption came to: the name that was free, and what the version survives."""

    name: str
    version: VersionId
    survives_pools: int
    survives_machines: int


Decided = VersionId | Placed | Taken
"""What an operation that was carried out came to."""

Outcome = Decided | DroppexError
"""What an operation came to. An error here is an answer like another, and is remembered as one."""


def _read(value: bytes, what: str) -> list[Any]:
    try:
        raw: list[Any] = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException) as error:
        raise CatalogError(f"a damaged {what} record in the catalogue; restore a copy of it") from error
    if raw[0] != FORMAT:
        raise CatalogError(
            f"a {what} record of format {raw[0]} in the catalogue; this release reads {FORMAT}: "
            "run the release that wrote it"
        )
    return raw


def pack_name(name: Name) -> bytes:
    """Return the value of a name."""
    version, size, created_ms = name
    packed: bytes = msgpack.packb((FORMAT, version[0], version[1], size, created_ms))
    return packed


def unpack_name(value: bytes) -> Name:
    """Return the record of a name."""
    _, session, counter, size, created_ms = _read(value, "name")
    return Name(VersionId(session, counter), size, created_ms)


def file_entry(name: str, value: bytes) -> FileEntry:
    """Return a line of a listing straight from a name's value."""
    _, session, counter, size, created_ms = _read(value, "name")
    return FileEntry(name=name, size=size, created_ms=created_ms, version=VersionId(session, counter))


def pack_version(version: Version) -> bytes:
    """Return the value of a version. Extents of its own session are written as their counters."""
    session = version.id.session
    extents = [extent[1] if extent[0] == session else extent for extent in version.extents]
    raw: list[Any] = [FORMAT, version.size, version.blake3, version.names, version.created_ms, extents]
    if version.metadata:
        raw.append(version.metadata)
    packed: bytes = msgpack.packb(raw)
    return packed


def unpack_version(version: VersionId, value: bytes) -> Version:
    """Return the record of a version."""
    raw = _read(value, "version")
    session = version.session
    return Version(
        id=version,
        size=raw[1],
        blake3=raw[2],
        names=raw[3],
        created_ms=raw[4],
        extents=tuple(
            [ExtentId(session, one) if type(one) is int else ExtentId(one[0], one[1]) for one in raw[5]]
        ),
        metadata=tuple([tuple(pair) for pair in raw[6]]) if len(raw) > 6 else (),
    )


_POOLS = 7
"""Where the pools begin in the value of an extent; the edition stands before them."""


def pack_extent(extent: Extent, version: VersionId) -> bytes:
    """Return the value of an extent; a version of its own session is written as a distance."""
    owner = extent.id.counter - version.counter if extent.id.session == version.session else version
    packed: bytes = msgpack.packb(
        (
            FORMAT,
            owner,
            extent.layout.k,
            extent.layout.m,
            extent.size,
            extent.chunk_size,
            extent.edition,
            *extent.pools,
        )
    )
    return packed


def unpack_extent(extent: ExtentId, value: bytes) -> StoredExtent:
    """Return the record of an extent and its version."""
    raw = _read(value, "extent")
    _, owner, k, m, size, chunk_size, edition, *pools = raw
    version = VersionId(extent.session, extent.counter - owner) if type(owner) is int else VersionId(*owner)
    record = Extent(
        id=extent, layout=Layout(k, m), size=size, chunk_size=chunk_size, edition=edition, pools=tuple(pools)
    )
    return StoredExtent(record, version)


def shard_on(value: bytes, pool: int) -> tuple[int, int] | None:
    """Return which shard a pool has by the value of an extent, and the edition; None when it has none.

    A comparison asks this of every record, most of which say nothing that is news: nothing else is unpacked.
    """
    raw = _read(value, "extent")
    if pool not in raw[_POOLS:]:
        return None
    return raw.index(pool, _POOLS) - _POOLS, raw[_POOLS - 1]


def pack_garbage(garbage: Garbage) -> bytes:
    """Return the value of a dead extent."""
    packed: bytes = msgpack.packb((FORMAT, garbage.epoch, *garbage.pools))
    return packed


def unpack_garbage(value: bytes) -> Garbage:
    """Return the record of a dead extent."""
    _, epoch, *pools = _read(value, "garbage")
    return Garbage(epoch, tuple(pools))


def pack_pool(pool: PoolRecord) -> bytes:
    """Return the value of a pool."""
    packed: bytes = msgpack.packb([FORMAT, *schema.pack(pool)])
    return packed


def unpack_pool(value: bytes) -> PoolRecord:
    """Return the record of a pool."""
    return schema.unpack(PoolRecord, _read(value, "pool")[1:])


def pack_controller(controller: ControllerRecord) -> bytes:
    """Return the value of a controller."""
    packed: bytes = msgpack.packb([FORMAT, *schema.pack(controller)])
    return packed


def unpack_controller(value: bytes) -> ControllerRecord:
    """Return the record of a controller."""
    return schema.unpack(ControllerRecord, _read(value, "controller")[1:])


def pack_member(member: MemberRecord) -> bytes:
    """Return the value of a member; its key is not repeated."""
    packed: bytes = msgpack.packb([FORMAT, *schema.pack(member)[1:]])
    return packed


def unpack_member(public: bytes, value: bytes) -> MemberRecord:
    """Return the record of a member."""
    return schema.unpack(MemberRecord, [public, *_read(value, "member")[1:]])


def pack_token(token: TokenRecord) -> bytes:
    """Return the value of a join token; its key is not repeated."""
    packed: bytes = msgpack.packb([FORMAT, *schema.pack(token)[1:]])
    return packed


def unpack_token(public: bytes, value: bytes) -> TokenRecord:
    """Return the record of a join token."""
    return schema.unpack(TokenRecord, [public, *_read(value, "token")[1:]])


def pack_upload(upload: UploadRecord) -> bytes:
    """Return the value of an upload; its key is not repeated."""
    packed: bytes = msgpack.packb([FORMAT, *schema.pack(upload)[1:]])
    return packed


def unpack_upload(version: VersionId, value: bytes) -> UploadRecord:
    """Return the record of an upload."""
    return schema.unpack(UploadRecord, [tuple(version), *_read(value, "upload")[1:]])


def pack_fields(record: Sequence[Any]) -> bytes:
    """Return the value of a record that is a few fields: a session, the totals, the term."""
    packed: bytes = msgpack.packb((FORMAT, *record))
    return packed


def unpack_session(value: bytes) -> SessionRecord:
    """Return the record of a session."""
    return SessionRecord(*_read(value, "session")[1:])


def unpack_totals(value: bytes) -> Totals:
    """Return the totals."""
    return Totals(*_read(value, "totals")[1:])


def unpack_fields(value: bytes, what: str) -> list[Any]:
    """Return the fields of a small record."""
    return _read(value, what)[1:]


_CHANGED, _PLACED, _REFUSED, _TAKEN = range(4)


def pack_outcome(outcome: Outcome) -> bytes:
    """Return the value of an operation's outcome."""
    if isinstance(outcome, Placed):
        raw: tuple[Any, ...] = (FORMAT, _PLACED, *outcome.version, *outcome[1:])
    elif isinstance(outcome, Taken):
        raw = (FORMAT, _TAKEN, *outcome.version, outcome.name, *outcome[2:])
    elif isinstance(outcome, DroppexError):
        raw = (FORMAT, _REFUSED, outcome.code, str(outcome), outcome.details)
    else:
        raw = (FORMAT, _CHANGED, *outcome)
    packed: bytes = msgpack.packb(raw)
    return packed


def unpack_outcome(value: bytes) -> Outcome:
    """Return the outcome of an operation."""
    _, kind, *fields = _read(value, "outcome")
    if kind == _PLACED:
        session, counter, survives_pools, survives_machines, replaced = fields
        return Placed(VersionId(session, counter), survives_pools, survives_machines, replaced)
    if kind == _REFUSED:
        return from_wire(*fields)
    if kind == _TAKEN:
        session, counter, name, survives_pools, survives_machines = fields
        return Taken(name, VersionId(session, counter), survives_pools, survives_machines)
    return VersionId(*fields)
