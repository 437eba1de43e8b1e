"""Messages to frames and back: what is let in and what is named wrong."""

import msgpack
import pytest

from droppexd.errors import RemoteProtocolError, VersionMismatch
from droppexd.model import SMALL_SIZE
from droppexd.wire.codec import MAX_REMAINING_MS, UndecodableRequest, decode, encode
from droppexd.wire.messages import ABSENT, KINDS, PROTOCOL_VERSION, Failed, Message, Ping, PutSmall, Request
from droppexd.wire.transport import MAX_FRAME_BYTES, MAX_FRAMES, MAX_HEADER_BYTES


def header(**changes):
    items = {
        "version": PROTOCOL_VERSION,
        "kind": Ping.kind,
        "request_id": 7,
        "term": 3,
        "remaining_ms": 1000,
        "fields": [],
    }
    return msgpack.packb(list((items | changes).values()))


def test_a_message_comes_back_with_its_envelope_and_body():
    put = PutSmall(name="photos/a", condition=ABSENT, blake3=bytes(32))
    frames = encode(put, 12, 3, 4500, [b"content"])
    assert decode(frames) == (put, 12, 3, 4500, [b"content"])


def test_a_message_that_cannot_be_packed_leaves_nothing_in_the_next():
    frames = encode(Ping(), 1, 2, 3)
    with pytest.raises(OverflowError):
        encode(Ping(), 1, 2**64, 3)
    assert encode(Ping(), 1, 2, 3) == frames


def test_body_frames_are_passed_on_and_not_copied():
    body = bytearray(b"content")
    frames = encode(Ping(), 1, 0, 0, [body])
    assert frames[1] is body


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [msgpack.packb({"version": 1})],
        [msgpack.packb([PROTOCOL_VERSION])],
        [header(request_id=-1)],
        [header(request_id=2**63)],
        [header(request_id="7")],
        [header(request_id=True)],
        [header(version=None)],
        [bytes(MAX_HEADER_BYTES + 1)],
        [b"\x91" * 5000],
        [msgpack.packb([[[[[[]]]]]]) + b"trailing"],
        [msgpack.packb({1: 2})],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\xdb\xff\xff\xff\xffx"],
        [b"\xc7\x08\xff12345678"],
    ],
)
def test_what_is_not_a_message_has_nobody_to_answer(frames):
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frames)
    assert not isinstance(caught.value, UndecodableRequest)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"version": 2}, VersionMismatch, "protocol version 2 .* speaks 1"),
        ({"version": 0}, VersionMismatch, "same release"),
        ({"kind": 9999}, RemoteProtocolError, "unknown kind .* 9999"),
        ({"kind": "ping"}, RemoteProtocolError, "unknown kind"),
        ({"kind": "x" * 100_000}, RemoteProtocolError, "unknown kind"),
        ({"term": -1}, RemoteProtocolError, "term"),
        ({"term": 2**63}, RemoteProtocolError, "term"),
        ({"term": None}, RemoteProtocolError, "term"),
        ({"remaining_ms": -1}, RemoteProtocolError, "remaining"),
        ({"remaining_ms": MAX_REMAINING_MS + 1}, RemoteProtocolError, "remaining"),
        ({"remaining_ms": 1.5}, RemoteProtocolError, "remaining"),
        ({"fields": None}, RemoteProtocolError, "Ping"),
        ({"fields": {}}, RemoteProtocolError, "Ping"),
        ({"fields": [0] * 1000}, RemoteProtocolError, "1000 fields"),
        ({"kind": Failed.kind, "fields": ["x"]}, RemoteProtocolError, "1 fields"),
        ({"kind": Failed.kind, "fields": ["x" * 65, ""]}, RemoteProtocolError, "Failed.code"),
    ],
)
def test_what_is_wrong_with_a_request_can_be_answered(changes, error, text):
    with pytest.raises(UndecodableRequest) as caught:
        decode([header(**changes)])
    assert caught.value.request_id == 7
    assert isinstance(caught.value.error, error)
    with pytest.raises(error, match=text):
        raise caught.value.error
    assert len(str(caught.value)) < 400


def test_a_newer_release_may_add_fields():
    assert decode([header(fields=["something", {"new": 1}])]).message == Ping()


@pytest.mark.parametrize("body", [[b"x"], [b""], [b"x"] * 39])
def test_a_body_where_there_is_none_is_refused(body):
    with pytest.raises(UndecodableRequest, match=r"Ping with .* body frames"):
        decode([header(), *body])


def test_an_oversized_body_is_refused():
    put = PutSmall(name="a", condition=ABSENT, blake3=bytes(32))
    decode(encode(put, 1, 0, 0, [bytes(SMALL_SIZE)]))
    with pytest.raises(UndecodableRequest, match="oversized"):
        decode(encode(put, 1, 0, 0, [bytes(SMALL_SIZE + 1)]))


def test_every_kind_fits_the_transport():
    for kind, message_class in KINDS.items():
        assert message_class.kind == kind
        assert issubclass(message_class, Message)
        assert 1 + message_class.body_frames <= MAX_FRAMES
        assert message_class.body_bytes <= message_class.body_frames * MAX_FRAME_BYTES
        if issubclass(message_class, Request):
            assert KINDS[message_class.reply.kind] is message_class.reply
            assert message_class.callers
