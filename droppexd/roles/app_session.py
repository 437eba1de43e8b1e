"""The app's registration with the master: ids that are never used twice, the floor, and the map."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from droppexd.errors import DroppexError, NotFound, PeerError, SessionClosed
from droppexd.model import DISK_FULL, ClusterMap, ExtentId, Layout, OperationId, PoolInfo, VersionId
from droppexd.placement import Placement, choose_layout
from droppexd.roles.master import MasterLink
from droppexd.runtime import Runtime
from droppexd.wire.messages import CloseSession, KeepSession, OpenSession

log = logging.getLogger("droppex.app")

_CALL_S = 10.0
_KEEP_S = 2.0
"""Between two heartbeats of an app. They bring the new map, so this is how stale the map may be."""

_CLOSE_S = 1.0
_PAUSE_S = 1.0
"""Before a master that refused is asked again; its disk may be full, and the app outlives that."""


class MapView:
    """The cluster map as the app last heard of it, made ready for look-ups."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.placement = Placement(cluster_map.pools)
        self.takers = tuple(pool.number for pool in cluster_map.pools if pool.writable)
        """The pools that take new shards."""
        self.full = sum(pool.trouble == DISK_FULL for pool in cluster_map.pools)
        """How many pools take none for want of room."""
        self._pools = {pool.number: pool for pool in cluster_map.pools}
        self._writable = frozenset(self.takers)
        self._layouts: dict[Layout | None, Layout] = {}

    def layout(self, wanted: Layout | None) -> Layout:
        """Return the layout of new files, which is `wanted` unless that is None."""
        layout = self._layouts.get(wanted)
        if layout is None:
            layout = self._layouts[wanted] = choose_layout(self.map.pools, wanted)
        return layout

    def pool(self, number: int) -> PoolInfo | None:
        """Return the pool with this number."""
        return self._pools.get(number)

    def writable(self, number: int) -> bool:
        """Whether new shards may go to this pool."""
        return number in self._writable


class Ids:
    """The ids of one piece of work. Its session's floor stays below them until the work ends."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    def version(self) -> VersionId:
        """Return a new version id."""
        return VersionId(self._session.number, self._session.next_counter())

    def extent(self) -> ExtentId:
        """Return a new extent id."""
        return ExtentId(self._session.number, self._session.next_counter())

    def operation(self) -> OperationId:
        """Return a new operation id."""
        return OperationId(self._session.number, self._session.next_counter())


class Session:
    """One registration. It is replaced, never mended, when the master has closed it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False
        self._counter = 0
        self._in_use: dict[int, None] = {}  # In order of allocation: the first is the lowest.

    def next_counter(self) -> int:
        """Return a counter that was never used in this session."""
        self._counter += 1
        return self._counter

    @property
    def floor(self) -> int:
        """The lowest counter that may still be used."""
        return next(iter(self._in_use), self._counter + 1)

    @contextmanager
    def work(self) -> Iterator[Ids]:
        """Give ids to one piece of work and keep the floor below them until it ends."""
        if self.closed:
            raise SessionClosed("the app has lost its session with the master; try again")
        mark = self.next_counter()
        self._in_use[mark] = None
        try:
            yield Ids(self)
        finally:
            del self._in_use[mark]


class Registration:
    """Keeps the app registered with the master, and the map fresh."""

    def __init__(self, master: MasterLink, runtime: Runtime) -> None:
        self._master = master
        self._runtime = runtime
        self._address = ""
        self._session: Session | None = None
        self._view: MapView | None = None

    @property
    def session(self) -> Session:
        """The session of now; raise PeerError while there is none."""
        if self._session is None or self._session.closed:
            raise PeerError("the app is not registered with a master at the moment; try again")
        return self._session

    @property
    def view(self) -> MapView:
        """The map of now."""
        if self._view is None:
            raise PeerError("the app has not heard from a master yet; try again")
        return self._view

    async def open(self, address: str) -> None:
        """Register as the app at this address; repeat until a master answers."""
        self._address = address
        while True:
            try:
                opened = await self._master.call(
                    OpenSession(address=self._address, boot_id=self._runtime.entropy.token(16)),
                    timeout_s=_CALL_S,
                )
            except DroppexError as error:
                log.warning("no master yet: %s", error)
                await trio.sleep(_PAUSE_S)
                continue
            self._session = Session(opened.session)
            self._view = MapView(opened.map)
            log.info("registered session=%d master=%s", opened.session, self._master.address)
            return

    async def run(self) -> None:
        """Keep the session alive for ever; open a new one when it is lost."""
        while True:
            await trio.sleep(_KEEP_S)
            await self.refresh()

    async def refresh(self) -> bool:
        """Send one heartbeat and take the map that it brings; return whether the map is the master's."""
        session = self._session
        if session is None:
            return False
        known = self.view.map.version
        request = KeepSession(session=session.number, floor=session.floor, map_version=known)
        try:
            kept = await self._master.call(request, timeout_s=_CALL_S)
        except (SessionClosed, NotFound):
            log.warning("the master has closed session %d; opening another", session.number)
            session.closed = True
            await self.open(self._address)
        except DroppexError as error:
            log.warning("heartbeat to the master failed: %s", error)
            return False
        else:
            if kept.map is not None:
                self._view = MapView(kept.map)
        return True

    async def close(self) -> None:
        """End the session in order, in bounded time: nothing of it is under way any more."""
        if self._session is None or self._session.closed:
            return
        self._session.closed = True
        try:
            await self._master.call(CloseSession(session=self._session.number), timeout_s=_CLOSE_S)
        except DroppexError as error:
            log.debug("the session was left to expire: %s", error)
