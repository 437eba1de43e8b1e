"""What every store checks of a shard before it takes it, pure."""

import json
from collections.abc import Mapping, Sequence

from droppexd.errors import IdentityError, InvalidRequest, LocalProtocolError, StoreError
from droppexd.model import SMALL_SIZE, ExtentId, ShardHeader, chunk_count
from droppexd.store.interface import NOTE_BYTES

ID_BYTES = 16
"""Length of the random ids of pools, starts and clusters."""

BOOT_SHIFT = 40
"""Generations are `number of the start << BOOT_SHIFT | counter`: never reused, and nothing to persist.

2**40 shards a start, 2**23 starts.
"""


def first_generation(boot_number: int) -> int:
    """Return the first generation of a start. Raise StoreError when there are no more."""
    if boot_number >> (63 - BOOT_SHIFT):
        raise StoreError(f"start number {boot_number} is more than a pool folder can count: replace the pool")
    return boot_number << BOOT_SHIFT | 1


def may_join(current: bytes, cluster_id: bytes, whose: str) -> bool:
    """Return whether a folder of the cluster `current` has yet to join `cluster_id`.

    Raise IdentityError when it belongs to another.
    """
    if len(cluster_id) != ID_BYTES:
        raise IdentityError(f"a cluster id has {ID_BYTES} bytes, not {len(cluster_id)}")
    if current and current != cluster_id:
        raise IdentityError(
            f"{whose} belongs to cluster {current.hex()}, not to {cluster_id.hex()}: "
            "give the pool another folder, or point it at its own cluster"
        )
    return not current


def check_note(subject: str, fields: Mapping[str, object]) -> None:
    """Raise LocalProtocolError unless this may be remembered."""
    if not subject.isalpha() or subject in ("pool", "boot"):
        raise LocalProtocolError(f"{subject!r} is not a subject that a store remembers")
    if len(json.dumps(fields)) > NOTE_BYTES:
        raise LocalProtocolError(f"more than {NOTE_BYTES} bytes to be remembered of the {subject}")


def check_written(header: ShardHeader, lengths: Sequence[int]) -> None:
    """Raise InvalidRequest unless `header` describes pieces of these lengths."""
    chunks = chunk_count(header.size, header.chunk_size)
    if chunks != len(header.checksums):
        raise InvalidRequest(f"a shard of {chunks} chunks with {len(header.checksums)} checksums")
    if chunks != len(lengths):
        raise InvalidRequest(f"a shard of {chunks} chunks for which {len(lengths)} pieces were written")
    for chunk, length in enumerate(lengths):
        expected = header.piece_range(chunk)[1]
        if length != expected:
            raise InvalidRequest(f"piece {chunk} has {length} bytes; the header says {expected}")


def check_small(header: ShardHeader, piece: bytes) -> None:
    """Raise InvalidRequest unless this is a shard of one small piece."""
    if len(piece) > SMALL_SIZE:
        raise InvalidRequest(f"a small shard of {len(piece)} bytes; at most {SMALL_SIZE} are allowed")
    check_written(header, (len(piece),))


def same_bytes(one: ShardHeader, other: ShardHeader) -> bool:
    """Whether two headers of one identity describe the same bytes; hints may differ."""
    return (
        one.checksums == other.checksums
        and one.size == other.size
        and one.chunk_size == other.chunk_size
        and one.layout == other.layout
    )


def other_bytes(extent: ExtentId, index: int) -> StoreError:
    """Return the error for other bytes under an identity that is held."""
    return StoreError(f"shard {index} of extent {extent} is held already, with other bytes")
