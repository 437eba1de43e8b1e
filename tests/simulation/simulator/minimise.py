"""Cut a failing plan down: fewer rounds, operations, faults and clients, as long as it fails alike.

Delta debugging (A. Zeller, R. Hildebrandt, "Simplifying and isolating failure-inducing input", 2002): leave
out ever smaller parts and keep what still fails with the same invariant. Every try is a deterministic run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.simulation.simulator.plan import Fault, Operation, Plan, Round

T = TypeVar("T")

Fails = Callable[[Plan], bool]

MOST_TRIES = 300
"""Runs that one plan is worth."""


class _Tries:
    """Counts the tries, and gives up when they are used up."""

    def __init__(self, fails: Fails, most: int) -> None:
        self._fails = fails
        self._left = most

    def __call__(self, plan: Plan) -> bool:
        if not self._left:
            return False
        self._left -= 1
        return self._fails(plan)


def minimise(plan: Plan, fails: Fails, *, most_tries: int = MOST_TRIES) -> Plan:
    """Return a plan that fails as this one does, with as little in it as could be found."""
    tries = _Tries(fails, most_tries)
    plan = _with_fewer_rounds(plan, tries)
    while True:
        before = plan
        plan = _with_fewer_faults(plan, tries)
        plan = _with_fewer_operations(plan, tries)
        if plan == before:
            return _with_shorter_faults(plan, tries)


def _with_fewer_rounds(plan: Plan, fails: Fails) -> Plan:
    while len(plan.rounds) > 1:
        for part in range(len(plan.rounds)):
            fewer = replace(plan, rounds=plan.rounds[:part] + plan.rounds[part + 1 :])
            if fails(fewer):
                plan = fewer
                break
        else:
            return plan
    return plan


def _with_fewer_faults(plan: Plan, fails: Fails) -> Plan:
    kept = shortest(plan.faults, lambda some: fails(_only(plan, some, plan.operations)))
    return _only(plan, kept, plan.operations)


def _with_fewer_operations(plan: Plan, fails: Fails) -> Plan:
    kept = shortest(plan.operations, lambda some: fails(_only(plan, plan.faults, some)))
    return _only(plan, plan.faults, kept)


def _with_shorter_faults(plan: Plan, fails: Fails) -> Plan:
    for fault in plan.faults:
        for shorter in (0.1, 1.0):
            if fault.for_s <= shorter:
                break
            faults = [replace(one, for_s=shorter) if one is fault else one for one in plan.faults]
            changed = _only(plan, faults, plan.operations)
            if fails(changed):
                plan = changed
                break
    return plan


def _only(plan: Plan, faults: Sequence[Fault], operations: Sequence[Operation]) -> Plan:
    """Return the plan with these faults and operations alone."""
    by_number = {one.number: one for one in (*faults, *operations)}
    rounds = tuple(
        Round(
            operations=tuple(by_number[one.number] for one in part.operations if one.number in by_number),
            faults=tuple(by_number[one.number] for one in part.faults if one.number in by_number),
            most_s=part.most_s,
        )
        for part in plan.rounds
    )
    return replace(plan, rounds=rounds)


def shortest(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """Return some of these items that still fail, such that without any one of them they do not.

    That holds as far as `fails` allows; it is not asked about all of them, which fail as given.
    """
    if items and fails(()):
        return ()
    parts = 2
    while len(items) >= 2:
        size = -(-len(items) // parts)
        for start in range(0, len(items), size):
            rest = (*items[:start], *items[start + size :])
            if fails(rest):
                items = rest
                parts = max(2, parts - 1)
                break
        else:
            if size == 1:
                return items
            parts = min(len(items), parts * 2)
    return items
