"""What the master does after its catalogue was restored from a backup: it trusts the records when proven.

The records of a backup name the pools that had the shards then. Shards were moved since, so where a record
and a pool differ, either may be right. While the mark of a restore is set nothing is dead that a record
knows; what a pool has and another was named for is recorded where it is (`catalog/reconciling.py`), and
what is nowhere is missing. When each member has compared all that it holds, every record names a pool that
has the shard, or none: what is elsewhere then is a left-over like any other. The mark goes, and the pools
compare once more: what was in the way of another shard the first time is found, and left-overs are
dropped.

A catalogue that was made anew from what pools keep has one more mark. On that an app then reads each version
of which only shards tell, and gives it a name below `lost+found`, marked uncertain. What cannot be read stays
on the pools, for a person to decide about.
"""

import logging

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.errors import DroppexError
from droppexd.model import PoolRecord
from droppexd.roles.controller_pools import PoolTable
from droppexd.wire.group_messages import AdoptAll
from droppexd.wire.rpc import Connections

log = logging.getLogger("droppex.controller")

FOUND_FOLDER = "lost+found"

_LOOK_S = 1.0
_AGAIN_S = 5.0
_ASK_S = 30.0
"""An app answers after 10 s, done or not."""


class RestoreWatch:
    """Looks whether all pools have compared, ends the restore, and has adopted what shards alone tell of."""

    def __init__(
        self, catalogue: Catalogue, pools: PoolTable, connections: Connections, patience_s: float
    ) -> None:
        self._catalogue = catalogue
        self._pools = pools
        self._connections = connections
        self._patience_s = patience_s
        self._patient = True
        self.adopted = 0
        """How many versions are below `lost+found` by now, since this master has been one."""

    def waits_for(self) -> list[PoolRecord]:
        """Return the members that were not compared with a restored catalogue yet."""
        if self._catalogue.restored_ms is None:
            return []
        return self._pools.uncompared(self._catalogue.start)

    async def run(self) -> None:
        """Return when the catalogue is none that was just restored or rebuilt."""
        if self._catalogue.restored_ms is not None:
            await self._end_restore()
        if self._catalogue.rebuilt_from is not None:
            await self._adopt_all()

    async def _end_restore(self) -> None:
        log.warning("this catalogue was restored: nothing that it knows is dropped until all pools compared")
        began = trio.current_time()
        while True:
            await trio.sleep(_LOOK_S)
            self._patient = trio.current_time() - began < self._patience_s
            if not self.awaited() and not self.waits_for() and not self._removed_are_named():
                break
        await self._catalogue.end_restore()
        log.warning("all pools have compared with the restored catalogue")

    async def _adopt_all(self) -> None:
        """Have one app after the other adopt everything, until one has come to the end."""
        while True:
            sessions = self._catalogue.sessions.values()
            for app in sorted({session.address for session in sessions if not session.closed}):
                if await self._adopted_by(app):
                    return
            await trio.sleep(_AGAIN_S)

    async def _adopted_by(self, app: str) -> bool:
        """Have an app adopt everything; return whether it did."""
        request = AdoptAll(folder=FOUND_FOLDER)
        before = self.adopted
        while True:
            try:
                told, _ = await self._connections.call(app, request, timeout_s=_ASK_S)
            except DroppexError as error:
                log.info("the app at %s does not adopt what only shards tell of: %s", app, error)
                return False
            self.adopted = before + told.adopted
            if told.done:
                await self._catalogue.end_rebuild()
                log.warning(
                    "what only shards told of was adopted folder=%s versions=%d unreadable=%d",
                    FOUND_FOLDER,
                    self.adopted,
                    told.left,
                )
                return True

    def awaited(self) -> int:
        """Return how many pools are still to come: one made anew without a journal knows none at first.

        Those that do not come for long are waited for no more.
        """
        wanted = self._catalogue.rebuilt_from or 0
        there = len(self._catalogue.pools) - len(self._pools.removed())
        return max(0, wanted - there) if self._patient else 0

    def _removed_are_named(self) -> bool:
        """Whether records still name pools that were removed, which nobody will compare."""
        return any(map(self._catalogue.places, self._pools.removed()))
