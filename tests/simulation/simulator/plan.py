"""A plan: all that happens in one run, as data. It is drawn from a seed, executed, and cut down.

Times are seconds of the mock clock. Where an operation or a fault has to choose when it is carried out (a
shard to damage, say), it uses its own `draw`, so that leaving out others changes as little as possible.
"""

import enum
from dataclasses import dataclass


class Verb(enum.StrEnum):
    """What a client does."""

    PUT = "put"
    GET = "get"
    GET_RANGE = "get-range"
    STAT = "stat"
    LIST = "list"
    REMOVE = "remove"
    MOVE = "move"
    COPY = "copy"
    RELAYOUT = "relayout"


class When(enum.StrEnum):
    """The condition of a change."""

    ABSENT = "absent"
    SEEN = "seen"
    """The version that this client saw last under that name."""
    ANYTHING = "anything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing that a client does, `pause_s` after the one before."""

    number: int
    client: int
    verb: Verb
    name: str
    target: str = ""
    when: When = When.ANYTHING
    size: int = 0
    """Of a put; no two puts of a plan have the same, so that a size tells a version."""
    layout: str = ""
    pause_s: float = 0.0
    patience_s: float = 20.0
    """How long the client waits; then it does not know what came of it."""
    dawdle_s: float = 0.0
    """How long a client that reads or writes takes over each chunk."""
    draw: float = 0.0
    breaks: tuple[float, ...] = ()
    """Of a put: before it is done it breaks off at these parts of its content, and the next attempt goes on."""

    def __str__(self) -> str:
        what = f"client-{self.client} #{self.number} {self.verb} {self.name}"
        if self.target:
            what += f" -> {self.target}"
        if self.verb in (Verb.PUT, Verb.REMOVE, Verb.MOVE, Verb.COPY):
            what += f" if {self.when}"
        if self.verb is Verb.PUT:
            what += f", {self.size} bytes"
        return what + (f" in {self.layout}" if self.layout else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong at `at_s`, and is over `for_s` later."""

    number: int
    kind: str
    at_s: float
    for_s: float
    one: str
    other: str = ""
    amount: float = 0.0
    draw: float = 0.0

    def __str__(self) -> str:
        between = f"{self.one} and {self.other}" if self.other else self.one
        return f"fault {self.number} at {self.at_s:.2f} s for {self.for_s:.2f} s: {self.kind} {between}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Operations and faults side by side; afterwards the cluster comes to rest."""

    operations: tuple[Operation, ...]
    faults: tuple[Fault, ...]
    most_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The cluster of a run, and how patient its members are."""

    machines: tuple[str, ...]
    """Of each pool; the first pool is `pool-1`."""
    capacities: tuple[int, ...]
    later: int = 0
    """So many pools, the last, are no part of the cluster until a fault adds them."""
    apps: int
    clients: int
    chunk_size: int
    buffer_chunks: int
    most_transfers: int
    delay_s: tuple[float, float]
    silence_s: float
    heartbeat_s: float
    down_after_s: float
    replace_after_s: float
    scrub_every_s: float
    session_lease_s: float
    delete_grace_s: float
    housekeeping_s: float
    review_s: float
    idle_s: float
    controllers: int = 1
    """More than one share a store, as they would etcd, or have copies; of one, a fault may start a second on the
    same file."""
    copies: bool = False
    """Whether each of several controllers has a copy of the catalogue, and follows the master's."""
    journal: int = 0
    """So many pools write down each change, where controllers have copies."""
    lease_s: float = 4.0
    """Of the mandate in that store."""

    @property
    def pools(self) -> tuple[str, ...]:
        """The names of the pools."""
        return tuple(f"pool-{number}" for number in range(1, len(self.machines) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that happens in a run."""

    seed: int
    shape: Shape
    rounds: tuple[Round, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations of all rounds."""
        return tuple(operation for part in self.rounds for operation in part.operations)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults of all rounds."""
        return tuple(fault for part in self.rounds for fault in part.faults)
