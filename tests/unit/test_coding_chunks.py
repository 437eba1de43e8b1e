"""Chunks to pieces and back, and what a checksum covers."""

import random

import pytest
from xxhash import xxh3_128_digest

from droppexd.coding import EncodedChunk, chunk_checksum, encode_chunk, piece_checksum, rebuild_pieces
from droppexd.errors import IntegrityError, InvalidRequest, NotEnoughShards
from droppexd.model import ExtentId, Layout

EXTENT = ExtentId(0x1234, 0x56789A)
LAYOUT = Layout(4, 2)


def test_data_pieces_are_views_of_the_data():
    data = bytearray(random.Random(1).randbytes(4000))
    pieces = encode_chunk(EXTENT, LAYOUT, 0, data).pieces
    assert b"".join(pieces[:4]) == data
    data[0] ^= 255
    data[3999] ^= 255
    assert b"".join(pieces[:4]) == data


def test_only_the_last_data_piece_is_padded_and_a_copy():
    data = bytes(range(1, 11))
    pieces = encode_chunk(EXTENT, LAYOUT, 0, data).pieces
    assert [bytes(piece) for piece in pieces[:4]] == [b"\1\2\3", b"\4\5\6", b"\7\x08\x09", b"\x0a\0\0"]
    assert all(piece.obj is data for piece in pieces[:3])
    assert all(len(piece) == 3 for piece in pieces)


def test_pieces_beyond_a_very_short_chunk_are_padding():
    assert [bytes(p) for p in encode_chunk(EXTENT, Layout(4, 0), 0, b"12345").pieces] == [
        b"12",
        b"34",
        b"5\0",
        b"\0\0",
    ]
    assert [bytes(p) for p in encode_chunk(EXTENT, Layout(4, 0), 0, b"1").pieces] == [
        b"1",
        b"\0",
        b"\0",
        b"\0",
    ]


def test_an_empty_chunk_has_empty_pieces():
    assert [bytes(piece) for piece in encode_chunk(EXTENT, LAYOUT, 0, b"").pieces] == [b""] * 6


def test_copies_carry_reedsolos_multiples():
    pieces = encode_chunk(EXTENT, Layout(1, 2), 0, b"\1\2\x80").pieces
    assert [bytes(piece) for piece in pieces] == [b"\1\2\x80", b"\3\6\x9d", b"\2\4\x1d"]


def test_a_chunk_of_other_items_than_bytes_is_its_bytes():
    data = random.Random(2).randbytes(64)
    assert encode_chunk(EXTENT, LAYOUT, 0, memoryview(data).cast("I")) == encode_chunk(
        EXTENT, LAYOUT, 0, data
    )


def test_a_chunk_that_is_not_contiguous_is_refused():
    with pytest.raises(InvalidRequest, match="not contiguous"):
        encode_chunk(EXTENT, LAYOUT, 0, memoryview(bytes(64))[::2])


def test_a_layout_out_of_bounds_is_refused():
    with pytest.raises(InvalidRequest):
        encode_chunk(EXTENT, Layout(0, 1), 0, b"data")


def test_the_checksum_of_stored_data_never_changes():
    identity = bytes.fromhex("0000000000001234000000000056789a 0402 05 00 00000007 00000005")
    assert piece_checksum(EXTENT, LAYOUT, 5, 7, b"piece") == xxh3_128_digest(identity + b"piece")
    assert piece_checksum(EXTENT, LAYOUT, 5, 7, b"piece").hex() == "a0221d432a062702cf2c4576422eb0e0"


def test_each_piece_has_the_checksum_of_its_place():
    encoded = encode_chunk(EXTENT, LAYOUT, 9, random.Random(3).randbytes(4000))
    assert isinstance(encoded, EncodedChunk)
    assert encoded.checksums == tuple(
        piece_checksum(EXTENT, LAYOUT, shard, 9, bytes(piece)) for shard, piece in enumerate(encoded.pieces)
    )


def test_a_checksum_differs_when_anything_it_covers_differs():
    piece = bytes(range(100))
    checksums = [
        piece_checksum(EXTENT, LAYOUT, 1, 2, piece),
        piece_checksum(ExtentId(EXTENT.session + 1, EXTENT.counter), LAYOUT, 1, 2, piece),
        piece_checksum(ExtentId(EXTENT.session, EXTENT.counter + 1), LAYOUT, 1, 2, piece),
        piece_checksum(ExtentId(EXTENT.counter, EXTENT.session), LAYOUT, 1, 2, piece),
        piece_checksum(EXTENT, Layout(3, 2), 1, 2, piece),
        piece_checksum(EXTENT, Layout(4, 3), 1, 2, piece),
        piece_checksum(EXTENT, LAYOUT, 2, 2, piece),
        piece_checksum(EXTENT, LAYOUT, 1, 3, piece),
        piece_checksum(EXTENT, LAYOUT, 2, 1, piece),
        piece_checksum(EXTENT, LAYOUT, 1, 2, piece[:-1]),
        piece_checksum(EXTENT, LAYOUT, 1, 2, piece + b"\0"),
    ]
    for bit in range(800):
        flipped = bytearray(piece)
        flipped[bit // 8] ^= 1 << bit % 8
        checksums.append(piece_checksum(EXTENT, LAYOUT, 1, 2, flipped))
    assert len(set(checksums)) == len(checksums)
    assert {len(checksum) for checksum in checksums} == {16}


def test_the_checksum_counts_bytes_not_items():
    piece = bytes(range(64))
    words = memoryview(piece).cast("I")
    assert piece_checksum(EXTENT, LAYOUT, 0, 0, words) == piece_checksum(EXTENT, LAYOUT, 0, 0, piece)


def test_wanted_pieces_that_are_there_come_back_as_they_are():
    pieces = {5: b"parity", 0: memoryview(b"data 0")}
    assert rebuild_pieces(LAYOUT, pieces, [0, 5]) == pieces
    assert rebuild_pieces(LAYOUT, pieces, [0])[0] is pieces[0]
    assert rebuild_pieces(LAYOUT, {}, []) == {}


def test_lost_data_and_parity_are_rebuilt_together():
    encoded = encode_chunk(EXTENT, LAYOUT, 0, random.Random(4).randbytes(4001))
    everything = dict(enumerate(encoded.pieces))
    kept = {index: everything[index] for index in (5, 3, 2, 0)}
    assert rebuild_pieces(LAYOUT, kept, [4, 1]) == {4: everything[4], 1: bytes(everything[1])}


def test_too_few_pieces_give_no_bytes():
    with pytest.raises(NotEnoughShards, match="3 of 6 shards"):
        rebuild_pieces(LAYOUT, dict.fromkeys((0, 1, 5), b"piece"), [2])


def test_pieces_of_different_lengths_are_not_mixed():
    pieces = {0: b"12", 1: b"12", 2: b"123", 4: b"12"}
    with pytest.raises(IntegrityError, match="shard 2: 3"):
        rebuild_pieces(LAYOUT, pieces, [3])


def test_a_wanted_shard_outside_the_layout_is_refused():
    with pytest.raises(InvalidRequest, match="shard 6"):
        rebuild_pieces(LAYOUT, dict.fromkeys(range(4), b"piece"), [6])


def test_a_chunk_has_another_checksum_in_another_place():
    assert chunk_checksum(0, b"droppex").hex() == "ac31b57839f6dba9d34531c4f8067726"
    assert chunk_checksum(1, b"droppex").hex() == "9432781923a65b4c14528927702e3f49"
