"""Each checker bites: a droppex with one rule broken is caught, by a checker that it is for."""

import pytest

from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.mutants import MUTANTS
from tests.simulation.simulator.simulation import simulate

SEEDS = 200


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name):
    mutant = MUTANTS[name]
    for seed in (mutant.seed, *range(SEEDS)):
        violation = simulate(draw_plan(seed), mutate=mutant.patch, ignoring=mutant.ignoring).violation
        if violation is not None:
            assert violation.invariant in mutant.caught_by, f"seed {seed}: {violation}"
            return
    pytest.fail(f"{name} was not noticed in {SEEDS} seeds")
