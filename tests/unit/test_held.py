"""Holdings as bytes: what is packed comes back, and what is not in order is refused."""

import struct

import pytest

from droppexd.errors import InvalidRequest
from droppexd.held import HELD_BYTES, holding_of, pack_held, shard_key, unpack_held
from droppexd.model import ExtentId, Holding

HOLDINGS = [
    Holding(ExtentId(0, 0), 0, 0),
    Holding(ExtentId(0, 0), 39, 2**63 - 1),
    Holding(ExtentId(0, 2**32), 1, 1),
    Holding(ExtentId(2**40 + 5, 7), 1, 2**40 | 1),
    Holding(ExtentId(2**48 - 1, 2**48 - 1), 2, 3),
]


def test_holdings_come_back_in_their_order():
    packed = pack_held(HOLDINGS)
    assert len(packed) == len(HOLDINGS) * HELD_BYTES
    held = unpack_held(packed, None)
    assert [holding_of(*one) for one in held.items()] == HOLDINGS
    assert list(held) == [shard_key(holding.extent, holding.shard) for holding in HOLDINGS]
    assert sorted(held) == list(held)


def test_nothing_is_nothing():
    assert pack_held([]) == b""
    assert unpack_held(b"", ExtentId(5, 5)) == {}


def raw(shard, generation):
    return struct.pack(">HIHIBQ", 0, 1, 0, 1, shard, generation)


@pytest.mark.parametrize(
    ("packed", "after", "what"),
    [
        (pack_held(HOLDINGS)[:-1], None, "104 bytes of holdings"),
        (pack_held(reversed(HOLDINGS)), None, "order"),
        (pack_held([*HOLDINGS, HOLDINGS[-1]]), None, "order"),
        (pack_held([HOLDINGS[0], HOLDINGS[0]._replace(generation=9)]), None, "order"),
        (pack_held(HOLDINGS[2:]), HOLDINGS[2].extent, "behind"),
        (pack_held(HOLDINGS[2:]), HOLDINGS[3].extent, "behind"),
        (raw(40, 1), None, "beyond 39"),
        (raw(0, 2**63), None, "generation"),
    ],
)
def test_what_no_pool_would_send_is_refused(packed, after, what):
    with pytest.raises(InvalidRequest, match=what):
        unpack_held(packed, after)


def test_holdings_may_begin_right_behind():
    assert len(unpack_held(pack_held(HOLDINGS[3:]), HOLDINGS[2].extent)) == 2
