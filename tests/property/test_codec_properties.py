"""Whatever arrives, decoding gives a valid message or RemoteProtocolError; what was sent comes back."""

import dataclasses
import typing
from typing import Annotated

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from droppexd.errors import RemoteProtocolError
from droppexd.schema import Bounds, pack
from droppexd.wire.codec import MAX_REMAINING_MS, Envelope, decode, encode
from droppexd.wire.messages import KINDS, PROTOCOL_VERSION

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=30,
)


def values_of(hint):
    """Return a strategy for the valid values of a field."""
    bounds = None
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), None)
        if typing.get_origin(hint) is Annotated:
            return values_of(hint)
    if hint is bool:
        return st.booleans()
    if hint is float:
        return st.floats(allow_nan=False)
    if hint is int:
        return st.integers(*((bounds.low, bounds.high) if bounds else (0, 2**63 - 1)))
    low, high = (bounds.low, bounds.high) if bounds else (0, 16)
    high = max(low, min(high, low + 6))
    if hint is str:
        return st.text(st.characters(codec="utf-8"), min_size=low, max_size=high)
    if hint is bytes:
        return st.binary(min_size=low, max_size=high)
    if typing.get_origin(hint) is tuple:
        item = values_of(typing.get_args(hint)[0])
        return st.lists(item, min_size=low, max_size=high).map(tuple)
    if type(None) in typing.get_args(hint):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return st.none() | values_of(inner)
    return records_of(hint)


def records_of(cls):
    """Return a strategy for the valid records of a class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    return st.builds(cls, **{name: values_of(hints[name]) for name in names})


messages = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: records_of(KINDS[kind]))


@settings(max_examples=150, deadline=None)
@given(
    messages,
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, MAX_REMAINING_MS),
)
def test_every_message_comes_back_as_it_was(message, request_id, term, remaining_ms):
    body = [b"x"] * min(message.body_frames, 2)
    decoded = decode(encode(message, request_id, term, remaining_ms, body))
    assert decoded == Envelope(message, request_id, term, remaining_ms, body)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_frames_never_crash(frames):
    decode_or_refuse(frames)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_random_msgpack_never_crashes(value):
    decode_or_refuse([msgpack.packb(value)])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KINDS)), plain)
def test_random_fields_of_every_kind_never_crash(kind, fields):
    decode_or_refuse([msgpack.packb([PROTOCOL_VERSION, kind, 1, 0, 0, fields])])


@settings(max_examples=200, deadline=None)
@given(messages, st.data())
def test_one_wrong_field_never_crashes(message, data):
    fields = pack(message)
    if fields:
        fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(plain)
    decode_or_refuse([msgpack.packb([PROTOCOL_VERSION, message.kind, 1, 0, 0, fields])])


@settings(max_examples=150, deadline=None)
@given(messages, st.data())
def test_damaged_bytes_never_crash(message, data):
    head = bytearray(encode(message, 1, 0, 0)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse([bytes(head[: data.draw(st.integers(0, len(head)))])])


def decode_or_refuse(frames):
    try:
        envelope = decode(frames)
    except RemoteProtocolError:
        return
    assert encode(envelope.message, envelope.request_id, envelope.term, envelope.remaining_ms)
