"""Names keep every rule, ids sort as their bytes do, and sizes agree with cutting by hand."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from droppexd.errors import InvalidName
from droppexd.model import (
    EXTENT_CHUNKS,
    MAX_K,
    MAX_M,
    MAX_NAME_BYTES,
    ExtentId,
    Layout,
    ShardHeader,
    VersionId,
    chunk_count,
    chunk_length,
    normal_name,
    piece_size,
    shard_size,
)

relaxed = settings(deadline=None, max_examples=200)
counters = st.integers(0, 2**48 - 1) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**48 - 1])
ids = st.builds(ExtentId, counters, counters)
texts = st.text(st.sampled_from(["a", "/", ".", "\0", "é", "🙂", "\n", "-", " ", "\udc80"]), max_size=12)


@relaxed
@given(texts | st.text(max_size=30))
@example("x" * (MAX_NAME_BYTES - 6))
@example("x" * (MAX_NAME_BYTES - 5))
def test_a_name_is_kept_or_refused_by_the_rules(name):
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        encoded = None
    full = name if "/" in name else f"files/{name}"
    parts = full.split("/")
    allowed = (
        encoded
        and "\0" not in name
        and all(part not in ("", ".", "..") for part in parts)
        and len(full.encode()) <= MAX_NAME_BYTES
    )
    if not allowed:
        with pytest.raises(InvalidName):
            normal_name(name)
    else:
        assert normal_name(name) == full
        assert normal_name(full) == full


@relaxed
@given(ids, ids)
def test_ids_sort_as_their_bytes_do(one, other):
    assert (one < other) == (one.to_bytes() < other.to_bytes())
    assert (one == other) == (one.to_bytes() == other.to_bytes())


@relaxed
@given(ids)
def test_an_id_comes_back_from_its_bytes(one):
    assert len(one.to_bytes()) == 12
    assert ExtentId.from_bytes(one.to_bytes()) == one


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


@relaxed
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, MAX_K), st.integers(0, MAX_M))
def test_sizes_agree_with_cutting_by_hand(size, chunk_size, k, m):
    if chunk_count(size, chunk_size) > EXTENT_CHUNKS:
        chunk_size = -(-size // EXTENT_CHUNKS)
    chunks = cut(bytes(size), chunk_size)
    assert chunk_count(size, chunk_size) == len(chunks)
    assert [chunk_length(size, chunk_size, number) for number in range(len(chunks))] == list(map(len, chunks))
    pieces = []
    for chunk in chunks:
        length = piece_size(len(chunk), k)
        assert length * k >= len(chunk) > (length - 1) * k
        pieces.append(length)
    assert shard_size(size, chunk_size, k) == sum(pieces)
    header = ShardHeader(
        incarnation=bytes(16),
        extent=ExtentId(1, 1),
        index=0,
        layout=Layout(k, m),
        size=size,
        chunk_size=chunk_size,
        checksums=(bytes(16),) * len(chunks),
        version=VersionId(1, 2),
    )
    assert header.stored_size == sum(pieces)
    ranges = [header.piece_range(number) for number in range(len(chunks))]
    assert ranges == [(sum(pieces[:number]), length) for number, length in enumerate(pieces)]


@relaxed
@given(st.integers(1, MAX_K), st.integers(0, MAX_M))
def test_a_layout_is_read_as_it_is_written(k, m):
    assert Layout.parse(str(Layout(k, m))) == Layout(k, m)
