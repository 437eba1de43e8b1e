"""The way to the master: which controller it is, and asking it again when that is safe."""

import math
from collections.abc import Awaitable, Callable, Sequence

import trio

from droppexd.errors import DroppexError, NotAuthorised, NotMaster, PeerError, VersionMismatch
from droppexd.runtime import Runtime
from droppexd.wire.messages import R, Request
from droppexd.wire.rpc import Connections
from droppexd.wire.transport import Frame

FAILOVER_S = 35.0
"""For so long an app looks for a master on behalf of a client: another takes over when one has failed."""

_ATTEMPT_S = 5.0
"""One controller gets this long before the next is tried."""

_LEAST_S = 0.1
"""With less time left nobody else is asked: who gets no answer gives the connection up, and whatever else
waits there fails."""

_PAUSE_S = (0.05, 0.5)
"""Between two rounds over all controllers: long enough not to spin, short enough not to be noticed."""

_FIND_S = 2.0
"""Between two looks at other sources: a bucket may be far away."""

NOWHERE = "tcp://127.0.0.1:1"
"""Asked while no controller is known at all; nobody listens there."""

Find = Callable[[], Awaitable[tuple[str, ...]]]
"""Returns addresses where controllers may be."""

Finding = Callable[[int, bytes], Awaitable[tuple[str, ...]]]
"""The same, given the highest term that was seen and the cluster's id, empty when that is not known."""


class MasterLink:
    """Calls to the master, found among the controllers of the seed list and those that a master told of.

    Only requests that may be repeated go this way: reads, and changes that carry an operation id.
    """

    def __init__(
        self,
        connections: Connections,
        controllers: Sequence[str],
        runtime: Runtime,
        find: Find | None = None,
    ) -> None:
        self._connections = connections
        self._seeds = tuple(controllers)
        self._told: tuple[str, ...] = ()
        self._followed = ""
        self._found: tuple[str, ...] = ()
        self._find = find
        self._find_at = -math.inf
        self._in_vain = 0
        """Controllers left since one answered, in all calls: one call may be too short for all."""
        self._runtime = runtime
        self._address = self._seeds[0] if self._seeds else NOWHERE

    @property
    def address(self) -> str:
        """The controller that was the master when it was last asked."""
        return self._address

    @property
    def known(self) -> tuple[str, ...]:
        """All controllers that this link knows of."""
        return tuple(dict.fromkeys((*self._seeds, *self._told, *self._found))) or (NOWHERE,)

    def follow(self, address: str, controllers: Sequence[str]) -> None:
        """Take a master's word that it is the master now, and for which controllers there are.

        Calls that wait for another are put to this one at once: the other may stand still for long. A word
        that was heard before changes nothing: whoever asks elsewhere since has found no master there.
        """
        self._told = tuple(controllers)
        if address == self._followed:
            return
        self._followed = address
        former, self._address, self._in_vain = self._address, address, 0
        if former != address:
            self._connections.disconnect(former)

    async def call(self, request: Request[R], body: Sequence[Frame] = (), *, timeout_s: float) -> R:
        """Return the master's answer; raise what it raises, or PeerError when no master answers in time."""
        deadline = self._runtime.clock.now() + timeout_s
        asked = 0
        failure: DroppexError | None = None
        reason: DroppexError | None = None
        # Why, in the words of a controller that knows of no master: says more than that time ran out.
        while True:
            remaining_s = deadline - self._runtime.clock.now()
            if failure is not None and remaining_s < _LEAST_S:
                raise PeerError(
                    f"no master answers at {', '.join(self.known)}: {reason or failure}"
                ) from failure
            address = self._address
            try:
                reply, _ = await self._connections.call(
                    address, request, body, timeout_s=max(0.001, min(remaining_s, _ATTEMPT_S))
                )
            except NotMaster as error:
                failure = error
                reason = reason if error.address else error
                self._leave(address, error.address)
            except NotAuthorised:
                raise  # The key is wrong, and no controller will find it right.
            except (PeerError, VersionMismatch) as error:  # Another controller may be a neighbour's.
                failure = error
                self._leave(address)
            else:
                self._in_vain = 0
                return reply
            asked += 1
            if self._in_vain >= len(self.known):
                await self._look_around(failure, deadline)
            if asked % len(self.known) == 0:
                await trio.sleep(self._runtime.entropy.uniform(*_PAUSE_S))

    async def _look_around(self, failure: DroppexError, deadline: float) -> None:
        """After all controllers failed, ask other sources where there are more, at a bounded rate."""
        now = self._runtime.clock.now()
        # Where a standby answers, the list is right, and what is missing is a master.
        if self._find is None or now < self._find_at or isinstance(failure, NotMaster):
            return
        self._find_at = now + _FIND_S
        with trio.move_on_after(max(0.0, deadline - now)):
            found = await self._find()
            new = [address for address in found if address not in self.known]
            if found:
                self._found = found
            if new and self._in_vain:  # Else another call has found the master meanwhile.
                self._address, self._in_vain = new[0], 0

    def _leave(self, address: str, hint: str = "") -> None:
        """Ask elsewhere, unless another call has moved on already: two would come back to where they were."""
        if self._address == address:
            self._address = hint or self._next()
            self._in_vain += 1

    def _next(self) -> str:
        known = self.known
        if self._address not in known:
            return known[0]
        return known[(known.index(self._address) + 1) % len(known)]
