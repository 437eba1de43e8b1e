"""The journal of a pool: a copy of the catalogue that it keeps for the controllers, and never looks into.

It follows the master's log as a standby controller does (`followers.py`), with the same promises, and votes
for nobody. A cluster whose controllers lost their disks gets its catalogue back from it.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import trio

from droppexd.catalog.lost_operations import KeepLost
from droppexd.catalog.promises import Promises
from droppexd.catalog.replica import Replica
from droppexd.errors import DroppexError, PeerBusy, StoreFull
from droppexd.roles.followers import FollowersGroup, FollowersSettings
from droppexd.runtime import Runtime
from droppexd.wire.messages import Request
from droppexd.wire.replication_messages import AppendLog, CopyAnew, LogPage, ReadEntries, ReadLog
from droppexd.wire.rpc import Answer, Call, Connections, Handler, Terms
from droppexd.wire.transport import Frame

log = logging.getLogger("droppex.pool")

_OPENING_S = 5.0
_LOOK_S = 1.0
"""Between two looks at the room on the disk, which a master fills by some MB in that time at most."""

Body = Sequence[Frame]


class JournalFolder(NamedTuple):
    """Where a pool keeps its journal."""

    open: Callable[[], AbstractAsyncContextManager[tuple[Replica, Promises]]]
    """Opens the copy, or begins one."""
    begun: bool
    """Whether there is one already."""
    keep_lost: KeepLost


class PoolJournal:
    """Answers the master that sends its log, and whoever wants it back."""

    def __init__(
        self,
        folder: JournalFolder,
        connections: Connections,
        runtime: Runtime,
        *,
        name: str,
        cluster_id: Callable[[], bytes],
        has_room: Callable[[], Awaitable[bool]],
    ) -> None:
        self._folder = folder
        self._connections = connections
        self._runtime = runtime
        self._name = name
        self._cluster_id = cluster_id
        self._has_room = has_room
        self._wanted = trio.Event()
        self._ready = trio.Event()
        self._group: FollowersGroup | None = None
        self._failure = ""
        self._room = True
        self._look_at = -math.inf
        if folder.begun:
            self._wanted.set()

    def handlers(self) -> Mapping[type[Request[Any]], Handler]:
        """Return the handlers by kind of request."""
        return {
            AppendLog: self.append_log,
            CopyAnew: self.copy_anew,
            ReadLog: self.read_log,
            ReadEntries: self.read_entries,
        }

    async def run(self) -> None:
        """Keep the journal open from when it is first wanted, for ever."""
        await self._wanted.wait()
        try:
            async with self._folder.open() as (replica, promises):
                settings = FollowersSettings(name=self._name, cluster_id=self._cluster_id())
                group = FollowersGroup(
                    replica,
                    promises,
                    self._folder.keep_lost,
                    self._connections,
                    self._runtime,
                    Terms(),
                    settings,
                )
                await group.open()
                self._group = group
                self._ready.set()
                await group.copy()
        except DroppexError as error:
            # The shards are served all the same.
            self._failure, self._group = f"the journal of {self._name} cannot be kept: {error}", None
            log.warning("%s", self._failure)
            self._ready.set()

    async def append_log(self, call: Call, request: AppendLog, body: Body) -> Answer:
        """Write down what the master sends. Raise StoreFull where the disk has no room for more."""
        now = self._runtime.clock.now()
        if now >= self._look_at:
            self._room, self._look_at = await self._has_room(), now + _LOOK_S
        if not self._room:
            raise StoreFull(f"the pool {self._name} has no room for the journal of the catalogue")
        return await (await self._opened()).append_log(call, request, body)

    async def copy_anew(self, call: Call, request: CopyAnew, body: Body) -> Answer:
        """Copy everything from the master."""
        return await (await self._opened()).copy_anew(call, request, body)

    async def read_log(self, call: Call, request: ReadLog, body: Body) -> Answer:
        """Give back what was written down."""
        if not self._wanted.is_set():
            return LogPage(term=0, revision=0, diverged=True, cluster_id=self._cluster_id())
        return await (await self._opened()).source.read_log(call, request, body)

    async def read_entries(self, call: Call, request: ReadEntries, body: Body) -> Answer:
        """Give back what the log came to."""
        return await (await self._opened()).source.read_entries(call, request, body)

    async def _opened(self) -> FollowersGroup:
        self._wanted.set()
        with trio.move_on_after(_OPENING_S):
            await self._ready.wait()
        if self._group is None:
            raise PeerBusy(self._failure or f"the journal of {self._name} is being opened")
        return self._group
