"""A linearizable store with leases, as etcd is, for simulations: controllers are cut off from it and return.

The store outlives the controllers. Each reaches it over a link of its own, on which a question or an answer
may be late or lost. The mandate is a key under a lease: whoever makes the key has it, and the store deletes
it when the lease was not renewed in time. Every write of a master compares the revision of that key.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import trio

from droppexd.background import open_background
from droppexd.catalog.engine import MOST_BYTES, Compare, Engine, Entry, LogEntry, Operation
from droppexd.catalog.group import Health, Mandate, Undivided, Unrestricted
from droppexd.catalog.simulated import SimulatedEngine
from droppexd.catalog.watching import Watch
from droppexd.errors import CatalogError, NotMaster
from droppexd.runtime import Runtime

T = TypeVar("T")

ELECTION = b"~/master"
"""The key of the mandate; its value is the master's address. Behind all keys of a catalogue."""

_CALL_S = 5.0
_POLL_S = 0.5


class SharedStore:
    """The store itself. Its clock is the simulation's."""

    def __init__(self, engine: SimulatedEngine, *, lease_s: float = 10.0) -> None:
        self.engine = engine
        self.engine.frees_when_full = True  # Or no lease would ever end.
        self.lease_s = lease_s
        self._expires_at: dict[int, float] = {}
        """By the revision of the key that the lease is of."""

    async def elect(self, address: str) -> int | None:
        """Give the mandate to this address and return its revision; None while another has it."""
        await self._expire()
        revision = await self.engine.txn([Compare(ELECTION, 0)], [Operation(ELECTION, address.encode())])
        if revision is not None:
            self._expires_at[revision] = trio.current_time() + self.lease_s
        return revision

    async def renew(self, mandate: int) -> bool:
        """Renew a lease; return False when it is over."""
        await self._expire()
        if mandate not in self._expires_at:
            return False
        self._expires_at[mandate] = trio.current_time() + self.lease_s
        return True

    async def resign(self, mandate: int) -> None:
        """End a lease."""
        if self._expires_at.pop(mandate, None) is not None:
            await self.engine.txn([Compare(ELECTION, mandate)], [Operation(ELECTION, None)])

    async def holder(self) -> Entry | None:
        """Return the key of the mandate."""
        await self._expire()
        (entry,) = await self.engine.get((ELECTION,))
        return entry

    async def write(self, mandate: int, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Carry out a master's transaction; raise NotMaster when its mandate is over."""
        await self._expire()
        revision = await self.engine.txn([*compare, Compare(ELECTION, mandate)], then)
        if revision is None:
            (entry,) = await self.engine.get((ELECTION,))
            if entry is None or entry.revision != mandate:
                raise NotMaster("the mandate of this controller is over")
        return revision

    async def _expire(self) -> None:
        now = trio.current_time()
        for mandate in [mandate for mandate, until in self._expires_at.items() if until <= now]:
            await self.resign(mandate)


class StoreLink:
    """How one controller reaches the store. Whoever makes trouble sets these from outside."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store
        self.delay_s: Callable[[], float] = lambda: 0.0
        self.cut = False
        """Nothing comes through: who asks learns after a while that the outcome is unknown."""
        self.healed = trio.Event()
        self.paused = False
        """The controller stands still: what it asked for arrives when it goes on."""
        self.dead = False
        """The controller was killed: it says nothing more."""

    def resume(self) -> None:
        """Let questions and answers through again."""
        self.cut = self.paused = False
        self.healed.set()
        self.healed = trio.Event()

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Put a question to the store; raise CatalogError when no answer comes."""
        await self._cross()
        # The store works on, whether or not the controller is there to hear the answer.
        with trio.CancelScope(shield=True):
            answer = await question()
        await self._cross()
        return answer

    async def _cross(self) -> None:
        await trio.sleep(self.delay_s())
        while self.paused:
            await self.healed.wait()
        if self.dead:
            raise CatalogError("the controller was killed")
        if self.cut:
            with trio.move_on_after(_CALL_S):
                await trio.sleep_forever()
            raise CatalogError("the store of the catalogue does not answer")


class LinkedEngine:
    """The store's engine as the master of one mandate uses it."""

    most_bytes = MOST_BYTES
    shortage = ""

    def __init__(self, link: StoreLink, mandate: int) -> None:
        self._link = link
        self._mandate = mandate
        self._store = link.store
        self._revision = mandate

    @property
    def revision(self) -> int:
        """The revision of the last transaction that was acknowledged here."""
        return self._revision

    async def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries under these keys, as of a moment after the question was put."""
        return await self._link.ask(lambda: self._store.engine.get(keys))

    def peek(self, _keys: Sequence[bytes]) -> list[Entry | None] | None:
        """Return None: every read goes to the store."""
        return None

    async def range(self, start: bytes, end: bytes, limit: int) -> list[Entry]:
        """Return at most `limit` entries with start <= key < end, in order."""
        return await self._link.ask(lambda: self._store.engine.range(start, end, limit))

    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if all of `compare` holds; raise NotMaster once the mandate is over."""
        revision = await self._link.ask(lambda: self._store.write(self._mandate, compare, then))
        self._revision = max(self._revision, revision or 0)
        return revision

    def watch(self, start: bytes, end: bytes) -> Watch:
        """Yield the operations on keys in [start, end) that are committed from now on, in order."""
        return self._store.engine.watch(start, end)

    async def log(self, after_revision: int, limit: int) -> list[LogEntry]:
        """Return operations of later revisions in order, whole transactions, about `limit` of them."""
        return await self._link.ask(lambda: self._store.engine.log(after_revision, limit))

    async def close(self) -> None:
        """Do nothing: the store outlives its users."""


class Leased(Undivided):
    """A mandate that is kept by renewing its lease."""

    def __init__(self, link: StoreLink, mandate: int, runtime: Runtime, asked_at: float) -> None:
        self.engine: Engine = LinkedEngine(link, mandate)
        self._link = link
        self._mandate = mandate
        self._clock = runtime.clock
        self._until = asked_at + link.store.lease_s
        self._over = trio.Event()

    async def lost(self) -> None:
        """Return when the lease may be over by this controller's own clock."""
        await self._over.wait()

    async def keep(self) -> None:
        """Renew the lease until it is over."""
        try:
            while True:
                left_s = self._until - self._clock.now()
                await trio.sleep(max(0.0, min(self._link.store.lease_s / 3, left_s)))
                asked_at = self._clock.now()
                with trio.move_on_after(max(0.0, self._until - asked_at)) as waited:
                    try:
                        if not await self._link.ask(lambda: self._link.store.renew(self._mandate)):
                            return
                    except CatalogError:
                        pass
                    else:
                        self._until = asked_at + self._link.store.lease_s
                if waited.cancelled_caught or self._clock.now() >= self._until:
                    return
        finally:
            self._over.set()

    async def resign(self) -> None:
        """Give the mandate back, if the store can be told."""
        with trio.move_on_after(1.0, shield=True), suppress(CatalogError):
            await self._link.ask(lambda: self._link.store.resign(self._mandate))


class SimulatedGroup(Unrestricted):
    """The controllers on one store, as one of them sees them."""

    kind = "simulated"
    alone = False
    endpoints: Sequence[str] = ("simulated:",)
    prefix = ""

    def __init__(self, link: StoreLink, runtime: Runtime) -> None:
        self._link = link
        self._runtime = runtime
        self._failure = ""
        self.master = ""
        """The address of the controller that has the mandate, when the store was asked last."""

    @property
    def revision(self) -> int:
        """The last revision of the store."""
        return self._link.store.engine.revision

    @property
    def health(self) -> Health:
        """Whether the store answered last."""
        return Health(failure=self._failure)

    @asynccontextmanager
    async def campaign(self, address: str) -> AsyncIterator[Mandate]:
        """Wait until this controller has the mandate; leaving returns it."""
        leased = await self._win(address)
        self.master = address
        try:
            async with open_background() as nursery:
                nursery.start_soon(leased.keep)
                yield leased
        finally:
            self.master = ""
            await leased.resign()

    async def _win(self, address: str) -> Leased:
        store = self._link.store
        while True:
            asked_at = self._runtime.clock.now()
            try:
                mandate = await self._link.ask(lambda: store.elect(address))
                if mandate is not None:
                    return Leased(self._link, mandate, self._runtime, asked_at)
                entry = await self._link.ask(store.holder)
            except CatalogError as error:
                self._failure, self.master = str(error), ""
            else:
                self._failure, self.master = "", entry.value.decode() if entry else ""
            await trio.sleep(_POLL_S)
