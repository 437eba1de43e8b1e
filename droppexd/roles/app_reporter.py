"""What readers find missing or wrong is told, once, to the pool that should have it.

The reader itself is served at once, from parity. The pool reads the shard whole and tells the master, the
record says "missing" then, and the pool that the master chooses rebuilds the shard and keeps it. So a hundred
readers of one file cause one rebuild, and a wrong word of an app causes none.
"""

import logging
from collections import deque

import trio

from droppexd.errors import DroppexError
from droppexd.model import ExtentId
from droppexd.runtime import Clock
from droppexd.wire.messages import CheckShards, ShardName
from droppexd.wire.rpc import Connections

log = logging.getLogger("droppex.app")

_MOST = 1024
"""Shards that wait to be told of. Beyond, readers meet them again, and scrubs find them."""
_AGAIN_S = 30.0
"""A shard that was told of is told of again after this, should a reader still find it bad."""
_AT_ONCE = 4
_CHECK_S = 60.0


class Reporter:
    """Tells pools of shards to check. `run` is its task."""

    def __init__(self, connections: Connections, clock: Clock) -> None:
        self._connections = connections
        self._clock = clock
        self._waiting: deque[tuple[str, ShardName]] = deque()
        self._told: dict[ShardName, float] = {}  # In order of time.
        self._news = trio.Event()

    def note(self, address: str, extent: ExtentId, shard: int) -> None:
        """Have the pool at this address check a shard, unless it was told of it a moment ago."""
        name = ShardName(extent, shard)
        now = self._clock.now()
        self._forget(now)
        if name in self._told or len(self._waiting) >= _MOST or len(self._told) >= _MOST:
            return
        self._told[name] = now
        self._waiting.append((address, name))
        self._news.set()

    def _forget(self, now: float) -> None:
        while self._told:
            name, told_at = next(iter(self._told.items()))
            if now - told_at < _AGAIN_S:
                return
            del self._told[name]

    async def run(self) -> None:
        """Tell, for ever."""
        room = trio.Semaphore(_AT_ONCE)
        async with trio.open_nursery() as nursery:
            while True:
                await self._news.wait()
                self._news = trio.Event()
                while self._waiting:
                    await room.acquire()
                    nursery.start_soon(self._tell, *self._waiting.popleft(), room)

    async def _tell(self, address: str, name: ShardName, room: trio.Semaphore) -> None:
        try:
            reply, _ = await self._connections.call(address, CheckShards(shards=(name,)), timeout_s=_CHECK_S)
            for check in reply.checks:
                log.info("shard checked extent=%s shard=%d: %s", name.extent, name.shard, check.state)
        except DroppexError as error:
            log.warning("shard not checked extent=%s shard=%d: %s", name.extent, name.shard, error)
        finally:
            room.release()
