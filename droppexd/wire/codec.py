"""Messages to frames and back. Pure: no I/O, no clock.

A message is `[header][body...]`. The header is the msgpack list
`[protocol version, kind, request id, term, remaining milliseconds, fields]`; the body frames are raw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgpack

from droppexd.errors import RemoteProtocolError, UnknownKind, VersionMismatch
from droppexd.schema import pack, unpack
from droppexd.wire import (
    group_messages,
    member_messages,
    pool_messages,
    relayout_messages,
    replication_messages,
    upload_messages,
)
from droppexd.wire.messages import FIRST_VERSION, KINDS, PROTOCOL_VERSION, Message
from droppexd.wire.transport import MAX_HEADER_BYTES, Frame

_pack = msgpack.Packer(use_bin_type=True).pack
"""One for all messages: to make one takes longer than to pack most headers."""

MODULES = (
    group_messages,
    member_messages,
    pool_messages,
    relayout_messages,
    replication_messages,
    upload_messages,
)
"""Where kinds of messages stand that are not in `messages`: who decodes knows all of them."""

HEADER_ITEMS = 6
MAX_REMAINING_MS = 3_600_000


class Envelope(NamedTuple):
    """A decoded message."""

    message: Message
    request_id: int
    term: int
    remaining_ms: int
    body: Sequence[Frame]
    version: int = PROTOCOL_VERSION
    """What both sides speak: the lower of the sender's version and ours."""


class UndecodableRequest(RemoteProtocolError):
    """The header was readable enough to answer, but not the message. `request_id` says to what."""

    code = "remote-protocol"

    def __init__(self, error: RemoteProtocolError, request_id: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.request_id = request_id


def encode(
    message: Message, request_id: int, term: int, remaining_ms: int, body: Sequence[Frame] = ()
) -> list[Frame]:
    """Return the frames of a message."""
    header = _pack([PROTOCOL_VERSION, message.kind, request_id, term, remaining_ms, pack(message)])
    return [header, *body]


def decode(frames: Sequence[Frame]) -> Envelope:
    """Return the message in `frames`.

    Raise UndecodableRequest when a peer can be told which of its requests was wrong, and
    RemoteProtocolError when there is nothing to answer to.
    """
    if not frames:
        raise RemoteProtocolError("an empty message")
    head = frames[0]
    if len(head) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"a header of {len(head)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        header = msgpack.unpackb(head, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(f"a header that is not msgpack: {error}") from None
    if type(header) is not list or len(header) < HEADER_ITEMS:
        raise RemoteProtocolError("a header that is no list of six")
    version, kind, request_id, term, remaining_ms, fields = header[:HEADER_ITEMS]
    if type(version) is not int or type(request_id) is not int or not 0 <= request_id < 2**63:
        raise RemoteProtocolError("a header without protocol version or request id")
    try:
        return _decode_message(version, kind, request_id, term, remaining_ms, fields, frames[1:])
    except UndecodableRequest:
        raise
    except RemoteProtocolError as error:
        raise UndecodableRequest(error, request_id) from error


def _decode_message(
    version: int,
    kind: object,
    request_id: int,
    term: object,
    remaining_ms: object,
    fields: object,
    body: Sequence[Frame],
) -> Envelope:
    spoken = version if version == PROTOCOL_VERSION else _spoken_with(version)
    message_class = KINDS.get(kind) if type(kind) is int else None
    if message_class is None:
        raise _unknown_kind(kind, version)
    if type(term) is not int or not 0 <= term < 2**63:
        raise RemoteProtocolError("malformed term")
    if type(remaining_ms) is not int or not 0 <= remaining_ms <= MAX_REMAINING_MS:
        raise RemoteProtocolError("malformed remaining time")
    if len(body) > message_class.body_frames:
        raise RemoteProtocolError(f"{message_class.__name__} with {len(body)} body frames")
    if sum(map(len, body)) > message_class.body_bytes:
        raise RemoteProtocolError(f"{message_class.__name__} with an oversized body")
    return Envelope(unpack(message_class, fields), request_id, term, remaining_ms, body, spoken)


def _spoken_with(version: int) -> int:
    """Return the lower of a peer's version and ours; raise VersionMismatch when they are no neighbours."""
    lower, higher = sorted((version, PROTOCOL_VERSION))
    if lower < FIRST_VERSION or higher - lower > 1:
        raise VersionMismatch(
            f"protocol versions {higher} and {lower} do not work together: "
            f"upgrade the side that speaks {lower}, one release at a time"
        )
    return lower


def _unknown_kind(kind: object, version: int) -> RemoteProtocolError:
    """Return the error for a kind that is not known here, in a message of a peer of this version."""
    what = f"unknown kind of message {kind!r:.32}"
    if version == PROTOCOL_VERSION:
        return UnknownKind(f"{what}: both sides speak protocol version {version}, and one of them is wrong")
    return UnknownKind(
        f"{what}: its sender speaks protocol version {version} and its receiver {PROTOCOL_VERSION}; "
        f"upgrade the side that speaks {min(version, PROTOCOL_VERSION)}"
    )
