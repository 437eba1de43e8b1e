"""Every kind of message and every record: out and back, and whatever else comes is refused by name."""

import contextlib
import dataclasses
import typing
from typing import Annotated

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droppexd import model
from droppexd.errors import RemoteProtocolError
from droppexd.schema import MAX_EXTRA_FIELDS, Bounds, pack, unpack
from droppexd.wire.messages import KINDS, Condition

RECORDS = [
    value
    for value in vars(model).values()
    if isinstance(value, type)
    and value.__module__ == model.__name__
    and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))
]
CLASSES = sorted({*RECORDS, *KINDS.values(), Condition}, key=lambda cls: cls.__name__)
relaxed = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
MOST_ITEMS = 3
"""Lists and texts are drawn short; their upper bounds are met by the mutations."""


def values_of(hint):
    """A strategy for the values that an annotation allows."""
    inner, bounds = hint, None
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), None)
    low, high = (bounds.low, bounds.high) if bounds else (0, 2**63 - 1)
    short = max(low, min(high, MOST_ITEMS))
    if inner is bool:
        return st.booleans()
    if inner is int:
        return st.integers(low, high)
    if inner is str:
        return st.text(st.characters(exclude_categories=["Cs"]), min_size=low, max_size=short)
    if inner is bytes:
        return st.binary(min_size=low, max_size=short)
    arguments = typing.get_args(inner)
    if type(None) in arguments:
        return st.none() | values_of(next(argument for argument in arguments if argument is not type(None)))
    if typing.get_origin(inner) is tuple:
        return st.lists(values_of(arguments[0]), min_size=low, max_size=short).map(tuple)
    return records_of(inner)


def fields_of(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    names = (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    )
    return {name: hints[name] for name in names}


def records_of(cls):
    return st.builds(cls, **{name: values_of(hint) for name, hint in fields_of(cls).items()})


def required_of(cls):
    if dataclasses.is_dataclass(cls):
        return sum(field.default is dataclasses.MISSING for field in dataclasses.fields(cls))
    return len(cls._fields) - len(cls._field_defaults)


def over_the_wire(raw):
    return msgpack.unpackb(msgpack.packb(raw, use_bin_type=True), raw=False, use_list=True)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=33)
    | st.sampled_from(["x" * 5000, b"x" * 5000, [0] * 20000, [[]] * 300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@st.composite
def mutated(draw, raw):
    """The list with one thing about it changed, at any depth."""
    mutation = draw(st.sampled_from(["replace", "drop", "add", "descend", "descend"]))
    if not raw:
        return draw(anything)
    position = draw(st.integers(0, len(raw) - 1))
    if mutation == "descend" and isinstance(raw[position], list):
        return [*raw[:position], draw(mutated(raw[position])), *raw[position + 1 :]]
    if mutation == "drop":
        return [*raw[:position], *raw[position + 1 :]]
    if mutation == "add":
        return [*raw[:position], draw(anything), *raw[position:]]
    return [*raw[:position], draw(anything), *raw[position + 1 :]]


@each_class
@relaxed
@given(data=st.data())
def test_what_goes_out_comes_back_the_same(cls, data):
    value = data.draw(records_of(cls))
    back = unpack(cls, over_the_wire(pack(value)))
    assert back == value
    assert type(back) is cls


@each_class
@relaxed
@given(data=st.data())
def test_whatever_is_changed_is_a_value_or_refused(cls, data):
    raw = data.draw(mutated(over_the_wire(pack(data.draw(records_of(cls))))))
    with contextlib.suppress(RemoteProtocolError):
        value = unpack(cls, raw)
        # What was let in holds to every bound, so it goes out and comes in again.
        out = over_the_wire(pack(value))
        assert pack(unpack(cls, out)) == pack(value)


@each_class
@relaxed
@given(raw=anything)
def test_arbitrary_values_never_raise_anything_else(cls, raw):
    with contextlib.suppress(RemoteProtocolError):
        unpack(cls, raw)


@each_class
@settings(relaxed, max_examples=4)
@given(data=st.data())
def test_older_and_newer_peers_are_understood(cls, data):
    value = data.draw(records_of(cls))
    raw = pack(value)
    extra = data.draw(st.lists(anything, max_size=4))
    assert unpack(cls, [*raw, *extra]) == value
    required = required_of(cls)
    for length in range(len(raw)):
        if length < required:
            with pytest.raises(RemoteProtocolError):
                unpack(cls, raw[:length])
        else:
            assert pack(unpack(cls, raw[:length]))[:length] == raw[:length]
    with pytest.raises(RemoteProtocolError):
        unpack(cls, [*raw, *[None] * (MAX_EXTRA_FIELDS + 1)])
