"""The simulated network: many processes in one program, on trio's clock, with delays drawn from a seed.

It behaves as loopback TCP under ZeroMQ does. An address that nobody listens on refuses at once. A
partition or a paused process holds messages back; after `silence_s`, as ZMTP heartbeats have it, either
side that can notice gives the connection up. A killed process is gone at once for all the others.

One seed gives one trace, provided that trio's own scheduling is made deterministic as well, which the
simulation's runner does: trio shuffles the tasks that are ready at the same moment.
"""

import heapq
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from droppexd.background import open_background
from droppexd.errors import PeerError
from droppexd.model import Role
from droppexd.runtime import Entropy
from droppexd.wire.transport import (
    ChannelCallback,
    Frame,
    ListenerCallback,
    LostCallback,
    Peer,
    Transport,
    check_size,
)

FIRST_PORT = 20001

CAPACITY = 512
"""Messages on their way in one direction before a connection takes no more."""

SILENCE_S = 10.0
"""Seconds without a sign of life after which a connection is given up."""

Trace = Callable[[float, str, str, Sequence[Frame]], None]
"""Sees each delivery: when, from which process, to which, and what."""


class MemoryNetwork:
    """Addresses, processes, and what stands between them."""

    def __init__(
        self,
        entropy: Entropy,
        *,
        delay_s: tuple[float, float] = (0.0001, 0.001),
        capacity: int = CAPACITY,
        silence_s: float = SILENCE_S,
        trace: Trace | None = None,
    ) -> None:
        self.capacity = capacity
        self.silence_s = silence_s
        self.listeners: dict[str, _MemoryListener] = {}
        self.trace = trace
        self._entropy = entropy
        self._delay_s = delay_s
        self._processes: dict[str, _Process] = {}
        self._blocked: dict[tuple[str, str], None] = {}
        self._slow: dict[str, float] = {}
        self._connections: dict[int, _Connection] = {}
        self._serial = 0
        self._port = FIRST_PORT - 1

    @asynccontextmanager
    async def transport(self, name: str, role: Role | None = None) -> AsyncIterator[Transport]:
        """Start a process of this name, with a key of that role if any, and open its transport.

        A name that was killed or closed may be started again. Leaving the block closes all that is open.
        """
        process = _Process(name, role, self)
        old = self._processes.get(name)
        if old is not None and old.alive:
            raise PeerError(f"a process of the name {name} is running")
        self._processes[name] = process
        async with open_background() as nursery:
            nursery.start_soon(process.deliver)
            try:
                yield process
            finally:
                self._end(process)

    def partition(self, one: str, other: str, *, one_way: bool = False) -> None:
        """Hold back what goes from `one` to `other`, and back unless `one_way`."""
        self._blocked[one, other] = None
        if not one_way:
            self._blocked[other, one] = None
        self._review()

    def heal(self, one: str | None = None, other: str | None = None) -> None:
        """End the partition between two processes, or all; what was held back goes on its way.

        That holds on living connections: those that were given up meanwhile stay closed.
        """
        if one is None or other is None:
            self._blocked.clear()
        else:
            self._blocked.pop((one, other), None)
            self._blocked.pop((other, one), None)
        self._review()

    def cut(self, one: str, other: str) -> None:
        """Break all connections between two processes; what is on its way on them is lost."""
        for connection in tuple(self._connections.values()):
            if {end.process.name for end in connection.ends} == {one, other}:
                for end in connection.ends:
                    end.process.schedule(trio.current_time(), end.lose)
                connection.broken()

    def slow(self, name: str, extra_s: float) -> None:
        """Have each message from or to a process take up to `extra_s` longer; 0 ends that."""
        if extra_s:
            self._slow[name] = extra_s
        else:
            self._slow.pop(name, None)

    def pause(self, name: str) -> None:
        """Stop a process: nothing is delivered to it and nothing leaves it. Its timers go on."""
        self._processes[name].paused = True
        self._review()

    def resume(self, name: str) -> None:
        """Let a paused process go on; it first gets what had arrived for it."""
        process = self._processes[name]
        process.paused = False
        process.wake()
        self._review()

    def kill(self, name: str) -> None:
        """End a process without a word to it: its transport does nothing more, its peers are told."""
        self._end(self._processes[name])

    # -- for the parts of this module ---------------------------------------------------------------

    def next_serial(self) -> int:
        """Return a number that orders what happens at one moment."""
        self._serial += 1
        return self._serial

    def next_port(self) -> int:
        """Return a port that was never used."""
        self._port += 1
        return self._port

    def delay(self, *between: str) -> float:
        """Draw the seconds that one message takes between these processes."""
        delay_s = self._entropy.uniform(*self._delay_s)
        if self._slow:
            extra_s = max(self._slow.get(name, 0.0) for name in between)
            if extra_s:
                delay_s += self._entropy.uniform(0.0, extra_s)
        return delay_s

    def blocked(self, source: "_Process", target: "_Process") -> bool:
        """Whether nothing passes from one process to another now."""
        return source.paused or (source.name, target.name) in self._blocked

    def add(self, connection: "_Connection") -> None:
        """Watch over a new connection."""
        self._connections[connection.number] = connection
        connection.review()

    def remove(self, connection: "_Connection") -> None:
        """Forget a connection that both ends have closed."""
        self._connections.pop(connection.number, None)

    def _review(self) -> None:
        for connection in tuple(self._connections.values()):
            connection.review()

    def _end(self, process: "_Process") -> None:
        if not process.alive:
            return
        process.alive = False
        process.inbox.clear()
        for listener in tuple(self.listeners.values()):
            if listener.process is process:
                listener.close()
        for connection in tuple(self._connections.values()):
            for end in connection.ends:
                if end.process is process:
                    end.close()


class _Process:
    """A process: its transport, and what is on its way to it."""

    def __init__(self, name: str, role: Role | None, network: MemoryNetwork) -> None:
        self.name = name
        self.role = role
        self.alive = True
        self.paused = False
        self.inbox: list[tuple[float, int, Callable[[], None]]] = []
        self._network = network
        self._alarm = trio.CancelScope()

    def listen(self, address: str, on_message: ListenerCallback) -> "_MemoryListener":
        network = self._network
        if not self.alive:
            raise PeerError(f"{self.name} was killed")
        host, _, port = address.rpartition(":")
        if port == "0":
            address = f"{host}:{network.next_port()}"
        if address in network.listeners:
            raise PeerError(f"cannot listen on {address}: the address is in use")
        listener = network.listeners[address] = _MemoryListener(address, self, network, on_message)
        return listener

    def connect(self, address: str, on_message: ChannelCallback, on_lost: LostCallback) -> "_MemoryChannel":
        channel = _MemoryChannel(self, self._network, on_message, on_lost)
        if self.alive:
            due = trio.current_time() + self._network.delay(self.name)
            self.schedule(due, lambda: channel.knock(address))
        return channel

    def schedule(self, due: float, action: Callable[[], None]) -> None:
        """Do something in this process at that time, or when it is resumed."""
        if not self.alive:
            return
        heapq.heappush(self.inbox, (due, self._network.next_serial(), action))
        if due < self._alarm.deadline:  # noqa: PLR1730  Setting it costs ten times the comparison.
            self._alarm.deadline = due

    def wake(self) -> None:
        """Look at the inbox again."""
        self._alarm.deadline = -math.inf

    async def deliver(self) -> None:
        """Do what is due, for as long as the process lives."""
        while True:
            now = trio.current_time()
            while self.inbox and not self.paused and self.inbox[0][0] <= now:
                heapq.heappop(self.inbox)[2]()
            due = self.inbox[0][0] if self.inbox and not self.paused else math.inf
            with trio.CancelScope(deadline=due) as self._alarm:
                await trio.sleep_forever()


@dataclass(slots=True, eq=False)
class _End:
    """One end of a connection: the messages that go out here, and whom to tell what comes in."""

    process: _Process
    connection: "_Connection"
    on_message: Callable[[Sequence[Frame]], None]
    on_lost: LostCallback
    on_room: Callable[[], None]
    alive: bool = True
    under_way: int = 0
    _last_due: float = -math.inf
    _held: deque[Callable[[float], None]] = field(default_factory=deque)

    def send(self, frames: Sequence[Frame]) -> bool:
        """Put a message on its way, or return False when the connection is closed or full."""
        connection = self.connection
        check_size(frames)
        if not self.alive or self.under_way >= connection.network.capacity:
            return False
        self.under_way += 1
        target = connection.other(self)
        self.carry(lambda due: connection.arrive(self, target, frames, due))
        return True

    def carry(self, action: Callable[[float], None]) -> None:
        """Have something done at the other end, behind what was sent there before."""
        connection = self.connection
        if self._held or connection.network.blocked(self.process, connection.other(self).process):
            self._held.append(action)
        else:
            self._dispatch(action)

    def release(self) -> None:
        """Send on what was held back."""
        while self._held:
            self._dispatch(self._held.popleft())

    def _dispatch(self, action: Callable[[float], None]) -> None:
        network, target = self.connection.network, self.connection.other(self).process
        due = max(self._last_due, trio.current_time() + network.delay(self.process.name, target.name))
        self._last_due = due
        target.schedule(due, lambda: action(due))

    def close(self) -> None:
        """Close this end; the other hears of it once it can."""
        if not self.alive:
            return
        self.alive = False
        self._held.clear()
        self.connection.closed(self)

    def lose(self) -> None:
        """Close this end because the other is not there any more, and say so."""
        if self.alive:
            self.close()
            self.on_lost()


class _Connection:
    """A channel's way to a listener and back."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network
        self.number = network.next_serial()
        self.ends: tuple[_End, ...] = ()
        self._closed_at = math.inf
        self._silent_since = math.inf

    def other(self, end: _End) -> _End:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def arrive(self, source: _End, target: _End, frames: Sequence[Frame], due: float) -> None:
        """Deliver a message, unless the connection ended while it was under way."""
        source.under_way -= 1
        if target.alive and due <= self._closed_at:
            if self.network.trace is not None:
                self.network.trace(due, source.process.name, target.process.name, frames)
            target.on_message(frames)
        if source.alive:
            source.on_room()

    def closed(self, end: _End) -> None:
        """Tell the other end that this one is closed, if word gets there."""
        self._closed_at = min(self._closed_at, trio.current_time())
        other = self.other(end)
        if not other.alive:
            self.network.remove(self)
        elif not self.network.blocked(end.process, other.process):
            delay_s = self.network.delay(end.process.name, other.process.name)
            other.process.schedule(trio.current_time() + delay_s, other.lose)

    def broken(self) -> None:
        """Lose what is on its way."""
        self._closed_at = min(self._closed_at, trio.current_time())

    def review(self) -> None:
        """Look again at what stands between the two ends."""
        one, other = self.ends
        blocked = [self.network.blocked(a.process, b.process) for a, b in ((one, other), (other, one))]
        if not any(blocked):
            self._silent_since = math.inf
        elif self._silent_since == math.inf:
            self._silent_since = trio.current_time()
            for end in self.ends:
                due = self._silent_since + self.network.silence_s
                end.process.schedule(due, partial(self._check, end))
        for end, is_blocked in zip(self.ends, blocked, strict=True):
            if is_blocked:
                continue
            if end.alive:
                end.release()
            else:
                target = self.other(end)
                delay_s = self.network.delay(end.process.name, target.process.name)
                target.process.schedule(trio.current_time() + delay_s, target.lose)

    def _check(self, end: _End) -> None:
        """Give the connection up when nothing was heard for too long."""
        if trio.current_time() >= self._silent_since + self.network.silence_s:
            end.lose()


class _MemoryListener:
    """A bound address of one process."""

    def __init__(
        self, address: str, process: _Process, network: MemoryNetwork, on_message: ListenerCallback
    ) -> None:
        self.address = address
        self.process = process
        self.on_message = on_message
        self._network = network
        self._ends: dict[bytes, _End] = {}

    def accept(self, connection: _Connection, peer: Peer) -> _End:
        """Return the listener's end of a new connection."""

        def deliver(frames: Sequence[Frame]) -> None:
            self.on_message(peer, frames)

        def forget() -> None:
            self._ends.pop(peer.route, None)

        end = _End(self.process, connection, deliver, forget, lambda: None)
        self._ends[peer.route] = end
        return end

    def send(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        end = self._ends.get(peer.route)
        return end is not None and end.send(frames)

    def close(self) -> None:
        if self._network.listeners.get(self.address) is self:
            del self._network.listeners[self.address]
        ends, self._ends = self._ends, {}
        for end in ends.values():
            end.close()


class _MemoryChannel:
    """A connection of one process to a listener, from the first knock on."""

    refused = False
    """There are no keys here."""

    def __init__(
        self, process: _Process, network: MemoryNetwork, on_message: ChannelCallback, on_lost: LostCallback
    ) -> None:
        self._process = process
        self._network = network
        self._on_message = on_message
        self._on_lost = on_lost
        self._end: _End | None = None
        self._connected = False
        self._closed = False
        self._changed: trio.Event | None = None

    def knock(self, address: str) -> None:
        """Try to reach the listener: it answers, refuses, or cannot be heard."""
        if self._closed:
            return
        listener = self._network.listeners.get(address)
        if listener is None:
            self._lose()
            return
        connection = _Connection(self._network)
        self._end = _End(self._process, connection, self._receive, self._lose, self._notify)
        peer = Peer(connection.number.to_bytes(8, "big"), self._process.role, self._process.name)
        connection.ends = (self._end, listener.accept(connection, peer))
        self._network.add(connection)
        self._greet(connection)

    def _greet(self, connection: _Connection) -> None:
        """Be connected after a round trip through the other process, which may be paused or cut off."""
        here, there = connection.ends

        def welcome(_: float) -> None:
            self._connected = not self._closed
            self._notify()

        here.carry(lambda _: there.carry(welcome))

    def send(self, frames: Sequence[Frame]) -> bool:
        return self._connected and self._end is not None and self._end.send(frames)

    async def ready(self) -> None:
        while True:
            if self._closed:
                raise PeerError("the channel is closed")
            end = self._end
            # A killed process that has not noticed yet waits here, and does not find room for ever.
            if self._connected and end is not None and end.alive and end.under_way < self._network.capacity:
                await trio.lowlevel.checkpoint_if_cancelled()
                return
            if self._changed is None:
                self._changed = trio.Event()
            await self._changed.wait()

    def close(self) -> None:
        self._closed = True
        self._connected = False
        self._notify()
        if self._end is not None:
            self._end.close()

    def _receive(self, frames: Sequence[Frame]) -> None:
        self._on_message(frames)

    def _lose(self) -> None:
        if not self._closed:
            self.close()
            self._on_lost()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
