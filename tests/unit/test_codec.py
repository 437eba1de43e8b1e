"""Messages to frames and back: what is let in and what is named wrong."""

import msgpack
import pytest

from droppexd.errors import RemoteProtocolError, UnknownKind, VersionMismatch
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
    assert decode(frames) == (put, 12, 3, 4500, [b"content"], PROTOCOL_VERSION)


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
        ({"version": 0}, VersionMismatch, "protocol versions"),
        ({"version": -1}, VersionMismatch, "protocol versions"),
        ({"version": 2**64 - 1}, VersionMismatch, "protocol versions"),
        ({"kind": 9999}, UnknownKind, "unknown kind of message 9999: both sides speak protocol version"),
        ({"kind": "ping"}, UnknownKind, "unknown kind"),
        ({"kind": "x" * 100_000}, UnknownKind, "unknown kind"),
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


@pytest.fixture
def speak(monkeypatch):
    """Let this side speak another version of the protocol."""
    return lambda version: monkeypatch.setattr("droppexd.wire.codec.PROTOCOL_VERSION", version)


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"), [(5, 4, 4), (5, 5, 5), (5, 6, 5), (1, 1, 1), (1, 2, 1)]
)
def test_neighbours_speak_the_lower_version(speak, ours, theirs, spoken):
    speak(ours)
    assert decode([header(version=theirs)]).version == spoken


@pytest.mark.parametrize(("ours", "theirs"), [(5, 3), (5, 7), (1, 3), (3, 1), (1, 0)])
def test_whoever_is_no_neighbour_is_told_which_side_to_upgrade(speak, ours, theirs):
    speak(ours)
    with pytest.raises(UndecodableRequest) as caught:
        decode([header(version=theirs)])
    low, high = sorted((ours, theirs))
    assert isinstance(caught.value.error, VersionMismatch)
    assert str(caught.value) == (
        f"protocol versions {high} and {low} do not work together: "
        f"upgrade the side that speaks {low}, one release at a time"
    )


def test_every_message_tells_the_version_of_its_sender(speak):
    speak(6)
    assert msgpack.unpackb(encode(Ping(), 1, 0, 0)[0])[0] == 6


@pytest.mark.parametrize(("ours", "theirs", "older"), [(5, 6, 5), (5, 4, 4)])
def test_a_kind_that_a_neighbour_does_not_know_names_both_versions(speak, ours, theirs, older):
    speak(ours)
    with pytest.raises(UndecodableRequest) as caught:
        decode([header(version=theirs, kind=9999)])
    assert isinstance(caught.value.error, UnknownKind)
    assert str(caught.value) == (
        f"unknown kind of message 9999: its sender speaks protocol version {theirs} and its receiver {ours}; "
        f"upgrade the side that speaks {older}"
    )


def test_a_newer_release_may_add_fields():
    assert decode([header(fields=["something", {"new": 1}])]).message == Ping()
    newer = header(version=PROTOCOL_VERSION + 1, kind=Failed.kind, fields=["busy", "later", [], "new"])
    assert decode([newer]).message == Failed(code="busy", text="later")


def test_an_older_release_may_lack_fields():
    assert decode([header(kind=Failed.kind, fields=["busy", "later"])]).message.details == ()


def test_a_newer_release_may_add_to_the_header():
    assert decode([msgpack.packb([*msgpack.unpackb(header()), "new"])]).message == Ping()


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
