"""Invariant 2: the history of each name, or of names that moves bind together, is linearizable."""

from tests.simulation.simulator.history import Call, groups, step
from tests.simulation.simulator.linearizability import Undecided, unexplained
from tests.simulation.simulator.plan import Verb
from tests.simulation.simulator.world import World

LINEARIZABLE = "linearizable"
MOST_LINES = 60


def check_history(world: World) -> bool:
    """Search for an order that explains everything; return whether the search came to an end."""
    made = {world.put_of(size) for size in world.made.values()}
    calls = world.history.calls
    if world.recorded <= set(world.made):
        calls = [call for call in calls if _may_have_happened(call, made)]
    decided = True
    for names, part in groups(calls):
        try:
            wrong = unexplained(
                part, (None,) * len(names), lambda state, call, names=names: step(names, state, call)
            )
        except Undecided:
            decided = False
            continue
        if wrong is not None:
            known = "\n  ".join(str(call) for call in part[:MOST_LINES])
            world.report(LINEARIZABLE, f"no order of these calls explains the answer of {wrong}:\n  {known}")
    return decided


def _may_have_happened(call: Call, made: set[int | None]) -> bool:
    """A put that nobody knows the outcome of did nothing, if its version was never in the catalogue."""
    return call.returned is not None or call.verb is not Verb.PUT or call.version in made
