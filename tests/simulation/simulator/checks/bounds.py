"""Invariant 6: what a process holds for others stays within its bounds, and is given back in the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from droppexd.roles import app as app_role
from droppexd.roles import app_reporter, budget, controller_repair, pool_rebuild, pool_reconcile, pool_writer
from droppexd.wire import rpc
from tests.simulation.simulator.world import LIFE, Life, World

BOUNDED = "bounded-memory"
GIVEN_BACK = "memory-given-back"

_WATCHED = (
    budget.Budget,
    app_role._Streams,
    pool_reconcile.Reconciler,
    pool_rebuild.Rebuilder,
    controller_repair.Repair,
    app_reporter.Reporter,
    pool_writer.ShardStreams,
    pool_writer.SmallWriter,
    rpc._Server,
)


class Bounds:
    """Everything with a bound that was made during a run, and by which start of which process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._made: dict[type, list[tuple[Life | None, Any]]] = {cls: [] for cls in _WATCHED}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note each object with a bound that is made within the block."""
        before = {cls: cls.__init__ for cls in _WATCHED}
        for cls in _WATCHED:
            cls.__init__ = self._noting(cls, before[cls])
        try:
            yield
        finally:
            for cls, init in before.items():
                cls.__init__ = init

    def _noting(self, cls, init):
        made = self._made[cls]

        def note(self, *args, **kwargs):
            init(self, *args, **kwargs)
            made.append((LIFE.get(None), self))

        return note

    def _living(self, cls: type) -> list[Any]:
        """Return the objects of a class whose processes live, and forget the others."""
        living = self._made[cls] = [
            (life, one) for life, one in self._made[cls] if life is None or not life.over
        ]
        return [one for _, one in living]

    def check(self) -> None:
        """Compare everything with its bound."""
        for what, held, bound in self._held():
            if not 0 <= held <= bound:
                self._world.report(BOUNDED, f"{what}: {held}, and the bound is {bound}")

    def _held(self) -> Iterator[tuple[str, int, int]]:
        for one in self._living(budget.Budget):
            yield "units of the app's budget in use", one.total - one._free, one.total
        for one in self._living(app_role._Streams):
            yield "open transfers of an app", len(one._streams), app_role._MOST_STREAMS
        for one in self._living(pool_reconcile.Reconciler):
            yield "extents in doubt", len(one._doubtful), pool_reconcile._MOST_DOUBTFUL
        for one in self._living(pool_rebuild.Rebuilder):
            yield "orders of a pool", len(one._running), pool_rebuild.MAX_ORDERS
        for one in self._living(controller_repair.Repair):
            yield "extents planned for repair", len(one._planned), controller_repair.PLANNED
            yield "orders that rest", len(one._backed_off), controller_repair.BACKED_OFF
        for one in self._living(app_reporter.Reporter):
            yield "shards to tell of", len(one._waiting), app_reporter._MOST
        for one in self._living(pool_writer.ShardStreams):
            yield "shards being written", len(one._streams), pool_writer._MOST_STREAMS
            yield "failures kept", len(one._failures), pool_writer._FAILURES_KEPT
        for one in self._living(pool_writer.SmallWriter):
            yield "small shards waiting", len(one._waiting), pool_writer._MOST_SMALL
        for one in self._living(rpc._Server):
            yield "outstanding requests", one._outstanding, one._limits.outstanding
            for held in one._outstanding_by_route.values():
                yield "outstanding requests of a peer", held, one._limits.outstanding_per_peer

    def not_given_back(self) -> str:
        """Return what transfers hold though none is under way; empty when there is nothing."""
        for one in self._living(budget.Budget):
            if one._free != one.total or one.streams:
                return f"{one.total - one._free} units of a budget are in use by {one.streams} streams"
        for one in self._living(app_role._Streams):
            if one._streams:
                return f"{len(one._streams)} transfers of an app are open"
        return ""
