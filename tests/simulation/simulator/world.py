"""What the checkers know: every disk, the catalogue as it is, the history, and what the faults have taken."""

from collections import Counter
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass

from droppexd.catalog.engine import Operation as Write
from droppexd.catalog.simulated import SimulatedDisk as CatalogueDisk
from droppexd.model import ExtentId, VersionId
from droppexd.store.simulated import SimulatedDisk, Snapshot
from tests.simulation.simulator.history import History

ShardKey = tuple[ExtentId, int]


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that does not hold, and how that was seen."""

    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


class WatchedDisk(SimulatedDisk):
    """A pool's disk that tells what leaves it, and knows what was taken from it by a fault."""

    def __init__(self, name: str, capacity: int, world: "World") -> None:
        super().__init__(capacity)
        self.name = name
        self.bought_capacity = capacity
        self.lost = False
        """Gone for good, with all that is on it."""
        self.taken: set[ShardKey] = set()
        """Shards that a fault took away."""
        self.spoiled: set[ShardKey] = set()
        """Shards that are there, and damaged by a fault."""
        self._world = world

    def add(self, key, stored) -> None:
        super().add(key, stored)
        self.taken.discard(key)

    def remove(self, key) -> None:
        generation = self.shards[key].generation
        super().remove(key)
        self.spoiled.discard(key)
        for watcher in self._world.on_drop:
            watcher(self, key, generation)

    def sound(self, key: ShardKey) -> bool:
        """Whether the shard is there, whole."""
        return not self.lost and key in self.shards and key not in self.spoiled

    def harmed(self) -> set[ShardKey]:
        """Return the shards that faults took or damaged, and that were not made good here."""
        return self.taken | (set(self.shards) if self.lost else self.spoiled)

    def accounted_for(self, key: ShardKey) -> bool:
        """Whether the shard is there, or a fault is the reason why it is not."""
        return self.lost or key in self.shards or key in self.taken

    def restore(self, snapshot: Snapshot) -> None:
        before = set(self.shards)
        super().restore(snapshot)
        self.taken |= before - set(self.shards)
        self.taken -= set(self.shards)


class WatchedCatalogueDisk(CatalogueDisk):
    """The catalogue's disk, which tells of each transaction that reaches it."""

    def __init__(self, world: "World") -> None:
        super().__init__()
        self._world = world

    def apply(self, time_ms, then) -> None:
        super().apply(time_ms, then)
        for watcher in self._world.on_write:
            watcher(self.revision, then)


@dataclass(eq=False)
class Life:
    """One start of a process, from its first task to its end."""

    over: bool = False


LIFE: ContextVar[Life] = ContextVar("life")
"""The start of a process that a task belongs to."""


class World:
    """Shared by the cluster, the faults, the workload and the checkers of one run."""

    def __init__(self, ignoring: Collection[str] = ()) -> None:
        self._ignoring = frozenset(ignoring)
        self.history = History()
        self.disks: dict[str, WatchedDisk] = {}
        self.catalogue = WatchedCatalogueDisk(self)
        self.violation: Violation | None = None
        self.on_drop: list[Callable[[WatchedDisk, ShardKey, int], None]] = []
        self.on_write: list[Callable[[int, list[Write]], None]] = []
        self.on_violation: Callable[[], None] = lambda: None
        self.made: dict[VersionId, int] = {}
        """The size of each version that ever reached the catalogue's disk."""
        self.recorded: set[VersionId] = set()
        """Each version that a record on that disk ever spoke of, be it only to say how an operation ended."""
        self.put_of_size: dict[int, int] = {}
        """Which put of the plan has which size: no two have the same."""
        self.happened: Counter[str] = Counter()
        """How often what was planned took place: faults by kind, operations by verb and outcome."""
        self.terms: list[tuple[int, int]] = []
        """Since which revision which term is in force."""

    def report(self, invariant: str, text: str) -> None:
        """Note that an invariant does not hold; the first is what the run ends with."""
        if self.violation is None and invariant not in self._ignoring:
            self.violation = Violation(invariant, text)
            self.on_violation()

    def put_of(self, size: int) -> int | None:
        """Return the number of the put that made a version of this size."""
        return self.put_of_size.get(size)

    def disk_of(self, pool_id: bytes) -> WatchedDisk | None:
        """Return the disk that is this pool."""
        return next((disk for disk in self.disks.values() if disk.pool_id == pool_id), None)
