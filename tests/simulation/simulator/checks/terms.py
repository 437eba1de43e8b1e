"""Invariant 5: only the master of the highest term changes the catalogue."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from droppexd.catalog.engine import Compare
from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.keys import TERM
from droppexd.catalog.records import unpack_fields
from droppexd.catalog.simulated import SimulatedEngine
from tests.simulation.simulator.world import World

FENCED = "one-master"


class WrittenBy:
    """An engine as one controller uses it: it remembers under which term the controller writes."""

    def __init__(self, writer: str, engine: SimulatedEngine, world: World) -> None:
        self._writer = writer
        self._engine = engine
        self._world = world
        self._term = 0
        self.most_bytes = engine.most_bytes
        self.get = engine.get
        self.peek = engine.peek
        self.range = engine.range
        self.watch = engine.watch
        self.log = engine.log
        self.close = engine.close

    @property
    def revision(self) -> int:
        return self._engine.revision

    @property
    def shortage(self) -> str:
        return self._engine.shortage

    @property
    def failure(self) -> str:
        return getattr(self._engine, "failure", "")

    async def txn(self, compare: Sequence[Compare], then: Sequence[Write]) -> int | None:
        begun = next((unpack_fields(value, "term")[0] for key, value in then if key == TERM), None)
        revision = await self._engine.txn(compare, then)
        if revision is not None and then:
            if begun is not None:
                self._term = begun
            self._judge(revision)
        return revision

    def _judge(self, revision: int) -> None:
        terms = self._world.terms
        in_force = terms[bisect_right(terms, (revision, math.inf)) - 1][1]
        if in_force != self._term:
            self._world.report(
                FENCED,
                f"{self._writer}, master of term {self._term}, wrote revision {revision} in term {in_force}",
            )


class TermsInForce:
    """Notes since which revision which term is in force."""

    def __init__(self, world: World) -> None:
        self._terms = world.terms
        world.on_write.append(self._written)

    def _written(self, revision: int, then: Sequence[Write]) -> None:
        for key, value in then:
            if key == TERM:
                self._terms.append((revision, unpack_fields(value, "term")[0]))
