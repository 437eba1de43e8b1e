"""What a pool holds, packed: the keys of shards, as stores index them, and the body of a `Reconcile`.

A comparison goes through all that a pool holds, and nearly all of it is as the records say. As records of
`schema.py` each shard would cost three objects and their checks at both ends; packed it costs a slice.
"""

import struct
from collections.abc import Iterable
from itertools import pairwise

from droppexd.errors import InvalidRequest
from droppexd.model import MAX_K, MAX_M, ExtentId, Holding

SESSION_BYTES = 6
"""Of the session of an extent id, with which it begins."""
ID_BYTES = 12
"""Of a packed extent id, with which a key begins."""
KEY_BYTES = ID_BYTES + 1
HELD_BYTES = KEY_BYTES + 8
"""Extent id, index of the shard, generation."""

Held = dict[bytes, int]
"""The generations of shards by their keys (extent id and index), in order."""

_PACKED = struct.Struct(">HIHIBQ")
_READ = struct.Struct(f">{KEY_BYTES}sQ")
_LAST_SHARD = MAX_K + MAX_M - 1


def pack_held(holdings: Iterable[Holding]) -> bytes:
    """Return the bytes of holdings."""
    pack = _PACKED.pack
    return b"".join(
        [
            pack(session >> 32, session & 0xFFFFFFFF, counter >> 32, counter & 0xFFFFFFFF, shard, generation)
            for (session, counter), shard, generation in holdings
        ]
    )


def unpack_held(packed: bytes, after: ExtentId | None) -> Held:
    """Return what `pack_held` packed. Raise InvalidRequest unless it is in order, and behind `after`."""
    if len(packed) % HELD_BYTES:
        raise InvalidRequest(f"{len(packed)} bytes of holdings, of which each has {HELD_BYTES}")
    keys_and_generations = list(_READ.iter_unpack(packed))
    held = dict(keys_and_generations)
    if not held:
        return held
    if max(packed[ID_BYTES::HELD_BYTES]) > _LAST_SHARD:
        raise InvalidRequest(f"a holding of a shard beyond {_LAST_SHARD}")
    if max(held.values()) >= 2**63:
        raise InvalidRequest("a holding with a generation beyond 2^63-1")
    if any(one >= other for (one, _), (other, _) in pairwise(keys_and_generations)):
        raise InvalidRequest("holdings come in the order of their extents and shards, each once")
    if after is not None and packed[:ID_BYTES] <= after.to_bytes():
        raise InvalidRequest("holdings lie behind `after`")
    return held


def shard_key(extent: ExtentId, index: int) -> bytes:
    """Return KEY_BYTES that sort by (extent, index)."""
    return extent.to_bytes() + bytes((index,))


def holding_of(key: bytes, generation: int) -> Holding:
    """Return the holding that a key and its generation stand for."""
    return Holding(ExtentId.from_bytes(key[:ID_BYTES]), key[ID_BYTES], generation)
