"""The interface of a transport: frames between addresses, in order, or not at all.

Two transports pass one conformance suite: `droppexd.wire.zeromq` and `droppexd.wire.memory`.

A *listener* is bound to an address and hears from many peers; a *channel* is connected to one listener.
What is sent on a channel arrives in order and at most once, or not at all. A channel that lost its peer
never delivers late what was sent before: it reports `on_lost` and is dead; open another.
Callbacks run on the event loop's thread, one at a time, and must not block.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from droppexd.errors import LocalProtocolError
from droppexd.model import Role

Frame = bytes | bytearray | memoryview
"""A buffer. It must not change while it is on its way: hand over immutable or private buffers."""

ZERO_COPY_SIZE = 64 * 1024
"""Frames below this are copied when they are sent: cheaper than keeping count of them."""

MAX_HEADER_BYTES = 1024 * 1024
"""The largest header frame."""

MAX_FRAME_BYTES = 8 * 1024 * 1024
"""The largest frame of any kind; a transport refuses more before it is in memory."""

MAX_FRAMES = 40
"""Frames in a message: header and body. A transport drops messages with more."""


class Peer(NamedTuple):
    """Who a message came from, as a listener knows it: stable while the peer's channel lives."""

    route: bytes
    role: Role | None
    """The role of its key; None where there are no keys, on loopback: trusted as any role."""
    name: str


class Listener(Protocol):
    """A bound address."""

    @property
    def address(self) -> str:
        """Where peers connect to, with the real port."""
        ...

    def send(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        """Queue a message for a peer; return False when it is gone or takes no more."""
        ...

    def close(self) -> None:
        """Unbind and drop what is queued. Idempotent."""
        ...


class Channel(Protocol):
    """A connection to one listener."""

    @property
    def refused(self) -> bool:
        """Whether the listener did not let this process's key in."""
        ...

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue a message; return False when the peer is not connected (yet) or takes no more."""
        ...

    async def ready(self) -> None:
        """Return once the channel has room for a message: connected, not full. Callers bound it in time.

        Raise PeerError when the channel is lost or closed, before or meanwhile.
        """
        ...

    def close(self) -> None:
        """Disconnect and drop what is queued. Idempotent."""
        ...


def check_size(frames: Sequence[Frame]) -> None:
    """Raise LocalProtocolError for a message that no transport would take."""
    if len(frames) > MAX_FRAMES:
        raise LocalProtocolError(f"a message of {len(frames)} frames; at most {MAX_FRAMES} are allowed")
    for frame in frames:
        if len(frame) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES} are allowed")


ListenerCallback = Callable[[Peer, Sequence[Frame]], None]
ChannelCallback = Callable[[Sequence[Frame]], None]
LostCallback = Callable[[], None]


class Transport(Protocol):
    """Makes listeners and channels; lives as long as its nursery."""

    def listen(self, address: str, on_message: ListenerCallback) -> Listener:
        """Bind. `tcp://127.0.0.1:0` lets the system choose the port. Raise PeerError when it cannot."""
        ...

    def connect(self, address: str, on_message: ChannelCallback, on_lost: LostCallback) -> Channel:
        """Connect. Succeeds at once; `ready` tells when the peer is there."""
        ...


OpenTransport = Callable[[], AbstractAsyncContextManager[Transport]]
