"""The header block of large shards and the sealed header of small ones."""

import dataclasses
import hashlib

import pytest

from droppexd.errors import IntegrityError
from droppexd.model import (
    CHUNK_SIZE,
    EXTENT_CHUNKS,
    MAX_EXTENTS,
    MAX_K,
    MAX_M,
    MAX_NAME_BYTES,
    ExtentId,
    Layout,
    ShardHeader,
    VersionId,
)
from droppexd.store.header_file import (
    BLOCK_BYTES,
    decode_block,
    encode_block,
    seal,
    sealed_checksum,
    unseal,
)

SMALLEST = ShardHeader(
    incarnation=b"i" * 16,
    extent=ExtentId(1, 2),
    index=0,
    layout=Layout(1, 0),
    size=1,
    chunk_size=1,
    checksums=(b"c" * 16,),
    version=VersionId(3, 4),
)
LARGEST = ShardHeader(
    incarnation=b"\xff" * 16,
    extent=ExtentId(2**48 - 1, 2**48 - 1),
    index=MAX_K + MAX_M - 1,
    layout=Layout(MAX_K, MAX_M),
    size=CHUNK_SIZE * EXTENT_CHUNKS,
    chunk_size=CHUNK_SIZE,
    checksums=(b"\xff" * 16,) * EXTENT_CHUNKS,
    version=VersionId(2**48 - 1, 2**48 - 1),
    name="n" * MAX_NAME_BYTES,
)


PLACED = dataclasses.replace(LARGEST, place=MAX_EXTENTS - 1)


@pytest.mark.parametrize("header", [SMALLEST, LARGEST, PLACED], ids=["smallest", "largest", "placed"])
def test_a_header_comes_back_from_its_block_and_from_its_seal(header):
    block = encode_block(header, 2**63 - 1)
    assert len(block) == BLOCK_BYTES
    assert decode_block(block) == (header, 2**63 - 1)
    sealed = seal(header, 5)
    assert unseal(sealed) == header
    assert sealed_checksum(sealed) == header.checksums[0]


def test_the_format_of_the_block_does_not_change():
    """Folders that exist must stay readable: a change of this digest needs a new format number."""
    digest = hashlib.sha256(encode_block(LARGEST, 1 << 40 | 1)).hexdigest()
    assert digest == "fc49aeca3cfe1867833531177e6f48ef1c043ba88af041adf7d076e1bd17e680"
    digest = hashlib.sha256(encode_block(PLACED, 1 << 40 | 1)).hexdigest()
    assert digest == "9a21b066918de36d19fde21795c9dd29a078cab8ad0de6ef7bf7786e631d0b69"


def test_a_name_too_long_in_bytes_is_cut_between_characters():
    header = dataclasses.replace(LARGEST, name="a" + "\N{SNOWMAN}" * (MAX_NAME_BYTES - 1))
    name = decode_block(encode_block(header, 1))[0].name
    assert header.name.startswith(name)
    assert MAX_NAME_BYTES - 3 < len(name.encode()) <= MAX_NAME_BYTES


def test_every_flipped_byte_that_means_something_is_found():
    block = encode_block(SMALLEST, 1)
    used = len(block.rstrip(b"\0"))
    for position in range(used):
        damaged = bytearray(block)
        damaged[position] ^= 0x10
        with pytest.raises(IntegrityError):
            decode_block(bytes(damaged))
    sealed = seal(SMALLEST, 1)
    for position in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[position] ^= 0x10
        for reader in (unseal, sealed_checksum):
            with pytest.raises(IntegrityError):
                reader(bytes(damaged))


@pytest.mark.parametrize("block", [b"", bytes(10), bytes(BLOCK_BYTES), b"\xff" * BLOCK_BYTES])
def test_what_is_no_block_is_an_integrity_error(block):
    with pytest.raises(IntegrityError):
        decode_block(block)
