"""What a commit counts: shards on pools that are out or removed are as good as lost, whatever was acknowledged."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from unittest import mock

import trio

from droppexd.catalog.catalogue import Catalogue
from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.keys import EXTENTS, parse_id
from droppexd.catalog.records import unpack_extent
from droppexd.model import ExtentId
from tests.simulation.simulator.world import World

COUNTS = "lost-pools-do-not-count"

_UNDER_WAY_S = 5.0
"""A change may be judged just before a pool is out, and written so much later by a slow disk."""


class OutPoolsDoNotCount:
    """Watches what masters call out, and every record: none newly names a pool that has been out for a while."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._out: dict[int, dict[int, float]] = {}
        """By the master's term: which pools it counts as lost, since when."""
        self._named: dict[bytes, tuple[int, ...]] = {}
        world.on_write.append(self._written)

    def watch(self, stack: ExitStack) -> None:
        """Listen to what masters tell their catalogues, until the stack is left."""
        set_out: Callable[[Catalogue, Collection[int]], None] = Catalogue.set_out

        def note(catalogue: Catalogue, pools: Collection[int]) -> None:
            set_out(catalogue, pools)
            before = self._out.get(catalogue.term, {})
            now = trio.current_time()
            self._out[catalogue.term] = {pool: before.get(pool, now) for pool in pools}

        stack.enter_context(mock.patch.object(Catalogue, "set_out", note))

    def _written(self, _revision: int, then: Sequence[Write]) -> None:
        for key, value in then:
            if not key.startswith(EXTENTS):
                continue
            before = self._named.pop(key, ())
            if value is None:
                continue
            extent_id = ExtentId(*parse_id(key))
            pools = self._named[key] = unpack_extent(extent_id, value).extent.pools
            for index, pool in enumerate(pools):
                if before[index : index + 1] != (pool,) and self._is_out(pool):
                    self._world.report(
                        COUNTS,
                        f"a record newly names pool {pool}, which is out, for shard {index} of {extent_id}",
                    )

    def _is_out(self, pool: int) -> bool:
        term = self._world.terms[-1][1]
        since = self._out.get(term, {}).get(pool)
        return since is not None and trio.current_time() - since > _UNDER_WAY_S
