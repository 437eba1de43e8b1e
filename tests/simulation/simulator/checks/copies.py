"""Invariant 5, where each controller has a copy of the catalogue: what is agreed upon is never undone.

A transaction is agreed upon once as many copies have it as must confirm, the master's among them, in the last
term that has begun, or once one behind it is. (Ongaro and Ousterhout, "In Search of an Understandable Consensus
Algorithm", USENIX ATC 2014, section 5.4.2: one of an earlier term that many have may still be undone.) All
other checkers see the catalogue as it is agreed upon.
"""

from typing import NamedTuple

from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.keys import TERM
from droppexd.catalog.records import unpack_fields
from droppexd.catalog.simulated import SimulatedDisk
from tests.simulation.simulator.world import World

AGREED = "agreed-stays-agreed"


class Row(NamedTuple):
    """A transaction of a copy's log."""

    term: int
    time_ms: int
    then: tuple[Write, ...]


class CopyDisk(SimulatedDisk):
    """A controller's copy, which tells of each transaction that reaches it."""

    def __init__(self, name: str, agreed: "Agreed") -> None:
        super().__init__()
        self.name = name
        self.rows: list[Row] = []
        self._agreed = agreed

    def apply(self, time_ms, then) -> None:
        super().apply(time_ms, then)
        begun = next((unpack_fields(value, "term")[0] for key, value in then if key == TERM), None)
        term = begun or (self.rows[-1].term if self.rows else 0)
        self.rows.append(Row(term, time_ms, tuple(then)))
        self._agreed.look()

    def become(self, other: SimulatedDisk) -> None:
        super().become(other)
        term = unpack_fields(self.entries[TERM].value, "term")[0]
        self.rows = self._agreed.rows_up_to(term, self.revision)
        self._agreed.look()


class Agreed:
    """Carries over into the world's catalogue what is agreed upon."""

    def __init__(self, world: World, names: tuple[str, ...], sync: int) -> None:
        self.disks = {name: CopyDisk(name, self) for name in names}
        self._world = world
        self._needed = sync + 1
        self._rows: list[Row] = []
        """What is agreed upon."""

    def rows_up_to(self, term: int, revision: int) -> list[Row]:
        """Return the log of a copy that has this revision in this term."""
        for disk in self.disks.values():
            if len(disk.rows) >= revision and disk.rows[revision - 1].term == term:
                return disk.rows[:revision]
        self._world.report(AGREED, f"a copy has revision {revision} of term {term}, which nobody wrote")
        return []

    def look(self) -> None:
        """See what is agreed upon by now, and that all before still is."""
        known = self._world.catalogue.revision
        newest = max((disk.rows[-1].term for disk in self.disks.values() if disk.rows), default=0)
        agreed, source = known, None
        for disk in self.disks.values():
            for revision in range(len(disk.rows), agreed, -1):
                row = disk.rows[revision - 1]
                if row.term == newest and self._copies_of(row, revision) >= self._needed:
                    agreed, source = revision, disk
                    break
        if source is None:
            return
        for row in source.rows[known:agreed]:
            self._world.catalogue.apply(row.time_ms, row.then)
        self._compare(source, known)
        self._rows = source.rows[:agreed]

    def _copies_of(self, row: Row, revision: int) -> int:
        return sum(
            len(disk.rows) >= revision and disk.rows[revision - 1] == row for disk in self.disks.values()
        )

    def _compare(self, source: CopyDisk, known: int) -> None:
        """See that what was agreed upon before is what the agreeing copies have in its place."""
        if source.rows[:known] != self._rows:
            pairs = zip(source.rows, self._rows, strict=False)
            at = next((n for n, (one, other) in enumerate(pairs, 1) if one != other), len(source.rows) + 1)
            self._world.report(AGREED, f"{source.name} has another revision {at} than was agreed upon")

    def difference(self) -> str:
        """Return which copy is not what is agreed upon; empty when all are."""
        agreed = self._world.catalogue
        for disk in self.disks.values():
            if disk.revision != agreed.revision:
                return f"{disk.name} has revision {disk.revision}, and {agreed.revision} is agreed upon"
            if disk.entries != agreed.entries:
                keys = [key for key in disk.entries.keys() | agreed.entries.keys()
                        if disk.entries.get(key) != agreed.entries.get(key)]  # fmt: skip
                return f"{disk.name} differs from what is agreed upon in {sorted(keys)[:3]}"
        return ""
