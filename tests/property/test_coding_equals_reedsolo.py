"""Every kernel and every rebuild gives reedsolo's bytes: for any layout, any length, any losses."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reedsolo import RSCodec

from droppexd.coding import (
    available_kernels,
    encode_chunk,
    parity_matrix,
    rebuild_matrix,
    rebuild_pieces,
)
from droppexd.errors import NotEnoughShards
from droppexd.model import MAX_K, MAX_M, ExtentId, Layout

KERNELS = available_kernels()
EXTENT = ExtentId(3, 4)

layouts = st.builds(Layout, st.integers(1, MAX_K), st.integers(0, MAX_M))
lengths = st.one_of(st.sampled_from([0, 1, 2, 15, 31, 63, 64, 65, 127]), st.integers(0, 300))
relaxed = settings(deadline=None, max_examples=200)


def random_pieces(layout, length, seed):
    source = random.Random(seed)
    return [source.randbytes(length) for _ in range(layout.k)]


def reedsolo_shards(layout, pieces):
    """All k+m pieces, by handing reedsolo the columns one after another."""
    columns = bytes(itertools.chain.from_iterable(zip(*pieces, strict=True)))
    coded = bytes(RSCodec(layout.m, nsize=layout.total).encode(columns))
    return [coded[index :: layout.total] for index in range(layout.total)]


def assert_rebuilds(layout, shards, present):
    """Every shard, lost or not, comes back from these, with every kernel."""
    everything = tuple(range(layout.total))
    matrix = rebuild_matrix(layout, tuple(present), everything)
    sources = [shards[index] for index in sorted(present)[: layout.k]]
    for kernel in KERNELS:
        assert kernel.apply(matrix, sources) == shards
    given_pieces = {index: shards[index] for index in present}
    assert rebuild_pieces(layout, given_pieces, everything) == dict(enumerate(shards))


@relaxed
@given(layouts, lengths, st.integers())
def test_every_kernel_makes_the_parity_that_reedsolo_makes(layout, length, seed):
    pieces = random_pieces(layout, length, seed)
    expected = reedsolo_shards(layout, pieces)[layout.k :]
    for kernel in KERNELS:
        assert kernel.apply(parity_matrix(layout), pieces) == expected


@relaxed
@given(layouts, st.binary(max_size=400))
def test_an_encoded_chunk_is_the_padded_data_and_reedsolos_parity(layout, data):
    encoded = encode_chunk(EXTENT, layout, 0, data)
    length = -(-len(data) // layout.k)
    padded = data.ljust(length * layout.k, b"\0")
    pieces = [padded[index * length : (index + 1) * length] for index in range(layout.k)]
    assert [bytes(piece) for piece in encoded.pieces] == reedsolo_shards(layout, pieces)
    assert len(encoded.checksums) == layout.total


@relaxed
@given(layouts, lengths, st.integers(), st.data())
def test_any_k_shards_give_back_all_of_them(layout, length, seed, data):
    shards = reedsolo_shards(layout, random_pieces(layout, length, seed))
    order = data.draw(st.permutations(range(layout.total)))
    count = data.draw(st.integers(layout.k, layout.total))
    assert_rebuilds(layout, shards, order[:count])


@pytest.mark.parametrize("lost", range(3))
def test_every_erasure_pattern_of_4_and_2_is_rebuilt(lost):
    layout = Layout(4, 2)
    shards = reedsolo_shards(layout, random_pieces(layout, 77, seed=lost))
    for gone in itertools.combinations(range(layout.total), lost):
        assert_rebuilds(layout, shards, [index for index in range(layout.total) if index not in gone])


@relaxed
@given(layouts, st.data())
def test_more_than_m_lost_raises_and_names_what_is_missing(layout, data):
    order = data.draw(st.permutations(range(layout.total)))
    present = order[: data.draw(st.integers(0, layout.k - 1))]
    lost = sorted(set(range(layout.total)) - set(present))
    with pytest.raises(NotEnoughShards) as caught:
        rebuild_pieces(layout, dict.fromkeys(present, b"piece"), lost[:1])
    assert caught.value.missing == tuple(f"shard {index}" for index in lost)


@pytest.mark.parametrize(
    ("layout", "length"),
    [(Layout(4, 2), 2**20), (Layout(4, 2), 2**20 + 7), (Layout(1, 2), 2**21 + 1), (Layout(17, 8), 2**18 + 3)],
    ids=str,
)
def test_long_pieces_agree_with_reedsolo_in_sampled_columns(layout, length):
    pieces = random_pieces(layout, length, seed=length)
    sampled = [0, 1, 63, 64, length - 65, length - 64, length - 2, length - 1]
    sampled += random.Random(length).sample(range(length), 300)
    expected = reedsolo_shards(layout, [bytes(piece[at] for at in sampled) for piece in pieces])
    lost = tuple(range(min(layout.k, layout.m)))
    kept = {index: piece for index, piece in enumerate(pieces) if index not in lost}
    whole = []
    for kernel in KERNELS:
        parity = kernel.apply(parity_matrix(layout), pieces)
        assert [bytes(piece[at] for at in sampled) for piece in parity] == expected[layout.k :]
        whole.append(parity)
    assert all(parity == whole[0] for parity in whole)
    parity_by_index = dict(enumerate(whole[0], start=layout.k))
    rebuilt = rebuild_pieces(layout, kept | parity_by_index, lost)
    assert [rebuilt[index] for index in lost] == [pieces[index] for index in lost]
