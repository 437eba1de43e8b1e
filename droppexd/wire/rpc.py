"""Requests and their replies over any transport: correlation, deadlines, bounds and authorisation.

The server side is `serve`: one task a request, each under the time its caller still has. The client side
is `open_connections`: one channel an address, opened when first needed and closed when idle.

Time belongs to the caller. A request that got no answer in time fails with PeerTimeout; when nothing at
all was heard from that peer since it was sent, the channel is closed, so that nothing stale arrives later.
Nothing here is unbounded: a server takes so many requests at once from one peer and from all, and keeps
nothing of a peer that has none outstanding.
"""

import heapq
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import trio

from droppexd.background import open_background
from droppexd.errors import (
    DroppexError,
    KeyRefused,
    LocalProtocolError,
    NotAuthorised,
    PeerBusy,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    VersionMismatch,
)
from droppexd.model import Role
from droppexd.wire.codec import MAX_REMAINING_MS, UndecodableRequest, decode, encode
from droppexd.wire.messages import PROTOCOL_VERSION, Failed, Message, Reply, Request
from droppexd.wire.transport import MAX_HEADER_BYTES, Channel, Frame, Listener, Peer, Transport

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Reply)

IDLE_S = 60.0
"""Seconds after which a channel that nobody used is closed."""

COMPLAINTS_A_WINDOW = 10
COMPLAINT_WINDOW_S = 10.0
"""What a misbehaving peer can make a process log: so many lines in so many seconds."""

MOST_STALE_TIMERS = 1024
"""Timers of finished requests that are kept before the heap is cleared of them."""

LEAVE_S = 0.1
"""What the last replies get to leave in, before a listener that stops is closed and drops them."""

Answer = Reply | tuple[Reply, Sequence[Frame]]
"""What a handler returns: a reply, or a reply with body frames."""


class Call(NamedTuple):
    """The circumstances of a request, as its handler gets them."""

    peer: Peer
    term: int
    ticket: object
    """What the admission of this kind returned; None where there is none."""
    version: int = PROTOCOL_VERSION
    """Of the protocol: the lower of the peer's and ours. What an older peer would take amiss stays unsaid."""


Handler = Callable[[Call, Any, Sequence[Frame]], Awaitable[Answer]]
"""Answers one request. A DroppexError that it raises is answered as Failed; any other exception is a bug."""

Admission = Callable[[Peer, Any, Sequence[Frame]], object]
"""Sees the requests of a kind in the order they arrived, before their handlers start. Must not block."""


Respond = Callable[[Answer | DroppexError], None]
"""Answers a request that a quick handler has taken: once, from anywhere on the event loop's thread."""

QuickHandler = Callable[[Call, Any, Sequence[Frame], Respond], bool]
"""May take a request as it arrives, without a task: half of what a small request costs is its task.

Returns True when it has answered or will, and False to leave the request to its handler. Must not block.
"""


@dataclass(frozen=True, slots=True)
class Service:
    """What a role answers: a handler for each kind of request, and admissions for kinds with an order.

    The kinds on the path of a small file may have a quick handler besides, which is asked first. `callers`
    are the roles that this one talks to at all; each kind of request narrows them down.
    """

    handlers: Mapping[type[Request[Any]], Handler]
    admissions: Mapping[type[Request[Any]], Admission] = field(default_factory=dict)
    quick: Mapping[type[Request[Any]], QuickHandler] = field(default_factory=dict)
    callers: frozenset[Role] = frozenset(Role)


@dataclass(slots=True)
class Terms:
    """The highest term seen. The server and the connections of one role share one of these."""

    current: int = 0

    def observe(self, term: int) -> None:
        """Take note of a term that somebody named."""
        self.current = max(self.current, term)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a server takes on."""

    outstanding_per_peer: int = 256
    outstanding: int = 2048
    drain_s: float = 0.0
    """Seconds that running requests get to end once the server is cancelled."""


class _Complaints:
    """Logs what peers do wrong, at a bounded rate."""

    def __init__(self) -> None:
        self._window_end = -math.inf
        self._count = 0

    def log(self, text: str, *args: object) -> None:
        now = trio.current_time()
        if now >= self._window_end:
            if self._count > COMPLAINTS_A_WINDOW:
                logger.warning("%d more of the like were not logged", self._count - COMPLAINTS_A_WINDOW)
            self._window_end = now + COMPLAINT_WINDOW_S
            self._count = 0
        self._count += 1
        if self._count <= COMPLAINTS_A_WINDOW:
            logger.warning(text, *args)


def _encode(
    message: Message, request_id: int, term: int, remaining_ms: int, body: Sequence[Frame]
) -> list[Frame]:
    """Return the frames of a message that every peer will take."""
    frames = encode(message, request_id, term, remaining_ms, body)
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise LocalProtocolError(
            f"{type(message).__name__} takes {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )
    return frames


# -- the side that answers -------------------------------------------------------------------------


async def serve(
    transport: Transport,
    address: str,
    service: Service,
    *,
    terms: Terms,
    limits: Limits | None = None,
    task_status: trio.TaskStatus[Listener] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests at `address` until cancelled; `task_status.started` gives the bound listener.

    When cancelled it takes no more requests, gives those that run `limits.drain_s` to end, cancels the
    rest and closes the listener. Raise PeerError when the address cannot be bound. An exception of a
    handler that is no DroppexError is a bug: it ends the other handlers and comes out of here.
    """
    limits = limits or Limits()
    server = _Server(service, terms, limits)
    listener = transport.listen(address, server.receive)
    running = trio.CancelScope()
    stopped = trio.Event()

    async def run_handlers(task_status: trio.TaskStatus[trio.Nursery]) -> None:
        with running:
            async with trio.open_nursery() as handlers:
                task_status.started(handlers)
                await stopped.wait()
                if await server.idle():
                    await trio.sleep(LEAVE_S)

    try:
        async with trio.open_nursery() as nursery:
            server.start(listener, await nursery.start(run_handlers))
            running.shield = True  # Not before: a start that is cancelled waits for what it started.
            try:
                task_status.started(listener)
                await trio.sleep_forever()
            finally:
                server.stop()
                stopped.set()
                running.deadline = trio.current_time() + limits.drain_s
    finally:
        listener.close()


class _Server:
    """The requests that a listener hears. `receive` is its callback; the rest is the server's own."""

    def __init__(self, service: Service, terms: Terms, limits: Limits) -> None:
        self._handlers = service.handlers
        self._admissions = service.admissions
        self._quick = service.quick
        self._callers = service.callers
        self._terms = terms
        self._limits = limits
        self._listener: Listener | None = None
        self._nursery: trio.Nursery | None = None
        self._outstanding = 0
        self._outstanding_by_route: dict[bytes, int] = {}
        self._complaints = _Complaints()
        self._last_answered: trio.Event | None = None

    def start(self, listener: Listener, nursery: trio.Nursery) -> None:
        self._listener = listener
        self._nursery = nursery

    def stop(self) -> None:
        self._nursery = None

    async def idle(self) -> bool:
        """Return once nothing is outstanding, and whether anything was. Nothing may come in any more."""
        if not self._outstanding:
            return False
        self._last_answered = trio.Event()
        await self._last_answered.wait()
        return True

    def receive(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Start the handler of a request, or say why not."""
        try:
            request, request_id, term, remaining_ms, body, version = decode(frames)
        except UndecodableRequest as undecodable:
            self._complaints.log("a bad request of %s: %s", peer.name or peer.role, undecodable.error)
            self._reply(peer, undecodable.request_id, Failed.of(undecodable.error))
            return
        except RemoteProtocolError as error:
            self._complaints.log("not a message, from %s: %s", peer.name or peer.role, error)
            return
        try:
            if not isinstance(request, Request):
                raise RemoteProtocolError(f"{type(request).__name__} is no request")
            handler, call = self._admit(peer, request, term, body, version)
        except DroppexError as error:
            self._reply(peer, request_id, Failed.of(error))
            return
        assert self._nursery is not None
        self._outstanding += 1
        self._outstanding_by_route[peer.route] = self._outstanding_by_route.get(peer.route, 0) + 1
        quick = self._quick.get(type(request))
        if quick is None or not self._taken(quick, call, request, request_id, body):
            self._nursery.start_soon(self._handle, handler, call, request, request_id, remaining_ms, body)

    def _taken(
        self,
        quick: QuickHandler,
        call: Call,
        request: Request[Any],
        request_id: int,
        body: Sequence[Frame],
    ) -> bool:
        """Offer a request to its quick handler, and return whether that has taken it."""
        answered = False

        def respond(answer: Answer | DroppexError) -> None:
            nonlocal answered
            if answered:
                raise LocalProtocolError(f"{type(request).__name__} was answered twice")
            answered = True
            self._release(call.peer.route)
            self._answer(call.peer, request, request_id, answer)

        try:
            return quick(call, request, body, respond)
        except DroppexError as error:
            if answered:
                raise
            respond(error)
            return True

    def _admit(
        self, peer: Peer, request: Request[Any], term: int, body: Sequence[Frame], version: int
    ) -> tuple[Handler, Call]:
        """Return the handler of a request that may run now, or raise the reason why it may not."""
        role = peer.role
        if role is not None and (role not in request.callers or role not in self._callers):
            self._complaints.log("%s %s may not send %s here", role, peer.name, type(request).__name__)
            raise NotAuthorised(f"a key of the role {role} may not send {type(request).__name__} here")
        if role is not Role.CLIENT:  # Terms fence masters: an outsider's word must not.
            self._terms.observe(term)
        handler = self._handlers.get(type(request))
        if handler is None:
            raise RemoteProtocolError(f"{type(request).__name__} is not answered here")
        if self._nursery is None:
            raise PeerBusy("this process is not taking requests now")
        if (
            self._outstanding >= self._limits.outstanding
            or self._outstanding_by_route.get(peer.route, 0) >= self._limits.outstanding_per_peer
        ):
            raise PeerBusy("too many requests are outstanding")
        admission = self._admissions.get(type(request))
        ticket = None if admission is None else admission(peer, request, body)
        return handler, Call(peer, term, ticket, version)

    async def _handle(
        self,
        handler: Handler,
        call: Call,
        request: Request[Any],
        request_id: int,
        remaining_ms: int,
        body: Sequence[Frame],
    ) -> None:
        answer: Answer | DroppexError | None = None
        try:
            with trio.move_on_after(remaining_ms / 1000):
                answer = await handler(call, request, body)
        except DroppexError as error:
            answer = error
        finally:
            self._release(call.peer.route)
        if answer is not None:  # Otherwise the caller has given up by now.
            self._answer(call.peer, request, request_id, answer)

    def _answer(
        self, peer: Peer, request: Request[Any], request_id: int, answer: Answer | DroppexError
    ) -> None:
        if isinstance(answer, DroppexError):
            self._reply(peer, request_id, Failed.of(answer))
            return
        reply, body = answer if type(answer) is tuple else (answer, ())
        if type(reply) is not request.reply and type(reply) is not Failed:
            raise LocalProtocolError(f"{type(request).__name__} answered with {type(reply).__name__}")
        self._reply(peer, request_id, reply, body)

    def _release(self, route: bytes) -> None:
        self._outstanding -= 1
        left = self._outstanding_by_route[route] - 1
        if left:
            self._outstanding_by_route[route] = left
        else:
            del self._outstanding_by_route[route]
        if not self._outstanding and self._last_answered is not None:
            self._last_answered.set()

    def _reply(self, peer: Peer, request_id: int, reply: Reply, body: Sequence[Frame] = ()) -> None:
        """Send a reply. One that cannot be sent is dropped: its caller has a deadline."""
        if self._listener is None:
            return
        try:
            frames = _encode(reply, request_id, self._terms.current, 0, body)
        except LocalProtocolError as error:
            logger.exception("a reply that no peer would take")
            frames = _encode(Failed.of(error), request_id, self._terms.current, 0, ())
        self._listener.send(peer, frames)


# -- the side that asks ----------------------------------------------------------------------------


class Pending(Generic[R]):
    """A request on its way. One task may wait for its answer, or it is abandoned."""

    __slots__ = (
        "_deadline",
        "_error",
        "_group",
        "_heard_before",
        "_link",
        "_reply",
        "_reply_class",
        "_task",
        "id",
    )

    def __init__(self, link: "_Link", request_id: int, reply_class: type[Reply], deadline: float) -> None:
        self.id = request_id
        self._link = link
        self._reply_class = reply_class
        self._deadline = deadline
        self._heard_before = link.heard
        self._task: trio.lowlevel.Task | None = None
        self._group: _Group | None = None
        self._reply: tuple[Any, Sequence[Frame]] | None = None
        self._error: DroppexError | None = None

    @property
    def done(self) -> bool:
        """Whether `answer` would return or raise at once."""
        return self._reply is not None or self._error is not None

    async def answer(self) -> tuple[R, Sequence[Frame]]:
        """Return the reply and its body, once.

        Raise what the peer reported; PeerTimeout when the time is over; PeerError when the peer is lost;
        RemoteProtocolError when the answer is none. When cancelled, the request is abandoned.
        """
        if self.done:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._wait()
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        reply, self._reply = self._reply, None
        self._error = LocalProtocolError("the answer was taken before")
        return reply

    async def settled(self, timeout_s: float) -> bool:
        """Wait at most that long for the request to be `done`, and return whether it is.

        Unlike `answer` it takes nothing and abandons nothing.
        """
        return await all_settled((self,), timeout_s)

    def set_timer(self, timeout_s: float, group: "_Group") -> None:
        """Let that group stop waiting when the time is over."""
        self._link.set_timer(trio.current_time() + timeout_s, group)

    def join(self, group: "_Group | None") -> None:
        """Tell this group when the request is settled; None: tell nobody."""
        self._group = group

    def abandon(self) -> None:
        """Take no interest in the answer any more. Idempotent; the channel stays open."""
        self._link.forget(self.id)
        if not self.done:
            self._settle(None, PeerError("the request was abandoned"))

    async def _wait(self) -> None:
        if self._task is not None:
            raise LocalProtocolError("two tasks wait for one answer")
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._cancelled)

    def _cancelled(self, _: Any) -> trio.lowlevel.Abort:
        self._task = None
        self.abandon()
        return trio.lowlevel.Abort.SUCCEEDED

    def receive(self, message: Message, body: Sequence[Frame]) -> None:
        """Settle the request with what the peer answered."""
        if type(message) is self._reply_class:
            self._settle((message, body), None)
        elif isinstance(message, Failed):
            self._settle(None, message.error())
        else:
            error = f"{type(message).__name__} is no answer; {self._reply_class.__name__} is"
            self._settle(None, RemoteProtocolError(error))

    def fail(self, error: DroppexError) -> None:
        """Settle the request with an error."""
        self._settle(None, error)

    def expire(self) -> None:
        """Settle a request whose time is over; a peer that has gone silent loses its channel."""
        link = self._link
        link.forget(self.id)
        self._settle(None, PeerTimeout(f"{link.address} did not answer in time"))
        if link.heard == self._heard_before:
            link.close(PeerError(f"{link.address} has gone silent"))

    def _settle(self, reply: tuple[Any, Sequence[Frame]] | None, error: DroppexError | None) -> None:
        self._reply, self._error = reply, error
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
        elif self._group is not None:
            group, self._group = self._group, None
            group.settled()


async def all_settled(pendings: Sequence[Pending[Any]], timeout_s: float) -> bool:
    """Wait at most that long for all of these requests to be `done`, and return whether they are.

    One wait for all of them: a wait for each costs as much as the requests do. Nobody else may wait for
    one of them meanwhile. It takes nothing and abandons nothing.
    """
    waiting = [pending for pending in pendings if not pending.done]
    if waiting:
        await _Group(waiting).wait(timeout_s)
    return all(pending.done for pending in pendings)


class _Group:
    """A task that waits for several requests.

    The time is kept by the timers of the connections: a cancel scope of its own costs half as much as a
    request.
    """

    __slots__ = ("_left", "_pendings", "_task")

    def __init__(self, pendings: Sequence[Pending[Any]]) -> None:
        self._pendings = pendings
        self._left = len(pendings)
        self._task: trio.lowlevel.Task | None = None

    async def wait(self, timeout_s: float) -> None:
        """Return when all are settled or the time is over."""
        self._task = trio.lowlevel.current_task()
        for pending in self._pendings:
            pending.join(self)
        self._pendings[0].set_timer(timeout_s, self)
        await trio.lowlevel.wait_task_rescheduled(self._cancelled)

    def needs_timer(self, _timer_id: int) -> bool:
        """Whether the task still waits."""
        return self._task is not None

    def settled(self) -> None:
        """Count one request; wake the task after the last."""
        self._left -= 1
        if not self._left:
            self._wake()

    def expire(self) -> None:
        """Let the task, if it still waits, go on without those that are not settled."""
        if self._task is not None:
            self._leave()
            self._wake()

    def _wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def _leave(self) -> None:
        for pending in self._pendings:
            pending.join(None)

    def _cancelled(self, _: Any) -> trio.lowlevel.Abort:
        self._task = None
        self._leave()
        return trio.lowlevel.Abort.SUCCEEDED


class _Link:
    """A channel to one address and the requests that wait for their answers on it."""

    def __init__(
        self, address: str, idle_timer: int, connections: "Connections", transport: Transport
    ) -> None:
        self.address = address
        self.idle_timer = idle_timer
        self.heard = 0
        self.version: int | None = None
        self.last_used = trio.current_time()
        self.error: PeerError | None = None
        self._connected = False
        self._waiting = 0
        self._connections = connections
        self._pending: dict[int, Pending[Any]] = {}
        self._channel: Channel = transport.connect(address, self._receive, self._lost)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything here."""
        return not self._pending and not self._waiting

    @property
    def connected(self) -> bool:
        """Whether the peer has been there and is not lost."""
        return self._connected and self.error is None

    async def ready(self, deadline: float) -> None:
        """Wait for room to send. Raise PeerTimeout, or PeerError when the peer is not there."""
        heard_before = self.heard
        self._waiting += 1
        try:
            with trio.move_on_at(deadline) as scope:
                await self._channel.ready()
        except PeerError as error:
            raise self.error or error from None
        finally:
            self._waiting -= 1
        if scope.cancelled_caught:
            if not self._connected:
                raise PeerTimeout(f"{self.address} is not reachable")
            if self.heard == heard_before:
                self.close(PeerError(f"{self.address} has gone silent"))
            raise PeerTimeout(f"{self.address} took no more requests in time")
        self._connected = True

    def send(
        self, request: Request[R], request_id: int, deadline: float, term: int, body: Sequence[Frame]
    ) -> Pending[R] | None:
        """Send a request, or return None when there is no room for it now."""
        now = trio.current_time()
        remaining_ms = min(max(1, int((deadline - now) * 1000)), MAX_REMAINING_MS)
        if not self._channel.send(_encode(request, request_id, term, remaining_ms, body)):
            return None
        self._connected = True
        self.last_used = now
        pending: Pending[R] = Pending(self, request_id, request.reply, deadline)
        self._pending[request_id] = pending
        return pending

    def set_timer(self, deadline: float, group: _Group) -> None:
        """Let a group that waits for requests stop waiting then."""
        self._connections.set_timer(deadline, self._connections.new_id(), group)

    def pending(self, request_id: int) -> Pending[Any] | None:
        """Return the request of this id if it still waits."""
        return self._pending.get(request_id)

    def needs_timer(self, timer_id: int) -> bool:
        """Whether something is still to happen when this timer goes off."""
        return timer_id in self._pending or (timer_id == self.idle_timer and self.error is None)

    def forget(self, request_id: int) -> None:
        """Drop the answer of this request when it comes."""
        self._pending.pop(request_id, None)

    def close(self, error: PeerError) -> None:
        """Close the channel for good and fail what waits on it. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        self._channel.close()
        self._connections.removed(self)
        waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            pending.fail(error)

    def _lost(self) -> None:
        if self._connected:
            self.close(PeerError(f"the connection to {self.address} was lost"))
        elif self._channel.refused:
            self.close(KeyRefused(f"{self.address} does not let this key in: it is no member's, or revoked"))
        else:
            self.close(PeerError(f"{self.address} is not reachable"))

    def _named(self, error: RemoteProtocolError) -> RemoteProtocolError:
        """Return the error; one about versions with the address, for somebody must go there and upgrade."""
        if isinstance(error, VersionMismatch):
            return VersionMismatch(f"{self.address}: {error}")
        return error

    def _receive(self, frames: Sequence[Frame]) -> None:
        self.heard += 1
        try:
            message, request_id, term, _, body, self.version = decode(frames)
        except UndecodableRequest as undecodable:
            pending = self._pending.pop(undecodable.request_id, None)
            if pending is not None:
                pending.fail(self._named(undecodable.error))
            return
        except RemoteProtocolError as error:
            self.close(PeerError(f"{self.address} breaks the protocol: {error}"))
            return
        self._connections.observe(term)
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            pending.receive(message, body)


@asynccontextmanager
async def open_connections(
    transport: Transport, *, terms: Terms, idle_s: float = IDLE_S
) -> AsyncIterator["Connections"]:
    """Open the asking side of a role; what is still under way when the block ends fails with PeerError."""
    connections = Connections(transport, terms, idle_s)
    async with open_background() as nursery:
        nursery.start_soon(connections.keep_time)
        try:
            yield connections
        finally:
            connections.close()


class Connections:
    """The peers that a role asks, by address. Made by `open_connections`."""

    def __init__(self, transport: Transport, terms: Terms, idle_s: float) -> None:
        self._transport = transport
        self._terms = terms
        self._idle_s = idle_s
        self._links: dict[str, _Link] = {}
        self._next_id = 1
        self._closed = False
        # One heap and one task keep the deadlines of all requests: a cancel scope for each costs more.
        self._timers: list[tuple[float, int, _Link | _Group]] = []
        self._most_timers = MOST_STALE_TIMERS
        self._alarm = trio.CancelScope()

    async def connect(self, address: str, *, timeout_s: float) -> None:
        """Return when the peer is there and takes requests.

        Raise PeerTimeout when it is not in time, and PeerError at once when it refuses.
        """
        await self._link(address).ready(trio.current_time() + timeout_s)

    def connected(self, address: str) -> bool:
        """Return whether there is a live channel to this address."""
        link = self._links.get(address)
        return link is not None and link.connected

    def spoken_with(self, address: str) -> int | None:
        """Return the protocol version that both sides speak; None as long as the peer has said nothing."""
        link = self._links.get(address)
        return None if link is None else link.version

    def begin(
        self, address: str, request: Request[R], body: Sequence[Frame] = (), *, timeout_s: float
    ) -> Pending[R]:
        """Send a request now, behind all that were sent there before.

        Raise PeerError when the peer is not connected (see `connect`) and PeerBusy when it takes no more now.
        """
        link = self._links.get(address)
        if link is None:
            raise PeerError(f"{address} is not connected")
        pending = self._send(link, request, body, trio.current_time() + timeout_s)
        if pending is None:
            raise PeerBusy(f"{address} takes no more requests now")
        return pending

    async def call(
        self, address: str, request: Request[R], body: Sequence[Frame] = (), *, timeout_s: float
    ) -> tuple[R, Sequence[Frame]]:
        """Send a request, connecting first where needed, and return its reply and body.

        Raise what the peer reported, or PeerError (PeerTimeout, PeerBusy) when there is no answer.
        """
        deadline = trio.current_time() + timeout_s
        link = self._link(address)
        pending = self._send(link, request, body, deadline)
        while pending is None:
            await link.ready(deadline)
            pending = self._send(link, request, body, deadline)
        return await pending.answer()

    def disconnect(self, address: str) -> None:
        """Close the channel to an address; what waits on it fails with PeerError."""
        link = self._links.get(address)
        if link is not None:
            link.close(PeerError(f"{address} was disconnected"))

    def close(self) -> None:
        """Close all channels. Idempotent."""
        self._closed = True
        for link in tuple(self._links.values()):
            link.close(PeerError("this process closes its connections"))
        self._timers.clear()

    def observe(self, term: int) -> None:
        """Take note of a term that a peer named."""
        self._terms.observe(term)

    def removed(self, link: _Link) -> None:
        """Forget a link that closed itself."""
        del self._links[link.address]

    def _link(self, address: str) -> _Link:
        link = self._links.get(address)
        if link is None:
            if self._closed:
                raise PeerError("this process closes its connections")
            link = self._links[address] = _Link(address, self.new_id(), self, self._transport)
            self.set_timer(link.last_used + self._idle_s, link.idle_timer, link)
        return link

    def _send(
        self, link: _Link, request: Request[R], body: Sequence[Frame], deadline: float
    ) -> Pending[R] | None:
        if link.error is not None:
            raise link.error
        request_id = self.new_id()
        pending = link.send(request, request_id, deadline, self._terms.current, body)
        if pending is not None:
            self.set_timer(deadline, request_id, link)
        return pending

    def new_id(self) -> int:
        """Return a number for a request or a timer that no other has."""
        self._next_id += 1
        return self._next_id

    def set_timer(self, deadline: float, timer_id: int, expires: "_Link | _Group") -> None:
        """Let a request, an idle link, or a wait for requests expire then."""
        if len(self._timers) >= self._most_timers:
            self._clear_timers()
        heapq.heappush(self._timers, (deadline, timer_id, expires))
        if deadline < self._alarm.deadline:  # noqa: PLR1730  Setting it costs ten times the comparison.
            self._alarm.deadline = deadline

    async def keep_time(self) -> None:
        """Expire requests and idle channels; runs as long as the connections do."""
        while True:
            self._expire(trio.current_time())
            next_deadline = self._timers[0][0] if self._timers else math.inf
            with trio.CancelScope(deadline=next_deadline) as self._alarm:
                await trio.sleep_forever()

    def _expire(self, now: float) -> None:
        while self._timers:
            deadline, timer_id, expires = self._timers[0]
            # Those that nobody needs any more go too: under load each would wake this task in vain.
            if deadline > now and expires.needs_timer(timer_id):
                return
            heapq.heappop(self._timers)
            if deadline > now:
                continue
            if isinstance(expires, _Group):
                expires.expire()
                continue
            link = expires
            if timer_id == link.idle_timer:
                self._expire_link(link, now)
            else:
                pending = link.pending(timer_id)
                if pending is not None:
                    pending.expire()

    def _expire_link(self, link: _Link, now: float) -> None:
        if link.error is not None:
            return
        if link.idle and link.last_used + self._idle_s <= now:
            link.close(PeerError(f"{link.address} was not used for {self._idle_s:g} s"))
            return
        due = link.last_used if link.idle else now
        self.set_timer(due + self._idle_s, link.idle_timer, link)

    def _clear_timers(self) -> None:
        """Drop the timers of requests that are done."""
        self._timers = [
            (deadline, timer_id, expires)
            for deadline, timer_id, expires in self._timers
            if expires.needs_timer(timer_id)
        ]
        heapq.heapify(self._timers)
        self._most_timers = MOST_STALE_TIMERS + 2 * len(self._timers)
