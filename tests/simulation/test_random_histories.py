"""Random clusters, workloads and faults by seed: no invariant breaks, and one seed gives one trace.

`scripts/simulate --seed N` prints what happens under a seed, `scripts/simulate --first N --seeds 1` cuts a
failing one short.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.simulator.faults import KINDS
from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.plan import Verb
from tests.simulation.simulator.simulation import simulate

TOP = Path(__file__).parents[2]

_DIGEST = """
import logging, sys
from tests.simulation.simulator.generate import draw_plan
from tests.simulation.simulator.simulation import simulate

logging.disable(logging.CRITICAL)
print(simulate(draw_plan(int(sys.argv[1]))).digest)
"""


SEEDS = range(50)


@pytest.fixture(scope="module")
def run():
    """Run a seed, once for all tests of this module."""
    results = {}

    def run(seed):
        if seed not in results:
            results[seed] = simulate(draw_plan(seed))
        return results[seed]

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_no_invariant_breaks(run, seed):
    result = run(seed)
    assert result.violation is None, f"seed {seed}: {result.violation}"
    assert result.decided, f"seed {seed}: the search for a linearization was given up"


def test_what_can_happen_happens(run):
    happened = sum((run(seed).happened for seed in SEEDS), Counter())
    wanted = [*KINDS, *(f"{verb} done" for verb in Verb), "put conflict", "get not-found", "pool replaced"]
    assert [what for what in wanted if not happened[what]] == []


def test_one_seed_gives_one_trace_and_another_another():
    first, again, other = (simulate(draw_plan(seed)) for seed in (7, 7, 8))
    assert (first.digest, first.lines) == (again.digest, again.lines)
    assert first.digest != other.digest


def test_the_trace_does_not_depend_on_how_python_hashes():
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TOP)}
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST, "11"],
            env=environment,
            cwd=TOP,
            check=True,
            capture_output=True,
            text=True,
        )
        digests.add(done.stdout.strip())
    assert digests == {simulate(draw_plan(11)).digest}
