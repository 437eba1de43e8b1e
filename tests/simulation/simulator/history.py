"""What clients asked and what they were told, and what a correct cluster may do with it.

A version is known by the number of the put that made it. The state of some names is a tuple: the version of
each, or None. `step` is the sequential specification that the search for a linearization uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.simulation.simulator.plan import Verb

State = tuple[int | None, ...]

ANY_VERSION = -1
"""A version that was answered, and of which nobody knows which put made it."""


@dataclass(slots=True, kw_only=True)
class Call:
    """One operation as its client saw it. Moments are numbers of a counter that all share."""

    client: int
    verb: Verb
    name: str
    target: str = ""
    absent: bool = False
    expected: int | None = None
    """The version that a condition named."""
    version: int | None = None
    """Of a put: what it makes. Of others: the version they were answered with."""
    invoked: int = 0
    returned: int | None = None
    """None: nobody knows what came of it; it may take effect at any later moment, or never."""
    refusal: str = ""
    """`conflict` or `not-found`: it was refused, and changed nothing."""
    replaced: bool | None = None
    """Of a put: whether its receipt says that it replaced a version."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names it is about."""
        return (self.name, self.target) if self.target else (self.name,)

    def __str__(self) -> str:
        what = f"client-{self.client} {self.verb} {' -> '.join(self.names)}"
        if self.absent:
            what += " if absent"
        if self.expected is not None:
            what += f" if v{self.expected}"
        if self.verb is Verb.PUT:
            what += f" v{self.version}"
        if self.returned is None:
            return f"[{self.invoked}, ?] {what}: unknown"
        result = self.refusal or ("done" if self.verb is Verb.PUT else f"v{self.version}")
        return f"[{self.invoked}, {self.returned}] {what}: {result}"


@dataclass(slots=True)
class History:
    """All calls of a run, in the order of their invocation."""

    calls: list[Call] = field(default_factory=list)
    moment: int = 0

    def invoke(self, call: Call) -> Call:
        """Note that a client asks."""
        self.moment += 1
        call.invoked = self.moment
        self.calls.append(call)
        return call

    def answer(self, call: Call) -> None:
        """Note that the client was answered."""
        self.moment += 1
        call.returned = self.moment


def holds(call: Call, found: int | None) -> bool:
    """Whether the condition of a call holds of what the name points at."""
    if call.absent:
        return found is None
    return call.expected is None or call.expected == found


def step(names: Sequence[str], state: State, call: Call) -> State | None:
    """Return the state after a call that was answered so, or None when it cannot be answered so here.

    Of a call that nobody knows the outcome of: the state after it took effect, or None when it would not.
    """
    here = names.index(call.name)
    there = names.index(call.target) if call.target else here
    source, target = state[here], state[there]
    if call.refusal:
        return state if _may_refuse(call, source, target) else None
    if call.returned is None:
        if not _may_change(call, source, target):
            return None
    elif not _may_answer(call, source, target):
        return None
    return _changed(state, call, here, there)


def _may_refuse(call: Call, source: int | None, target: int | None) -> bool:
    needs_source = call.verb is not Verb.PUT
    if call.refusal == "not-found":
        return needs_source and source is None
    return not (needs_source and source is None) and not holds(call, target)


def _may_change(call: Call, source: int | None, target: int | None) -> bool:
    return holds(call, target) and (call.verb is Verb.PUT or source is not None)


def _may_answer(call: Call, source: int | None, target: int | None) -> bool:
    if call.verb is Verb.PUT:
        return holds(call, target) and call.replaced in (None, target is not None)
    if call.verb in (Verb.GET, Verb.GET_RANGE, Verb.STAT, Verb.LIST):
        return call.version in (source, ANY_VERSION)
    return holds(call, target) and source is not None and call.version in (source, ANY_VERSION)


def _changed(state: State, call: Call, here: int, there: int) -> State:
    after = list(state)
    if call.verb is Verb.PUT:
        after[here] = call.version
    elif call.verb is Verb.REMOVE:
        after[here] = None
    elif call.verb in (Verb.MOVE, Verb.COPY):
        after[there] = state[here]
        if call.verb is Verb.MOVE and here != there:
            after[here] = None
    return tuple(after)


def groups(calls: Sequence[Call]) -> list[tuple[tuple[str, ...], list[Call]]]:
    """Split a history by names; names that a move or copy binds together stay together.

    A history is linearizable if and only if each part is: parts have no name in common.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        leader.setdefault(name, name)
        while leader[name] != name:
            name = leader[name]
        return name

    for call in calls:
        first, *others = call.names
        root = find(first)
        for other in others:
            leader[find(other)] = root
    parts: dict[str, list[Call]] = {}
    for call in calls:
        parts.setdefault(find(call.name), []).append(call)
    return [(tuple(sorted({name for call in part for name in call.names})), part) for part in parts.values()]
