"""Chunks to pieces with checksums, and pieces to lost pieces. Pure, blocking, safe to call from threads.

A chunk is cut into k data pieces of equal length (`model.piece_size`), the end padded with zeros; m parity
pieces follow. Shard i of an extent holds the i-th pieces of its chunks.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3
from xxhash import xxh3_128, xxh3_128_digest

from droppexd.coding.code import parity_matrix, rebuild_matrix
from droppexd.coding.kernels import Buffer, best_kernel, flat_view
from droppexd.errors import IntegrityError
from droppexd.model import ExtentId, Layout, piece_size

_IDENTITY = struct.Struct(">QQBBBxII")


class EncodedChunk(NamedTuple):
    """The k+m pieces of a chunk in the order of the shards, and the checksum of each."""

    pieces: tuple[Buffer, ...]
    checksums: tuple[bytes, ...]


def encode_chunk(extent: ExtentId, layout: Layout, chunk: int, data: Buffer) -> EncodedChunk:
    """Return the pieces and checksums of one chunk of an extent.

    Data pieces are views of `data`, which must not change while they are in use; only padded ones are
    copies. Parity pieces are new buffers.
    """
    matrix = parity_matrix(layout)
    view = flat_view(data)
    k = layout.k
    size = len(view)
    length = piece_size(size, k)
    pieces: list[Buffer] = [view[start : start + length] for start in range(0, size, length or 1)]
    if size < k * length:
        pieces[-1] = bytes(pieces[-1]).ljust(length, b"\0")
        # 5 bytes in 4 pieces of 2: the fourth is padding altogether.
        pieces.extend(bytes(length) for _ in range(k - len(pieces)))
    elif not size:
        pieces = [view] * k
    pieces.extend(best_kernel().apply(matrix, pieces))
    checksums = [piece_checksum(extent, layout, shard, chunk, piece) for shard, piece in enumerate(pieces)]
    return EncodedChunk(tuple(pieces), tuple(checksums))


def chunk_checksum(number: int, data: Buffer) -> bytes:
    """Return the 16 bytes that a chunk is verified against on its way from client to app.

    It is the canonical xxh3-128 of the chunk; the seed is its number in the file, from 0.
    """
    return xxh3_128_digest(data, seed=number)


def extent_digest(checksums: Sequence[bytes]) -> bytes:
    """Return the 32 bytes by which a source is compared with an extent that was stored before.

    It is the BLAKE3 of the chunk checksums (`chunk_checksum`) of the extent, one after another.
    """
    return blake3(b"".join(checksums)).digest()


def piece_checksum(extent: ExtentId, layout: Layout, shard: int, chunk: int, piece: Buffer) -> bytes:
    """Return the 16 bytes that a piece is verified against: wrong bytes and wrong places both show.

    It is the canonical xxh3-128, seed 0, of the identity and then the piece. The identity is 28 bytes,
    big-endian: session u64, counter u64, k u8, m u8, shard u8, zero u8, chunk u32, length of the piece u32.
    """
    length = piece.nbytes if isinstance(piece, memoryview) else len(piece)
    state = xxh3_128(_IDENTITY.pack(*extent, *layout, shard, chunk, length))
    state.update(piece)
    return state.digest()


def rebuild_pieces(layout: Layout, pieces: Mapping[int, Buffer], wanted: Sequence[int]) -> dict[int, Buffer]:
    """Return the wanted pieces of a chunk, by shard index, from any k of its pieces.

    `pieces` must have been verified; a wanted one among them is returned as it is. Raise NotEnoughShards
    when fewer than k are given and one is to be rebuilt, IntegrityError when their lengths differ,
    InvalidRequest when a shard is not one of the layout.
    """
    lost = tuple(index for index in wanted if index not in pieces)
    rebuilt: dict[int, Buffer] = {}
    if lost:
        present = tuple(sorted(pieces))
        matrix = rebuild_matrix(layout, present, lost)
        sources = [flat_view(pieces[index]) for index in present[: layout.k]]
        if any(len(source) != len(sources[0]) for source in sources):
            lengths = ", ".join(f"shard {i}: {len(s)}" for i, s in zip(present, sources, strict=False))
            raise IntegrityError(f"the pieces of a chunk differ in length ({lengths})")
        rebuilt = dict(zip(lost, best_kernel().apply(matrix, sources), strict=True))
    return {index: pieces[index] if index in pieces else rebuilt[index] for index in wanted}
