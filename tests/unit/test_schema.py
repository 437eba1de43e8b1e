"""Records to lists and back: what fits, what does not, and what an older or newer peer may send."""

import math
from typing import Annotated, NamedTuple

import pytest

from droppexd.errors import RemoteProtocolError
from droppexd.schema import MAX_EXTRA_FIELDS, Bounds, pack, record, unpack


class Pair(NamedTuple):
    left: int
    right: Annotated[int, Bounds(0, 9)] = 3


@record
class Inner:
    text: Annotated[str, Bounds(1, 4)]


@record
class Outer:
    number: int
    flag: bool
    ratio: float
    data: Annotated[bytes, Bounds(2, 2)]
    pair: Pair
    inner: Inner | None = None
    many: Annotated[tuple[Inner, ...], Bounds(0, 2)] = ()
    pairs: tuple[Pair, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()


FULL = Outer(
    number=7,
    flag=True,
    ratio=0.5,
    data=b"ab",
    pair=Pair(1, 2),
    inner=Inner(text="x"),
    many=(Inner(text="y"), Inner(text="zz")),
    pairs=(Pair(5),),
    nested=((1, 2), ()),
)
RAW = [7, True, 0.5, b"ab", [1, 2], ["x"], [["y"], ["zz"]], [[5, 3]], [[1, 2], []]]


def changed(position, value):
    return [*RAW[:position], value, *RAW[position + 1 :]]


def test_a_record_is_the_list_of_its_fields_in_order():
    assert pack(FULL) == RAW
    assert unpack(Outer, RAW) == FULL


def test_missing_fields_take_their_defaults():
    assert unpack(Outer, RAW[:5]) == Outer(number=7, flag=True, ratio=0.5, data=b"ab", pair=Pair(1, 2))
    assert unpack(Pair, [4]) == Pair(4, 3)


def test_fields_without_a_default_may_not_be_missing():
    with pytest.raises(RemoteProtocolError, match="malformed Outer: 4 fields"):
        unpack(Outer, RAW[:4])
    with pytest.raises(RemoteProtocolError):
        unpack(Pair, [])


@pytest.mark.parametrize("extra", [1, MAX_EXTRA_FIELDS])
def test_fields_of_a_newer_release_are_ignored(extra):
    assert unpack(Outer, [*RAW, *[{"new": []}] * extra]) == FULL
    assert unpack(Pair, [1, 2, *["new"] * extra]) == Pair(1, 2)


def test_more_extra_fields_than_that_are_malformed():
    with pytest.raises(RemoteProtocolError):
        unpack(Outer, [*RAW, *[None] * (MAX_EXTRA_FIELDS + 1)])


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, True),
        (0, -1),
        (0, 2**63),
        (0, 1.0),
        (0, "7"),
        (0, None),
        (1, 1),
        (1, None),
        (2, "0.5"),
        (2, True),
        (2, None),
        (3, b"a"),
        (3, b"abc"),
        (3, "ab"),
        (4, None),
        (4, [1, 10]),
        (4, [1, -1]),
        (4, {}),
        (5, []),
        (5, [""]),
        (5, ["12345"]),
        (5, "x"),
        (6, [["y"]] * 3),
        (6, ["y"]),
        (6, "y"),
        (7, [5]),
        (8, [1]),
        (8, [[-1]]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(position, value):
    with pytest.raises(RemoteProtocolError, match=r"malformed (Outer|Inner|Pair)"):
        unpack(Outer, changed(position, value))


@pytest.mark.parametrize("raw", [None, 1, "text", b"bytes", {}, {1: 2}, True, 1.5])
def test_what_is_no_list_is_no_record(raw):
    with pytest.raises(RemoteProtocolError, match="not a list"):
        unpack(Outer, raw)


def test_lists_and_texts_are_bounded_without_being_told():
    @record
    class Loose:
        text: str = ""
        data: bytes = b""
        many: tuple[int, ...] = ()

    assert unpack(Loose, ["x" * 4096, b"x" * 4096, [0] * 16384]).many == (0,) * 16384
    for raw in (["x" * 4097], ["", b"x" * 4097], ["", b"", [0] * 16385]):
        with pytest.raises(RemoteProtocolError):
            unpack(Loose, raw)


def test_an_int_is_a_number_where_a_float_is_due():
    assert math.isclose(unpack(Outer, changed(2, 2)).ratio, 2.0)
    assert type(unpack(Outer, changed(2, 2)).ratio) is float


def test_the_largest_int_of_the_wire_fits_a_float():
    assert unpack(Outer, changed(2, 2**64 - 1)).ratio == 2.0**64


def test_a_class_of_unknown_types_is_a_mistake_of_ours():
    with pytest.raises(TypeError):

        @record
        class Odd:
            value: int | str
