"""The transport of real clusters: one ROUTER for a listener, one DEALER for a channel, on trio.

The only module that touches zmq. What it takes care of, and why:

- A socket's descriptor is edge-triggered, and every operation on the socket may swallow the edge that its
  reader waits for. Each socket has one owner task, which drains it until nothing is left; and EVENTS is
  looked at after every send. Messages found then are left to a task of their own, so that callbacks never
  run inside somebody's `send`.
- A DEALER would queue for an absent peer and deliver after a reconnect. With IMMEDIATE it takes messages
  only once the handshake is done, and it never reconnects: a monitor tells of the loss, and the channel is
  dead. TCP finds machines that went without a word, as there are heartbeats that they should acknowledge, and
  ZMTP processes that stand still.
- A ROUTER drops silently at its high-water mark, and for peers that are gone, unless ROUTER_MANDATORY.
- A monitored socket blocks its I/O thread when the monitor's reader is gone: readers are closed last.
- CURVE without a ZAP handler lets in anyone who knows the server's key. The handler is bound before the
  first socket, ZAP_ENFORCE_DOMAIN refuses everybody should it be missing, and its end ends the transport.
"""

import ipaddress
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from droppexd.background import open_background
from droppexd.errors import ConfigError, KeyRefused, PeerError
from droppexd.model import Role
from droppexd.wire.keys import AllowList, Member, TransportKeys
from droppexd.wire.transport import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    ZERO_COPY_SIZE,
    ChannelCallback,
    Frame,
    ListenerCallback,
    LostCallback,
    Peer,
    Transport,
    check_size,
)

logger = logging.getLogger(__name__)

SEND_MARK = 512
"""Messages queued for one peer. Above what one peer may have outstanding, so that credit binds first."""

RECEIVE_MARK = 128
"""Messages queued from one peer before the system's buffers fill: nothing is dropped here, only slowed."""

HEARTBEAT_MS = 2_000
UNACKNOWLEDGED_MS = 10_000
"""When the peer's system has acknowledged nothing for so long of what was sent, a connection is given up.
Heartbeats are always sent."""

SILENCE_MS = 60_000
"""Without a message from the peer for so long, a connection is given up, though the peer's system is there.

Only what is whole counts, and the answer to a heartbeat stands behind the frame that is under way: a chunk of
4 MiB takes a link of 1 Mbit/s 34 s."""

HANDSHAKE_MS = 10_000
"""A stranger who connects and says nothing is disconnected after this."""

DRAIN_BATCH = 64
"""Messages taken from a socket before other tasks get their turn."""

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"droppex"
ZAP_FRAMES = 7

_ADDRESS = re.compile(r"tcp://(?P<host>[^\s:/]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_DONTWAIT = int(zmq.DONTWAIT)
_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)


def curve_keypair() -> tuple[bytes, bytes]:
    """Make a random CURVE key pair: public and secret, in Z85."""
    public, secret = zmq.curve_keypair()
    return public, secret


def curve_public(secret: bytes) -> bytes:
    """Return the public key to a secret one."""
    public: bytes = zmq.curve_public(secret)
    return public


@asynccontextmanager
async def open_zeromq_transport(
    *, keys: TransportKeys | None = None, io_threads: int = 1
) -> AsyncIterator[Transport]:
    """Open a transport on real sockets; leaving the block closes all of them at once.

    Without `keys` it reaches and listens on loopback addresses only, and trusts every peer with any role.
    """
    context = zmq.Context(io_threads)
    try:
        async with open_background() as nursery:
            transport = ZeromqTransport(context, nursery, keys)
            try:
                yield transport
            finally:
                transport.close()
    finally:
        context.term()


class ZeromqTransport:
    """All sockets of a process. Made by `open_zeromq_transport`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], nursery: trio.Nursery, keys: TransportKeys | None
    ) -> None:
        self._context = context
        self._nursery = nursery
        self._keys = keys
        self._open: dict[_Socket, None] = {}
        self._doorkeeper: _Doorkeeper | None = None
        if keys is not None and keys.cluster_secret is not None:
            self._doorkeeper = _Doorkeeper(context.socket(zmq.ROUTER), nursery, keys)

    def listen(self, address: str, on_message: ListenerCallback) -> "_ZeromqListener":
        """Bind. `tcp://127.0.0.1:0` lets the system choose the port.

        Raise PeerError when the address is in use or not ours, ConfigError when it needs keys.
        """
        host = _host_of(address)
        if self._doorkeeper is None and (self._keys is not None or not _is_loopback(host)):
            raise ConfigError([f"listening on {address} needs the cluster's keys: see `droppexd init`"])
        socket = self._new_socket(zmq.ROUTER, host)
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
            if self._keys is not None and self._keys.cluster_secret is not None:
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.cluster_secret)
                socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
                socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise PeerError(f"cannot listen on {address}: {error.strerror}") from error
        return _ZeromqListener(
            socket, self._nursery, self._open, on_message, None if self._keys is None else self._keys.allowed
        )

    def connect(self, address: str, on_message: ChannelCallback, on_lost: LostCallback) -> "_ZeromqChannel":
        """Connect. Raise PeerError when the address is none, KeyRefused when it needs keys."""
        host = _host_of(address)
        if self._keys is None and not _is_loopback(host):
            raise KeyRefused(f"connecting to {address} needs keys: see `droppexd join`")
        socket = self._new_socket(zmq.DEALER, host)
        monitor: zmq.Socket[bytes] | None = None
        try:
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            if self._keys is not None:
                socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.cluster_public)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret)
            monitor = socket.get_monitor_socket(_LOST)
            socket.connect(address)
        except zmq.ZMQError as error:
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(0)
            socket.close(0)
            raise PeerError(f"cannot connect to {address}: {error.strerror}") from error
        return _ZeromqChannel(socket, monitor, self._nursery, self._open, on_message, on_lost)

    def _new_socket(self, kind: int, host: str) -> zmq.Socket[bytes]:
        # The system's own TCP buffers stay: fixed sizes from 256 KiB to 4 MiB were all slower on loopback.
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise PeerError(f"cannot open a socket: {error.strerror}") from error
        socket.setsockopt(zmq.LINGER, 0)
        # Only for addresses of IPv6: a name would lead there alone, though its IPv4 address may serve.
        socket.setsockopt(zmq.IPV6, int(host.startswith("[")))
        socket.setsockopt(zmq.SNDHWM, SEND_MARK)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_MS)
        socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket

    def close(self) -> None:
        """Close all sockets and drop what they have queued."""
        for socket in tuple(self._open):
            socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()


def _host_of(address: str) -> str:
    """Return the host of `tcp://HOST:PORT`; libzmq itself would wrap a port that is too large."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise PeerError(f"{address!r} is no address of the form tcp://HOST:PORT")
    return match["host"]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Socket:
    """A socket and the tasks that own it: the one that waits for it, and now and then one that goes on."""

    def __init__(self, socket: zmq.Socket[bytes], nursery: trio.Nursery) -> None:
        self.closed = False
        self._socket = socket
        self._nursery = nursery
        self._get = socket.get
        self._recv = socket.recv
        self._send = socket.send
        self._draining = False
        self._kicked = False
        self._descriptor = int(socket.getsockopt(zmq.FD))
        nursery.start_soon(self._own)

    def receive_one(self) -> None:
        """Take one message and hand it on, or raise zmq.Again when there is none."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self.closed:
            return
        self.closed = True
        trio.lowlevel.notify_closing(self._descriptor)
        self._socket.close(0)

    def drain(self) -> None:
        """Take what is there; what is more than a batch is left for when others have had their turn."""
        self._draining = True
        try:
            for _ in range(DRAIN_BATCH):
                if self.closed:
                    return
                self.receive_one()
        except zmq.Again:  # The socket has seen all of its commands: the next one makes a new edge.
            return
        finally:
            self._draining = False
        self._kick()

    def send_frames(self, frames: Sequence[Frame]) -> bool:
        """Queue a message; return False when the socket does not take it now."""
        last = len(frames) - 1
        send = self._send
        try:
            for index, frame in enumerate(frames):
                flags = _DONTWAIT if index == last else _MORE
                if len(frame) < ZERO_COPY_SIZE:
                    send(frame, flags)
                else:
                    send(_original(frame), flags, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        finally:
            if not self._draining:
                self.look()
        return True

    def look(self) -> int:
        """Return EVENTS. That may swallow an edge: what is there to read is left to a task."""
        events: int = self._get(_EVENTS)  # type: ignore[assignment]  # An option that is an int.
        if events & _POLLIN:
            self._kick()
        return events

    def _kick(self) -> None:
        if not self._kicked and not self.closed:
            self._kicked = True
            self._nursery.start_soon(self._go_on)

    async def _go_on(self) -> None:
        self._kicked = False
        self.drain()

    async def _own(self) -> None:
        self.drain()
        while not self.closed:
            try:
                await trio.lowlevel.wait_readable(self._descriptor)
            except trio.ClosedResourceError:
                return
            self.drain()


def _original(frame: Frame) -> Frame | zmq.Frame:
    """Return the received frame that a view shows whole: it counts its users without a thread of pyzmq."""
    if type(frame) is memoryview:
        owner: object = frame.obj
        if type(owner) is zmq.Frame and len(owner) == frame.nbytes:
            return owner
    return frame


class _ZeromqListener(_Socket):
    """A bound ROUTER."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        nursery: trio.Nursery,
        registry: dict[_Socket, None],
        on_message: ListenerCallback,
        allowed: AllowList | None,
    ) -> None:
        super().__init__(socket, nursery)
        self.address = bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        self._on_message = on_message
        self._allowed = allowed
        self._registry = registry
        registry[self] = None

    def send(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        check_size(frames)
        return not self.closed and self.send_frames([peer.route, *frames])

    def close(self) -> None:
        self._registry.pop(self, None)
        super().close()

    def receive_one(self) -> None:
        route: bytes = self._recv(_DONTWAIT)
        head = self._recv(_DONTWAIT, copy=False)
        frames: list[Frame] = [head.bytes]
        if head.more and not _receive_body(self._recv, frames):
            return
        if self._allowed is None:
            self._on_message(Peer(route, None, ""), frames)
            return
        member = self._allowed.get(str(head.get("User-Id")).encode())
        if member is None:  # Revoked since it connected: it is answered as who may ask for nothing.
            member = Member(Role.JOINER, "")
        self._on_message(Peer(route, member.role, member.name), frames)


class _ZeromqChannel(_Socket):
    """A connected DEALER, until it loses its peer."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        nursery: trio.Nursery,
        registry: dict[_Socket, None],
        on_message: ChannelCallback,
        on_lost: LostCallback,
    ) -> None:
        super().__init__(socket, nursery)
        self.refused = False
        self._monitor = _Monitor(monitor, nursery, self._lose, self._refuse)
        self._on_message = on_message
        self._on_lost = on_lost
        self._room: trio.Event | None = None
        self._registry = registry
        registry[self] = None

    def send(self, frames: Sequence[Frame]) -> bool:
        check_size(frames)
        return not self.closed and self.send_frames(frames)

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self.closed:
                raise PeerError("the channel is closed")
            if self.look() & _POLLOUT:
                return
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

    def drain(self) -> None:
        super().drain()
        if self._room is not None:
            self.look()

    def look(self) -> int:
        events = super().look()
        if self._room is not None and events & _POLLOUT:
            self._tell_room()
        return events

    def _tell_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    def close(self) -> None:
        if self.closed:
            return
        del self._registry[self]
        self._socket.disable_monitor()
        self._monitor.close()
        super().close()
        self._tell_room()

    def receive_one(self) -> None:
        head = self._recv(_DONTWAIT, copy=False)
        frames: list[Frame] = [head.bytes]
        if not head.more or _receive_body(self._recv, frames):
            self._on_message(frames)

    def _refuse(self) -> None:
        self.refused = True

    def _lose(self) -> None:
        """Hand on what arrived before the loss, then be dead."""
        try:
            while not self.closed:
                self.receive_one()
        except zmq.Again:
            self.close()
            self._on_lost()


def _receive_body(recv: Callable[..., zmq.Frame], frames: list[Frame]) -> bool:
    """Take the rest of a message; return False when it had too many frames, which are dropped."""
    count = 1
    more = True
    while more:
        frame = recv(_DONTWAIT, copy=False)
        more = frame.more
        count += 1
        if count <= MAX_FRAMES:
            frames.append(frame.buffer)
    if count > MAX_FRAMES:
        logger.warning("a message of %d frames was dropped", count)
        return False
    return True


class _Monitor(_Socket):
    """Hears what happens to a channel's connection."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        nursery: trio.Nursery,
        on_lost: LostCallback,
        on_refused: Callable[[], None],
    ) -> None:
        super().__init__(socket, nursery)
        self._on_lost = on_lost
        self._on_refused = on_refused

    def receive_one(self) -> None:
        event = parse_monitor_message(self._socket.recv_multipart(_DONTWAIT))
        if event["event"] & zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._on_refused()
        if event["event"] & _LOST:
            self._on_lost()


class _Doorkeeper(_Socket):
    """The ZAP handler: lets in whose public key is on the list, as the role that stands there.

    The protocol is https://rfc.zeromq.org/spec/27/ (ZAP 1.0).
    """

    def __init__(self, socket: zmq.Socket[bytes], nursery: trio.Nursery, keys: TransportKeys) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(ZAP_ADDRESS)
        super().__init__(socket, nursery)
        self._keys = keys

    def receive_one(self) -> None:
        route, _, *request = self._socket.recv_multipart(_DONTWAIT)
        request_id = request[1] if len(request) > 1 else b""
        member = self._judge(request)
        if member is None:
            verdict = [b"400", b"this key is not on the list of members", b"", b""]
        else:
            verdict = [b"200", b"", z85.encode(request[-1]), b""]
        self._socket.send_multipart([route, b"", b"1.0", request_id, *verdict], _DONTWAIT)

    def _judge(self, request: Sequence[bytes]) -> Member | None:
        """Return the member that knocks; None for a stranger."""
        if len(request) != ZAP_FRAMES:
            return None
        version, _, domain, _, _, mechanism, key = request
        if (version, domain, mechanism) != (b"1.0", ZAP_DOMAIN, b"CURVE"):
            return None
        return self._keys.allowed.get(z85.encode(key))
