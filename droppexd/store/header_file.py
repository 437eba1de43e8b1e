"""How a stored shard describes itself: the header block of a large one, the sealed header of a small one.

A large shard is one file:

    0      magic `droppexS`, format (2 bytes), length n of the payload (4 bytes), big-endian
    14     payload: msgpack of [header, generation], the header as `droppexd.schema.pack` gives it
    14+n   xxh3-128 over everything before
    ...    zeros up to 4096
    4096   the pieces, one after another

A small one has `xxh3-128 of the payload, payload` beside its piece in the database.
"""

import dataclasses
import struct

import msgpack
import xxhash

from droppexd.errors import IntegrityError, RemoteProtocolError, StoreError
from droppexd.model import MAX_NAME_BYTES, UNKNOWN_PLACE, ShardHeader
from droppexd.schema import pack, unpack

BLOCK_BYTES = 4096
FORMAT = 1

_MAGIC = b"droppexS"
_PREFIX = struct.Struct(">8sHI")
_DIGEST_BYTES = 16
_CHECKSUMS = [field.name for field in dataclasses.fields(ShardHeader)].index("checksums")


def encode_block(header: ShardHeader, generation: int) -> bytes:
    """Return the header block of a large shard, BLOCK_BYTES long."""
    payload = _payload(header, generation)
    block = _PREFIX.pack(_MAGIC, FORMAT, len(payload)) + payload
    return (block + xxhash.xxh3_128_digest(block)).ljust(BLOCK_BYTES, b"\0")


def decode_block(block: bytes) -> tuple[ShardHeader, int]:
    """Return header and generation. Raise IntegrityError when damaged, StoreError when too new."""
    if len(block) != BLOCK_BYTES:
        raise IntegrityError("the shard's file is shorter than its header")
    magic, version, length = _PREFIX.unpack_from(block)
    end = _PREFIX.size + length
    if magic != _MAGIC or end + _DIGEST_BYTES > BLOCK_BYTES:
        raise IntegrityError("the shard's header is damaged")
    if xxhash.xxh3_128_digest(block[:end]) != block[end : end + _DIGEST_BYTES]:
        raise IntegrityError("the shard's header is damaged")
    if version != FORMAT:
        raise StoreError(f"the shard has format {version}, and this release knows only {FORMAT}")
    return _parse(block[_PREFIX.size : end])


def seal(header: ShardHeader, generation: int) -> bytes:
    """Return the sealed header of a small shard."""
    payload = _payload(header, generation)
    return xxhash.xxh3_128_digest(payload) + payload


def unseal(sealed: bytes) -> ShardHeader:
    """Return the header of a small shard. Raise IntegrityError when damaged."""
    return _parse(_verified(sealed))[0]


def sealed_checksum(sealed: bytes) -> bytes:
    """Return the checksum of a small shard's only piece. Raise IntegrityError when damaged.

    This is on the path of every small read: the seal vouches for the fields, which are not checked again.
    """
    checksum: bytes = msgpack.unpackb(_verified(sealed))[0][_CHECKSUMS][0]
    return checksum


def _payload(header: ShardHeader, generation: int) -> bytes:
    # The name is a hint, bounded in characters where it comes from; the block has room for its bytes.
    if len(header.name) * 4 > MAX_NAME_BYTES:
        cut = header.name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        header = dataclasses.replace(header, name=cut)
    fields = pack(header)
    if header.place == UNKNOWN_PLACE:  # As a release that knew no places wrote it.
        fields = fields[:-1]
    payload: bytes = msgpack.packb([fields, generation])
    return payload


def _verified(sealed: bytes) -> bytes:
    payload = sealed[_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(payload) != sealed[:_DIGEST_BYTES]:
        raise IntegrityError("the shard's header is damaged")
    return payload


def _parse(payload: bytes) -> tuple[ShardHeader, int]:
    try:
        fields, generation = msgpack.unpackb(payload)
        return unpack(ShardHeader, fields), int(generation)
    except (ValueError, TypeError, msgpack.UnpackException, RemoteProtocolError) as error:
        raise IntegrityError(f"the shard's header is malformed: {error}") from error
