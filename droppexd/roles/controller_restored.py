"""What the master does after its catalogue was restored from a backup: it trusts the records when proven.

The records of a backup name the pools that had the shards then. Shards were moved since, so where a record
and a pool differ, either may be right. While the mark of a restore is set nothing is dead that a record
knows; what a pool has and another was named for is recorded where it is (`catalog/reconciling.py`), and
what is nowhere is missing. When each member has compared all that it holds, every record names a pool that
has the shard, or none: what is elsewhere then is a left-over like any other. The mark goes, and the pools
compare once more: what was in the way of another shard the first time is found, and left-overs are
dropped.
"""

import logging

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.model import PoolRecord
from droppexd.roles.controller_pools import PoolTable

log = logging.getLogger("droppex.controller")

_LOOK_S = 1.0


class RestoreWatch:
    """Looks whether all pools have compared, and ends the restore."""

    def __init__(self, catalogue: Catalogue, pools: PoolTable) -> None:
        self._catalogue = catalogue
        self._pools = pools

    def waits_for(self) -> list[PoolRecord]:
        """Return the members that were not compared with a restored catalogue yet."""
        if self._catalogue.restored_ms is None:
            return []
        return self._pools.uncompared(self._catalogue.start)

    async def run(self) -> None:
        """Return when the catalogue is none that was just restored."""
        if self._catalogue.restored_ms is None:
            return
        log.warning("this catalogue was restored: nothing that it knows is dropped until all pools compared")
        while True:
            await trio.sleep(_LOOK_S)
            if not self.waits_for() and not self._removed_are_named():
                break
        await self._catalogue.end_restore()
        log.warning("all pools have compared with the restored catalogue")

    def _removed_are_named(self) -> bool:
        """Whether records still name pools that were removed, which nobody will compare."""
        return any(map(self._catalogue.places, self._pools.removed()))
