"""The matrices: pinned where stored data depends on them, and right from many threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from droppexd.coding import code
from droppexd.coding.code import multiplication_table, parity_matrix, rebuild_matrix
from droppexd.errors import InvalidRequest, NotEnoughShards
from droppexd.model import Layout


def test_the_code_of_stored_data_never_changes():
    assert parity_matrix(Layout(4, 2)) == (bytes([31, 15, 7, 3]), bytes([30, 14, 6, 2]))
    assert parity_matrix(Layout(1, 2)) == (bytes([3]), bytes([2]))
    assert parity_matrix(Layout(2, 1)) == (bytes([1, 1]),)


def test_without_parity_there_is_nothing_to_make():
    assert parity_matrix(Layout(5, 0)) == ()
    assert rebuild_matrix(Layout(2, 0), (0, 1), (1,)) == (bytes([0, 1]),)


def test_all_data_present_rebuilds_parity_with_the_parity_matrix():
    layout = Layout(8, 3)
    assert rebuild_matrix(layout, tuple(range(8)), (8, 9, 10)) == parity_matrix(layout)


def test_only_the_first_k_of_the_sorted_present_shards_are_used():
    layout = Layout(4, 2)
    assert rebuild_matrix(layout, (5, 3, 1, 0, 4), (2,)) == rebuild_matrix(layout, (0, 1, 3, 4), (2,))


def test_a_shard_given_twice_counts_once():
    with pytest.raises(NotEnoughShards, match=r"3 of 6 shards can be read; layout 4\+2 needs 4") as caught:
        rebuild_matrix(Layout(4, 2), (0, 1, 1, 2), (3,))
    assert caught.value.missing == ("shard 3", "shard 4", "shard 5")


@pytest.mark.parametrize("index", [-1, 6])
def test_a_shard_outside_the_layout_is_refused(index):
    with pytest.raises(InvalidRequest, match="not one of layout"):
        rebuild_matrix(Layout(4, 2), (0, 1, 2, 3), (index,))
    with pytest.raises(InvalidRequest, match="not one of layout"):
        rebuild_matrix(Layout(4, 2), (0, 1, 2, index), (3,))


@pytest.mark.parametrize("layout", [Layout(0, 2), Layout(33, 2), Layout(4, 9), Layout(4, -1)])
def test_a_layout_out_of_bounds_is_refused(layout):
    with pytest.raises(InvalidRequest, match="k must be 1 to 32"):
        parity_matrix(layout)


def test_multiplication_is_that_of_polynomial_0x11d():
    def product(left, right):
        total = 0
        while right:
            if right & 1:
                total ^= left
            left = left << 1 ^ (0x11D if left & 0x80 else 0)
            right >>= 1
        return total

    for coefficient in (0, 1, 2, 3, 0x53, 0x8E, 0xFF):
        assert multiplication_table(coefficient) == bytes(product(coefficient, x) for x in range(256))


def test_threads_that_ask_for_matrices_at_once_get_the_right_ones():
    # reedsolo rebuilds its global tables while a codec is made; unlocked, this gives wrong bytes.
    layouts = [Layout(k, m) for k in range(1, 9) for m in (1, 2, 3)]
    expected = [parity_matrix(layout) for layout in layouts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for cached in (code.parity_matrix, code._codec):
            cached.cache_clear()
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(parity_matrix, layouts)) == expected
    finally:
        sys.setswitchinterval(interval)
