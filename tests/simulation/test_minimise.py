"""Cutting a failing plan down."""

from dataclasses import replace

from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.minimise import minimise, shortest
from tests.simulation.simulator.mutants import MUTANTS
from tests.simulation.simulator.simulation import simulate


def test_what_fails_by_itself_is_all_that_is_left():
    assert shortest(range(100), lambda some: 42 in some) == (42,)


def test_what_fails_together_stays_together():
    assert shortest(range(100), lambda some: {3, 50, 99} <= set(some)) == (3, 50, 99)


def test_what_fails_with_nothing_is_cut_to_nothing():
    assert shortest(range(100), lambda _: True) == ()


def test_the_tries_are_bounded_and_the_plan_still_fails():
    plan = draw_plan(1)
    tried = []

    def fails(smaller):
        tried.append(smaller)
        return len(smaller.operations) >= 5

    smallest = minimise(plan, fails, most_tries=12)
    assert len(tried) == 12
    assert len(smallest.operations) >= 5


def test_rounds_operations_and_faults_are_left_out_and_faults_shortened():
    plan = next(
        plan for plan in map(draw_plan, range(100)) if len(plan.rounds) == 2 and plan.rounds[1].faults
    )
    operation = plan.rounds[1].operations[-1]
    fault = plan.rounds[1].faults[0]

    def fails(smaller):
        return operation in smaller.operations and any(one.number == fault.number for one in smaller.faults)

    smallest = minimise(plan, fails)
    assert smallest.operations == (operation,)
    assert [one.number for one in smallest.faults] == [fault.number]
    assert smallest.faults[0].for_s <= max(0.1, min(fault.for_s, 0.1))
    assert len(smallest.rounds) == 1


def test_a_seed_that_fails_is_cut_down_and_fails_alike():
    mutant = MUTANTS["unchecked-conditions"]

    def invariant(plan):
        violation = simulate(plan, mutate=mutant.patch).violation
        return violation and violation.invariant

    plan = draw_plan(0)
    wanted = invariant(plan)
    assert wanted == "linearizable"
    smallest = minimise(plan, lambda smaller: invariant(smaller) == wanted, most_tries=60)
    assert invariant(smallest) == wanted
    assert len(smallest.operations) < len(plan.operations) / 2
    assert simulate(smallest).violation is None
    assert replace(smallest, rounds=plan.rounds) == plan
