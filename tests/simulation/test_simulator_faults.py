"""The simulator itself: faults that meet do no more harm than each of them is meant to."""

from dataclasses import replace

from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.plan import Fault, Operation, Plan, Round, Verb
from tests.simulation.simulator.simulation import simulate


def plan_of(*faults: Fault, most_s: float = 2.0, seed: int = 1) -> Plan:
    """Return a plan in which little more happens than these faults."""
    reading = Operation(number=1, client=0, verb=Verb.STAT, name="docs/a", pause_s=most_s)
    return replace(draw_plan(seed), rounds=(Round(operations=(reading,), faults=faults, most_s=most_s + 1),))


def test_a_pool_that_two_faults_start_at_the_same_moment_runs_once():
    faults = [
        Fault(number=number, kind="failing-flush", at_s=0.5, for_s=9.0, one="pool-2") for number in (2, 3)
    ]
    for seed in range(4):  # The seed decides which of the two starts comes first.
        result = simulate(plan_of(*faults, seed=seed))
        assert result.violation is None
        assert not any("is running" in line for line in result.lines)
